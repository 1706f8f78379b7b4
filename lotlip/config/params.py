"""The whole of params.yaml, its ablations, and what is said of a file that cannot be used."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, PlainValidator, ValidationError, field_validator, model_validator

from lotlip.config.caption import CaptionStage
from lotlip.config.data import ImageTower, Ingest, ScenesSource, ScenesTower, Shard
from lotlip.config.pretrain import LongTexts, Pretrain
from lotlip.config.section import ConfigError, Count, Name, NonNegative, Section, SectionT, Share

# What the project consists of, and what its tools keep in it.
_RESERVED = frozenset(
    {
        "lotlip",
        "flows",
        "tests",
        "docs",
        "benchmarks",
        "infra",
        "profiles",
        "imported",
        "mlruns",
        "mlartifacts",
        "params.yaml",
        "dvc.yaml",
        "dvc.lock",
        "Makefile",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "requirements.lock",
        "mlflow.db",
    }
)


class Paths(Section):
    """Where each stage writes, relative to the project's root; dvc.yaml reads the same names.

    Each is a folder of its own inside the project: none is in another, except `stages` in `metrics`. Only
    `caption_store` may be an absolute path.
    """

    ingest: Path = Field(Path("data/ingest"), description="images and raw captions, as partitions")
    image_tower: Path = Field(Path("data/image-tower"), description="the image tower")
    captions: Path = Field(Path("data/captions"), description="long captions, a folder for each captioner")
    shards: Path = Field(Path("data/shards"), description="WebDataset tars that training reads")
    models: Path = Field(Path("models"), description="trained models, a folder for each ablation")
    metrics: Path = Field(Path("metrics"), description="scores of each ablation")
    stages: Path = Field(Path("metrics/stages"), description="records of the stages' last runs")
    caption_store: Path = Field(
        Path("data/caption-store"), description="captions that were written once, kept whatever changes; not DVC's"
    )
    report: Path = Field(Path("report"), description="the report")

    def check(self) -> None:
        """Checks that each is a folder of its own inside the project.

        Raises:
            ValueError: one is not; the message names its key.
        """
        named = {name: Path(os.path.normpath(path)) for name, path in self}
        for name, path in self:
            # the store is added to and never replaced; several checkouts may share one
            if name == "caption_store" and path.is_absolute():
                continue
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"paths.{name} must be a folder inside the project, not {str(path)!r}")
            if path.parts[0] in _RESERVED or path.parts[0].startswith("."):
                raise ValueError(
                    f"paths.{name} is {str(path)!r}, but {path.parts[0]!r} is part of the project; name another"
                )
        for name, path in named.items():
            for other, its in named.items():
                nested = name == "stages" and other == "metrics" and path.parent == its
                if name != other and not nested and path.is_relative_to(its):
                    raise ValueError(
                        f"paths.{name} ({path}) is in paths.{other} ({its}), but each must be a folder of its own"
                    )
        if self.stages.parent == self.metrics and self.stages.name in ("summary", "attention"):
            raise ValueError(f"paths.stages ({self.stages}) has the name of a folder that metrics has; name another")

    def check_links(self, root: Path) -> None:
        """Checks that no path leads out of the project.

        Args:
            root: of the project.

        Raises:
            ConfigError: one does, by a link.
        """
        real = root.resolve()
        problems = []
        for name, path in self:
            if name == "caption_store":
                continue
            step = root
            for part in path.parts:
                step = step / part
                if not step.resolve().is_relative_to(real):
                    problems.append(
                        f"paths.{name}: {step} is a link that leads out of the project; name a folder in it"
                    )
                    break
        if problems:
            raise ConfigError("params.yaml cannot be used:", problems)

    def overlaps(self, path: Path) -> str | None:
        """The name of an output that a path is, is in, or contains; None where there is none."""
        here = Path(os.path.normpath(path.absolute()))
        for name, own in self:
            there = Path(os.path.normpath(own.absolute()))
            if here.is_relative_to(there) or there.is_relative_to(here):
                return name
        return None


# --- evaluate, report ---------------------------------------------------------------------------------------------


class ScenesBenchmark(Section):
    """Held-out scenes: long and short texts in wording that training never had, and prompts for the shape."""

    kind: Literal["scenes"]
    split: Literal["val", "test"] = Field("test", description="split whose scenes are used")
    size: Count = Field(description="scenes in the split; another number is an error")
    max_unseen_tokens: Share = Field(0.01, description="share of the texts' word pieces that no training text has")


class HeldOutBenchmark(Section):
    """Held-out images of the data set itself: its raw captions, and its long captions where there are any."""

    kind: Literal["held-out"]
    split: Literal["val", "test"] = Field("test", description="split whose images are used")


PARTIAL_RUN = "-partial"  # the end of the name that a partial run's scores are filed under


def _how_partial(value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value > 0):
        return value
    raise ValueError("true takes what is there, a number above 0 the first so many images of it, false all or nothing")


class PublishedBenchmark(Section):
    """A benchmark that others score on as well, held to its published size; an entry of its name needs no `kind`."""

    kind: Literal[
        "sharegpt4v-1k", "sharegpt4v-10k", "dci", "iiw", "urban-1k", "docci", "coco", "flickr30k", "imagenet"
    ] = Field(description="which benchmark it is")
    folder: Path = Field(description="of its annotations, laid out as docs/benchmarks.md says")
    images: Path | None = Field(None, description="folder of its images, where that is another one")
    partial: Annotated[bool | int, PlainValidator(_how_partial)] = Field(
        False,
        description="true: what is there, without what is missing; a number: the first so many images of that. The "
        "scores are then filed under another name, which ends in -partial",
    )


Benchmark = Annotated[ScenesBenchmark | HeldOutBenchmark | PublishedBenchmark, Field(discriminator="kind")]


class Evaluate(Section):
    """Zero-shot retrieval and classification of each trained model."""

    batch_size: Count = Field(250, description="images or texts that a model encodes at a time")
    benchmarks: dict[Name, Benchmark] = Field(description="name → a benchmark that every ablation is scored on")
    min_score_over_chance: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="times chance that each benchmark's R@1 of short text must reach (of long text, or top-1 accuracy, "
        "where it has no short one); less fails the gate",
    )

    @property
    def names(self) -> list[str]:
        """What the benchmarks' scores are filed under, in order."""
        return [
            name + PARTIAL_RUN if isinstance(settings, PublishedBenchmark) and settings.partial is not False else name
            for name, settings in self.benchmarks.items()
        ]

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_kind(cls, data: Any) -> Any:
        """An entry that is called as a published benchmark and has no kind is that benchmark."""
        benchmarks = data.get("benchmarks") if isinstance(data, dict) else None
        if not isinstance(benchmarks, dict):
            return data
        published = get_args(PublishedBenchmark.model_fields["kind"].annotation)
        return data | {
            "benchmarks": {
                name: {"kind": name, **entry} if name in published and isinstance(entry, dict) else entry
                for name, entry in benchmarks.items()
            }
        }

    @model_validator(mode="after")
    def _distinct_names(self) -> Evaluate:
        for name in self.benchmarks:
            if name.endswith(PARTIAL_RUN):
                raise ValueError(f"benchmarks.{name} would look like a partial run; call it otherwise")
        return self


