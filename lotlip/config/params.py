"""params.yaml: its sections, its ablations, and error messages for an invalid file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from lotlip.caption.config import CaptionConfig
from lotlip.config.moved import moved
from lotlip.core.compute import Compute, TrainingCompute
from lotlip.core.paths import Paths
from lotlip.core.section import ConfigError, Name, Section, SectionT, flatten, merge, nearest
from lotlip.core.stages import STAGES, section
from lotlip.core.variants import Variants, kinds_of
from lotlip.core.yaml import read_yaml
from lotlip.data.models import local_model
from lotlip.evaluate.config import (
    EvaluateConfig,
    HeldOutBenchmarkConfig,
    PublishedBenchmarkConfig,
    SceneBenchmarkConfig,
)
from lotlip.image_tower.config import (
    ImageTowerConfig,
    OpenClipTowerConfig,
    SceneTowerConfig,
    StartTowerConfig,
    TimmTowerConfig,
    TransformersTowerConfig,
)
from lotlip.ingest.config import IngestConfig, SceneSourceConfig, SplitByKey
from lotlip.models.vision.spec import START
from lotlip.pretrain.config import RAW, PretrainConfig
from lotlip.report.config import FindingsConfig, ReportConfig, TableConfig, declaration_problems
from lotlip.shard.config import ShardConfig
from lotlip.tracking.config import RegistryConfig, TrackingConfig


class Reproduce(Section):
    """What `make reproduce` runs; `dvc repro` and `make reproduce-all` always run every ablation."""

    ablations: list[Name] = Field(default_factory=list, description="ablations to run; empty: all")


# The sections that decide models and their scores: one for each stage before the report; `baselines` has none.
DECISIVE_SECTIONS = tuple(section(stage) for stage in STAGES if stage not in ("baselines", "report"))


class FinetuneConfig(Section):
    """An ablation that is fine-tuned from the trained models of another one, each seed from the same seed."""

    init_from: Name = Field(description="the ablation that is trained first")
    pretrain: dict[str, Any] = Field(description="differences from `pretrain`")

    @field_validator("init_from", mode="before")
    @classmethod
    def _a_name(cls, init_from: Any) -> Any:
        # a name without a slash may be both an ablation and a folder, as `lotlip` is
        if isinstance(init_from, str) and "/" in init_from:
            raise ValueError("is a folder; name an ablation, or add an ablation with text.pretrained set to the folder")
        return init_from

    @field_validator("pretrain")
    @classmethod
    def _the_same_text_tower(cls, pretrain: dict[str, Any]) -> dict[str, Any]:
        text = pretrain.get("text")
        if isinstance(text, dict) and text.get("config"):
            raise ValueError("text.config has no effect on a trained text tower; remove it")
        return pretrain


class Params(Section):
    """The whole of params.yaml."""

    paths: Paths = Paths()
    ingest: IngestConfig
    image_tower: ImageTowerConfig = Field(description="source of the pretrained image tower")
    caption: CaptionConfig = CaptionConfig()
    shard: ShardConfig = ShardConfig()
    pretrain: PretrainConfig = PretrainConfig()
    evaluate: EvaluateConfig
    report: ReportConfig = ReportConfig()
    tables: dict[Name, TableConfig] = Field(
        default_factory=dict, description="name → a table of the report; empty: one table of all ablations"
    )
    findings: FindingsConfig = FindingsConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig | None = Field(None, description="null: sweeps register no model")
    compute: Compute = Compute()
    reproduce: Reproduce = Reproduce()
    ablations: dict[Name, dict[str, Any]] = Field(description="name → differences from `pretrain`")
    finetune: dict[Name, FinetuneConfig] = Field(
        default_factory=dict, description="name → an ablation that starts from the models of another one"
    )

    @property
    def names(self) -> list[str]:
        """Names of all ablations; fine-tuned ones come last."""
        return [*self.ablations, *self.finetune]

    @property
    def warnings(self) -> list[str]:
        """Settings that are valid but probably unintended, one per line, for `lotlip plan`, stages and the report."""
        lines = []
        tower = self.image_tower
        if isinstance(tower, SceneTowerConfig) and not isinstance(self.ingest.source, SceneSourceConfig):
            lines.append(
                "image_tower.kind is scenes: that tower is trained only on generated scenes and discriminates other "
                f"pictures poorly, but ingest.source.kind is {self.ingest.source.kind}; use a pretrained tower, such "
                "as image_tower: {kind: packaged}"
            )
        if isinstance(tower, SceneTowerConfig) and isinstance(self.ingest.source, SceneSourceConfig):
            (few, most), (seen_few, seen_most) = self.ingest.source.small_objects, tower.small_objects
            if few < seen_few or most > seen_most:
                lines.append(
                    f"image_tower trains on scenes with {seen_few} to {seen_most} small objects, ingest.source draws "
                    f"{few} to {most}; set the tower's fewest_objects and most_objects so that they include these"
                )
        pin = "is not pinned and may change on the hub; set revision to one of its commits (40 hex digits)"
        if isinstance(tower, TimmTowerConfig) and tower.from_hub and tower.revision is None:
            lines.append(f"image_tower.model {tower.model} {pin}")
        if isinstance(tower, TransformersTowerConfig) and tower.revision is None and self._on_hub(tower.model):
            lines.append(f"image_tower.model {tower.model} {pin}")
        if isinstance(tower, OpenClipTowerConfig) and tower.checkpoint is None:
            lines.append(
                f"image_tower.weights {tower.weights} is not pinned and may change on the hub; open_clip takes no "
                "commit, so name a local file in image_tower.checkpoint to pin it"
            )
        start = self.pretrain.start
        if start and "@" not in start and not start.startswith("open_clip:") and self._on_hub(start):
            lines.append(f"pretrain.start {start} is not pinned and may change on the hub; write {start}@COMMIT")
        configs = {name: self.ablation(name) for name in self.names}
        given = flatten(self.pretrain.model_dump(mode="json", exclude_unset=True))
        lines += [
            f"pretrain.{key} has no effect in any ablation: {reason}"
            for key, reason in self.pretrain.ignored().items()
            if given.get(key) and all(key in config.ignored() for config in configs.values())
        ]
        lines += [line for name, config in configs.items() for line in self._ignored_settings(name, config, True)]
        if cold := [name for name, config in configs.items() if config.optimizer.warmup_steps > config.steps]:
            lines.append(
                f"optimizer.warmup_steps is above steps in {', '.join(cold)}, so that no step has the peak learning "
                "rate; lower it unless this is a trial"
            )
        texts = [config.text for config in configs.values()]
        unpinned = dict.fromkeys(text.pretrained for text in texts if text.pretrained and not text.revision)
        lines += [f"text.pretrained {name} {pin}" for name in unpinned if self._on_hub(name)]
        return lines + [
            f"evaluate.baselines {name} is not pinned and may change on the hub; name a local folder or file to pin it"
            for name in self.evaluate.baselines
            if name != START and local_model(name) is None and self._on_hub(name)
        ]

    def _on_hub(self, name: str) -> bool:
        """Whether a model's name is one on the hub, not a folder, which an ablation may not have written yet."""
        return not Path(name).exists() and self.paths.models not in Path(name).parents and name.count("/") <= 1

    @model_validator(mode="after")
    def _separate_folders(self) -> Params:
        self.paths.check()
        return self

    @model_validator(mode="after")
    def _ablations_resolve(self) -> Params:
        if not self.ablations:
            raise ValueError("ablations is empty: name at least one, such as `lotlip: {}`")
        problems = [
            f"finetune.{name} has the name of an ablation; choose another name"
            for name in self.finetune
            if name in self.ablations
        ]
        known_ablations = f"there are: {', '.join(self.ablations)}"
        problems += [
            f"finetune.{name}.init_from: no ablation {settings.init_from!r} in ablations ({known_ablations}); to start "
            "from a folder, set text.pretrained of an ablation to it"
            for name, settings in self.finetune.items()
            if settings.init_from not in self.ablations
        ]
        problems += [
            f"reproduce.ablations: no ablation {name!r} ({known_ablations})"
            for name in self.reproduce.ablations
            if name not in self.names
        ]
        problems += [
            f"{key}: {path} overlaps with paths.{name}, which a stage replaces; move the data to another folder"
            for key, path in self.inputs()
            if (name := self.paths.overlaps(path))
        ]
        problems += self._split_problems()
        problems += [
            f"compute.{part}.{name}: no such {part[:-1]} ({', '.join(known) or 'none'})"
            for part, known in (("ablations", self.names), ("captioners", list(self.caption.captioners)))
            for name in getattr(self.compute, part)
            if name not in known
        ]
        problems += [
            f"registry requires {metric}, but evaluate has no benchmark with that name (there are: "
            f"{', '.join(self.evaluate.names)})"
            for metric in (self.registry.min_scores if self.registry else [])
            if metric.partition(".")[0] not in self.evaluate.names
        ]
        if bool(self.pretrain.start) != isinstance(self.image_tower, StartTowerConfig):
            problems.append(
                f"pretrain.start is {self.pretrain.start}, but image_tower.kind is {self.image_tower.kind}; a starting "
                "model has both towers, so set image_tower: {kind: start}"
                if self.pretrain.start
                else "image_tower.kind is start, but pretrain.start is null; name the model in pretrain.start"
            )
        resolved = {}
        for name in self.names:
            try:
                config = resolved[name] = self.ablation(name)
                if config.start not in (None, self.pretrain.start):
                    problems.append(
                        f"ablations.{name}.start: all ablations share the image tower of pretrain.start; set "
                        "pretrain.start, and null for ablations that do not start from it"
                    )
                problems += self._caption_problems(name, config) + self._ignored_settings(name, config, False)
                compute = self.training_compute(name)
                compute.check_batch_size(config.batch_size)
                if config.optimizer.name == "lamb" and compute.zero_stage:
                    problems.append(
                        f"ablation {name}: optimizer.name lamb needs the norm of each weight, which ZeRO splits; set "
                        "compute.training.zero_stage to 0"
                    )
                untrained = isinstance(self.image_tower, TimmTowerConfig) and not self.image_tower.pretrained
                if untrained and not config.image_tower.from_scratch:
                    problems.append(
                        f"ablation {name} uses the weights of image_tower, which are random because "
                        "image_tower.pretrained is false; set image_tower.from_scratch of the ablation to true"
                    )
            except ConfigError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(f"ablation {name}: {error}")
        if len(resolved) == len(self.names):
            problems += declaration_problems(self.tables, self.findings, resolved, self.evaluate.splits)
        if problems:
            raise ConfigError("ablations cannot be used:", problems)
        return self

    def inputs(self) -> Iterator[tuple[str, Path]]:
        """The user's files and folders that stages read, each with its key in params.yaml."""
        yield from self.ingest.inputs()
        models = self.paths.models.absolute()
        for key, name in (("start", self.pretrain.start), ("text.pretrained", self.pretrain.text.pretrained)):
            # `text.pretrained` may be an ablation's folder
            if name and (path := local_model(name)) and (key == "start" or models not in path.absolute().parents):
                yield f"pretrain.{key}", path
        for name, captioner in self.caption.captioners.items():
            yield f"caption.captioners.{name}.path", captioner.path
        for name, benchmark in self.evaluate.benchmarks.items():
            if isinstance(benchmark, PublishedBenchmarkConfig):
                yield f"evaluate.benchmarks.{name}.folder", benchmark.folder
                if benchmark.images:
                    yield f"evaluate.benchmarks.{name}.images", benchmark.images
        for name in self.evaluate.baselines:
            path = Path(name) if self.paths.models in Path(name).parents else local_model(name)
            if path and name != START:
                yield "evaluate.baselines", path
        if self.report.stored_results:
            yield "report.stored_results", self.report.stored_results

    def _split_problems(self) -> Iterator[str]:
        """Benchmarks on splits of the data set that have too few images, as far as params.yaml says how many."""
        source = self.ingest.source
        for name, benchmark in self.evaluate.benchmarks.items():
            if not isinstance(benchmark, (SceneBenchmarkConfig, HeldOutBenchmarkConfig)):
                continue
            split, size, place = benchmark.split, benchmark.size, f"evaluate.benchmarks.{name}"
            if isinstance(source, SplitByKey) and not getattr(source, f"{split}_share"):
                yield f"{place} reads the split {split}, which has no images; raise ingest.source.{split}_share"
            scenes = getattr(source, split) if isinstance(source, SceneSourceConfig) else None
            if size and scenes is not None and (size > scenes or (benchmark.kind == "scenes" and size != scenes)):
                yield f"{place}.size is {size}, but ingest.source.{split} is {scenes}; set one to the other's value"

    def _caption_problems(self, name: str, config: PretrainConfig) -> list[str]:
        """Problems with an ablation's use of captioners."""
        short_texts, long_texts = config.short_texts, config.long_texts
        describing, rewriting = self.caption.describing, self.caption.rewriting
        if long_texts.sub_captions and not describing and RAW not in long_texts.captioners:
            return [
                f"ablations.{name} uses long texts, but caption.captioners has no captioner that describes images: "
                f"add one, set long_texts.captioners to [{RAW}] to sample the sentences of the short captions, or set "
                "long_texts.sub_captions to 0"
            ]
        if short_texts.sampler == "raw-or-rewrite" and not rewriting:
            return [
                f"ablations.{name}.short_texts.sampler is raw-or-rewrite, but caption.captioners has no captioner that "
                "rewords short captions: add one, such as kind: rewrite-transformers"
            ]
        if short_texts.sampler not in ("raw", "raw-or-rewrite") and not describing and RAW not in long_texts.captioners:
            return [
                f"ablations.{name}.short_texts.sampler is {short_texts.sampler}, but caption.captioners has no "
                "captioner that describes images: add one, or set the sampler to raw"
            ]
        uses = (
            ("long_texts.captioners", long_texts.captioners, [*describing, RAW], "describe images"),
            ("short_texts.rewriters", short_texts.rewriters, rewriting, "reword short captions"),
        )
        return [
            f"ablations.{name}.{key} has {', '.join(unknown)}, but the captioners that {what} are: "
            f"{', '.join(name for name in known if name != RAW) or 'none'}"
            for key, used, known, what in uses
            if (unknown := sorted(set(used) - set(known)))
        ]

    def _ignored_settings(self, name: str, config: PretrainConfig, by_pretrain: bool) -> list[str]:
        """The settings among an ablation's own differences that have no effect; inherited ones may have none.

        Args:
            name: of the ablation.
            config: its resolved settings.
            by_pretrain: whether those are listed that `pretrain` makes useless, or those that the ablation itself does.
                Only the latter are errors: a sweep may change `pretrain`, and it does not train this ablation.
        """
        tuned = name in self.finetune
        place = f"finetune.{name}.pretrain" if tuned else f"ablations.{name}"
        given = flatten(self.finetune[name].pretrain if tuned else self.ablations[name])
        if not self.pretrain.long_texts.sub_captions:
            given.pop("long_texts.sub_captions", None)  # it adds long texts, whatever the number
        return [
            f"{place}.{key} has no effect: {reason}; remove it"
            for key, reason in config.ignored().items()
            if given.get(key) and (key in self.pretrain.ignored()) is by_pretrain
        ]

    def ablation(self, name: str) -> PretrainConfig:
        """`pretrain` with the differences of one ablation.

        Raises:
            ConfigError: there is no such ablation, or one of its keys or values is invalid.
        """
        base = self.pretrain.model_dump(mode="json", exclude_unset=True)
        if name in self.ablations:
            return _validated(
                PretrainConfig, merge(base, self.ablations[name]), f"ablations.{name}", f"ablations.{name}"
            )
        if name not in self.finetune:
            raise ConfigError(f"no ablation {name!r} in params.yaml; there are: {', '.join(self.names)}")
        settings, place = self.finetune[name], f"finetune.{name}.pretrain"
        text: dict[str, Any] = {"pretrained": (self.paths.models / settings.init_from).as_posix(), "revision": None}
        if base.get("start"):
            text["tokenizer"] = (self.paths.image_tower / START).as_posix()
        changes = {"start": None, "text": text}
        return _validated(PretrainConfig, merge(merge(base, settings.pretrain), changes), place, place)

    def training_compute(self, name: str) -> TrainingCompute:
        """Compute settings of an ablation: `compute.training` with the differences of `compute.ablations`.

        Raises:
            ConfigError: one of its keys or values is invalid.
        """
        base = self.compute.training.model_dump(mode="json", exclude_unset=True)
        place = f"compute.ablations.{name}"
        return _validated(TrainingCompute, merge(base, self.compute.ablations.get(name, {})), place, place)

    def decisive_sections(self) -> dict[str, Any]:
        """The sections that decide models and scores, without baselines, `compute`, tracking, registry and report."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in DECISIVE_SECTIONS}
        del sections["evaluate"]["baselines"]
        return sections


def load_params(path: Path | str = "params.yaml") -> Params:
    """Reads params.yaml.

    Raises:
        ConfigError: the file is missing, is not YAML, or has invalid keys or values.
    """
    path = Path(path)
    try:
        data = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; run from the project's root, or copy a file of profiles/ to it"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, one per stage")
    return checked_params(data, str(path))


def checked_params(data: Mapping[str, Any], place: str) -> Params:
    """Validates the content of a params.yaml.

    Args:
        data: as read from YAML.
        place: name of the file in error messages.

    Raises:
        ConfigError: keys or values are invalid.
    """
    return _validated(Params, data, place)


def _validated(model: type[SectionT], data: Mapping[str, Any], place: str, under: str = "") -> SectionT:
    """Validates `data` as a section at the key `under` of params.yaml."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(model, dict(problem), under)]
        raise ConfigError(f"{place} cannot be used:", problems) from None