class Reproduce(Section):
    """What `make reproduce` runs; `dvc repro` and `make reproduce-all` run every ablation."""

    ablations: list[Name] = Field(default_factory=list, description="none named: all")


class Continued(Section):
    """An ablation that goes on from the trained models of another, each seed from its own."""

    after: Name = Field(description="the ablation that is trained first")
    pretrain: dict[str, Any] = Field(description="its differences from `pretrain`")

    @field_validator("after", mode="before")
    @classmethod
    def _a_name(cls, after: Any) -> Any:
        if isinstance(after, str) and "/" in after:  # a bare name may be an ablation and a folder, as `lotlip` is
            raise ValueError(
                "is a folder; give the name of an ablation, or set text.pretrained of an ablation to the folder"
            )
        return after

    @field_validator("pretrain")
    @classmethod
    def _the_same_text_tower(cls, pretrain: dict[str, Any]) -> dict[str, Any]:
        text = pretrain.get("text")
        if isinstance(text, dict) and text.get("config"):
            raise ValueError("text.config has no effect on a text tower that is already trained; remove it")
        return pretrain


class Report(Section):
    """The page that a person reads at the end."""

    title: str = Field("LoTLIP", description="title of the page")
    note: str = Field("", description="said in plain words at the top of the page")
    contact_sheet: NonNegative = Field(12, description="pictures shown with their captions")


class Tracking(Section):
    """MLflow; MLFLOW_TRACKING_URI in the environment goes before `uri`."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow's tracking server or database")
    experiment: str = Field("lotlip", description="name of the experiment that runs are filed under")


class Registry(Section):
    """MLflow's model registry: which model of a sweep is kept under a name, if it passes the gate.

    Metrics are called as in MLflow: the benchmark's name, then the metric's.
    """

    model: Name = Field("lotlip", description="name of the registered model")
    alias: Name = Field("champion", description="points at the last model that passed: models:/<model>@<alias>")
    least: dict[str, Share] = Field(description="metric → its least value; at least one on long text and one on short")
    most_loss: Share = Field(
        0.0, description="how far below the model that the alias points at each of these metrics may be"
    )

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` loads it by."""
        return f"models:/{self.model}@{self.alias}"

    @model_validator(mode="after")
    def _gate_on_both(self) -> Registry:
        for family in ("long", "short"):
            if not any(f".{family}." in name for name in self.least):
                raise ValueError(
                    f"least has no metric on {family} text, so a model could be kept that lost it; add one, "
                    f"such as scenes.{family}.text_to_image.r1: 0.2"
                )
        if self.alias == "latest" or (self.alias[0] == "v" and self.alias[1:].isdigit()):
            raise ValueError(f"MLflow keeps the alias {self.alias!r} for itself; call it otherwise")
        return self


class Orchestration(Section):
    """Prefect's side of every stage."""

    workers: Count = Field(2, description="units that run at the same time")
    retries: NonNegative = Field(2, description="tries after the first, for a unit")
    retry_delay_seconds: Annotated[float, Field(ge=0)] = Field(1.0, description="pause before a unit is tried again")


class Params(Section):
    """The whole of params.yaml."""

    paths: Paths = Paths()
    ingest: Ingest
    image_tower: ImageTower = Field(description="where the pretrained image tower comes from")
    caption: CaptionStage = CaptionStage()
    shard: Shard = Shard()
    pretrain: Pretrain = Pretrain()
    evaluate: Evaluate
    report: Report = Report()
    tracking: Tracking = Tracking()
    registry: Registry | None = Field(None, description="none: sweeps register no model")
    orchestration: Orchestration = Orchestration()
    reproduce: Reproduce = Reproduce()
    ablations: dict[Name, dict[str, Any]] = Field(description="name → its differences from `pretrain`")
    continued: dict[Name, Continued] = Field(default_factory=dict, description="ablations that go on from others")

    @property
    def names(self) -> list[str]:
        """Of all ablations, those that go on from others last."""
        return [*self.ablations, *self.continued]

    @property
    def warnings(self) -> list[str]:
        """Settings that are valid but probably not meant, a line each; `lotlip plan`, stages and report show them."""
        if isinstance(self.image_tower, ScenesTower) and not isinstance(self.ingest.source, ScenesSource):
            return [
                "image_tower.kind is scenes: that tower was trained on generated scenes alone and tells other pictures "
                f"apart poorly, but ingest.source.kind is {self.ingest.source.kind}; use a pretrained tower, such as "
                "image_tower: {kind: timm, model: vit_base_patch16_224.augreg_in21k}"
            ]
        return []

    @model_validator(mode="after")
    def _own_folders(self) -> Params:
        self.paths.check()
        return self

    @model_validator(mode="after")
    def _ablations_resolve(self) -> Params:
        if not self.ablations:
            raise ValueError("ablations is empty: name at least one, such as `lotlip: {}`")
        problems = [
            f"continued.{name} is called as one of ablations; call it otherwise"
            for name in self.continued
            if name in self.ablations
        ]
        there = f"there are: {', '.join(self.ablations)}"
        problems += [
            f"continued.{name}.after: no ablation {settings.after!r} in ablations ({there}); to start from a folder, "
            "set text.pretrained of an ablation to it"
            for name, settings in self.continued.items()
            if settings.after not in self.ablations
        ]
        problems += [
            f"reproduce.ablations: no ablation {name!r} ({there})"
            for name in self.reproduce.ablations
            if name not in self.names
        ]
        problems += [
            f"{key}: {path} overlaps with paths.{name}, which a stage replaces; move the data to another folder"
            for key, path in self._inputs()
            if (name := self.paths.overlaps(path))
        ]
        problems += [
            f"registry asks for {metric}, but no benchmark of evaluate is called so (there are: "
            f"{', '.join(self.evaluate.names)})"
            for metric in (self.registry.least if self.registry else [])
            if metric.partition(".")[0] not in self.evaluate.names
        ]
        for name in self.names:
            try:
                problems += self._caption_problems(name, self.ablation(name).long_texts)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError("ablations cannot be used:", problems)
        return self

    def _inputs(self) -> Iterator[tuple[str, Path]]:
        """Files and folders of the user that stages read: key of params.yaml, path."""
        source = getattr(self.ingest.source, "path", None)
        if source is not None and "://" not in str(source):
            yield "ingest.source.path", Path(source)
        for number, path in enumerate(self.ingest.evaluation_images):
            yield f"ingest.evaluation_images.{number}", path
        for name, captioner in self.caption.captioners.items():
            yield f"caption.captioners.{name}.path", captioner.path
        for name, benchmark in self.evaluate.benchmarks.items():
            if isinstance(benchmark, PublishedBenchmark):
                yield f"evaluate.benchmarks.{name}.folder", benchmark.folder
                if benchmark.images:
                    yield f"evaluate.benchmarks.{name}.images", benchmark.images

    def _caption_problems(self, name: str, long_texts: LongTexts) -> list[str]:
        """What an ablation asks of the caption stage that it does not have."""
        known = self.caption.captioners
        if long_texts.sub_captions and not known:
            return [
                f"ablations.{name} draws long texts, but caption.captioners is empty: "
                "add a captioner, or set long_texts.sub_captions to 0"
            ]
        unknown = sorted(set(long_texts.captioners) - set(known))
        if unknown:
            there = ", ".join(known) or "none"
            return [f"ablations.{name} draws from {', '.join(unknown)}, but caption.captioners has {there}"]
        return []

    def ablation(self, name: str) -> Pretrain:
        """`pretrain` with the differences of one ablation.

        Raises:
            ConfigError: no such ablation, or one of its keys or values is wrong.
        """
        base = self.pretrain.model_dump(mode="json", exclude_unset=True)
        if name in self.ablations:
            return _validated(Pretrain, merge(base, self.ablations[name]), f"ablations.{name}", f"ablations.{name}")
        if name not in self.continued:
            raise ConfigError(f"no ablation {name!r} in params.yaml; there are: {', '.join(self.names)}")
        settings, place = self.continued[name], f"continued.{name}.pretrain"
        start = {"text": {"pretrained": (self.paths.models / settings.after).as_posix()}}
        return _validated(Pretrain, merge(merge(base, settings.pretrain), start), place, place)