def _explain(model: type[Section], problem: dict[str, Any], under: str) -> list[str]:
    """One of pydantic's errors as lines for a person."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.problems
    location = problem["loc"]
    keys, known = _place(model, location[:-1] if location[-1:] == ("[key]",) else location)  # an invalid key itself
    where = ".".join([under, *keys] if under else keys)
    if problem["type"] == "extra_forbidden":
        if new := moved(where):
            return [f"{where}: is now {new}; docs/migration.md lists all renamed keys"]
        return [f"{where}: unknown key{nearest(keys[-1], known)} (known here: {', '.join(known)})"]
    if problem["type"] == "missing":
        return [f"{where}: missing; it has no default"]
    if problem["type"] in ("unknown_kind", "unusable_kind"):
        return [f"{where}.kind: {problem['msg']}"]
    if problem["type"] == "union_tag_not_found":
        return [f"{where}.kind: missing; it has no default (there are: {', '.join(known)})"]
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = f", not {value!r}" if isinstance(value, (str, int, float, bool)) else ""
    return [f"{where}: {message}{shown}" if where else message]


def _place(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """Translates pydantic's location to keys of params.yaml, and lists what is known there.

    Known are the last key's siblings, or, for a section of several kinds, the kinds.
    """
    kind: Any = model
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        section = _section(kind, part)
        if section is not None:  # a discriminated union adds the chosen kind's tag to the location
            kind = section
            continue
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        keys.append(str(part))
        known = []
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            known = sorted(kind.model_fields)
            field = kind.model_fields.get(part)
            kind = Annotated[field.annotation, None, *field.metadata] if field else None
        else:  # a key of a mapping (a captioner's name) leads to its values, an index of a list to its items
            kind = next(reversed(get_args(kind)), None)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return keys, [tag for option in get_args(kind) for tag in kinds_of(option)] or known


def _section(union: Any, kind: Any) -> type[BaseModel] | None:
    """The section of a kind; None if `union` is not a union of sections, or has no such kind."""
    if get_origin(union) is not Annotated:
        return None
    sections, *notes = get_args(union)
    built_in = (option for option in get_args(sections) if kind in kinds_of(option))
    added = (note.section(kind) for note in notes if isinstance(note, Variants) and kind in note.installed_kinds())
    return next(built_in, None) or next(added, None)