def merge(base: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `differences` laid over it, mapping by mapping; any other value replaces the one below."""
    merged = dict(base)
    for key, value in differences.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted names.

    >>> flatten({"text": {"corner_tokens": 2}, "steps": 5})
    {'text.corner_tokens': 2, 'steps': 5}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_params(path: Path | str = "params.yaml") -> Params:
    """Reads params.yaml.

    Raises:
        ConfigError: the file is missing, is not YAML, or has keys or values that cannot be used.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is not there; run from the project's root, or copy a file of profiles/ to it"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, one per stage")
    return checked_params(data, str(path))


def checked_params(data: Mapping[str, Any], place: str) -> Params:
    """The content of a params.yaml, checked.

    Args:
        data: as read from YAML.
        place: what it is called in complaints.

    Raises:
        ConfigError: keys or values that cannot be used.
    """
    return _validated(Params, data, place)


def _validated(model: type[SectionT], data: Mapping[str, Any], place: str, under: str = "") -> SectionT:
    """`data` as a section that stands at the key `under` of params.yaml."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(model, dict(problem), under)]
        raise ConfigError(f"{place} cannot be used:", problems) from None


def _explain(model: type[Section], problem: dict[str, Any], under: str) -> list[str]:
    """One of pydantic's complaints as lines for a person."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.problems
    keys, known = _place(model, problem["loc"])
    where = ".".join([under, *keys] if under else keys)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return [f"{where}: unknown key{hint} (known here: {', '.join(known)})"]
    if problem["type"] == "missing":
        return [f"{where}: missing; it has no default"]
    if problem["type"] == "union_tag_not_found":
        return [f"{where}.kind: missing; it has no default (there are: {', '.join(known)})"]
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    return [f"{where}: {message}{shown}" if where else message]


def _place(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """Pydantic's location as the keys that lead there in params.yaml, and what is known there.

    Those are the keys beside the last; where it leads to a section of one of several kinds, the kinds.
    """
    kind: Any = model
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        chosen = [option for option in get_args(kind) if part in _tags(option)]
        if chosen:  # a discriminated union adds the chosen kind's tag to the location
            kind = chosen[0]
            continue
        keys.append(str(part))
        known = []
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            known = sorted(kind.model_fields)
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        else:  # a mapping's own keys (a captioner's name) lead to its values, a list's numbers to its items
            kind = next(reversed(get_args(kind)), None)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return keys, [tag for option in get_args(kind) for tag in _tags(option)] or known


def _tags(option: Any) -> tuple[Any, ...]:
    """The kinds that a section of a discriminated union can have."""
    if not (isinstance(option, type) and issubclass(option, BaseModel) and "kind" in option.model_fields):
        return ()
    return get_args(option.model_fields["kind"].annotation)
