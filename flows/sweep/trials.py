"""Settings of a sweep, and the trials of its grid."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from lotlip.config.params import DECISIVE_SECTIONS, Params, checked_params
from lotlip.core.files import sha256_json
from lotlip.core.section import ConfigError, Count, Name, NonNegative, Positive, Section, Seed, merge, nearest
from lotlip.evaluate.records import BenchmarkScores
from lotlip.evaluate.score_names import RECALLS, Metric

AXES = {
    "corner_tokens": "pretrain.text.corner_tokens",
    "corner_mask": "pretrain.text.corner_mask",
    "sub_captions": "pretrain.long_texts.sub_captions",
    "context_lengths": "pretrain.text.context_length",
    "seeds": "pretrain.seeds",
}
PARALLEL_ON_POOL = 32
Value = bool | int | float | str | list[bool | int | float | str] | None


class Sweep(Section):
    """A grid of configurations, each trained and evaluated with each seed; an empty list takes params.yaml's value."""

    name: Name = Field(title="Name", description="MLflow runs have the tag sweep.NAME")
    corner_tokens: list[Annotated[int, Field(ge=0, le=16)]] = Field([], title="Corner tokens", description="m, 0 to 16")
    corner_mask: list[bool] = Field([], title="Mask", description="with or without the attention mask of corner tokens")
    sub_captions: list[NonNegative] = Field([], title="Sub-captions", description="k; 0: short captions only")
    context_lengths: list[Annotated[int, Field(ge=8, le=512)]] = Field(
        [], title="Context lengths", description="tokens per text, 8 to 512"
    )
    seeds: list[Seed] = Field([], title="Seeds", description="one run per seed")
    other: dict[str, list[Value]] = Field(
        {},
        title="Other parameters",
        description='dotted name in params.yaml → values: {"pretrain.optimizer.learning_rate": [0.0005, 0.001]}',
    )
    select_by: str | None = Field(
        None,
        title="Select by",
        description="score that selects the best trial, such as scenes.long.text_to_image.r1; default: mean R@1 on "
        "long and short text of the first benchmark",
    )
    max_runs: Count | None = Field(None, title="Budget in runs", description="maximum number of trials; default: all")
    max_minutes: Positive | None = Field(
        None, title="Budget in minutes", description="time after which no trial starts; default: no limit"
    )
    pool: Name | None = Field(
        None, title="Work pool", description="work pool whose workers run the trials; default: this machine"
    )
    parallelism: Count | None = Field(
        None,
        title="Parallelism",
        description=f"number of parallel trials; default: 1, or {PARALLEL_ON_POOL} on a pool, which has its own limit",
    )
    retries: NonNegative = Field(1, title="Retries", description="retries of a failed trial")

    @model_validator(mode="after")
    def _axes(self) -> Sweep:
        for key, values in self.other.items():
            section, _, rest = key.partition(".")
            if section not in DECISIVE_SECTIONS or not rest:
                raise ValueError(
                    f"other.{key}: a sweep varies only settings that decide results, in {', '.join(DECISIVE_SECTIONS)}"
                )
            if not values:
                raise ValueError(f"other.{key} has no values; list some or remove it")
            for field, dotted in AXES.items():
                if key == dotted:
                    raise ValueError(f"other.{key}: list its values in {field}")
        return self

    @property
    def parallel(self) -> int:
        """The number of parallel trials."""
        return self.parallelism or (PARALLEL_ON_POOL if self.pool else 1)

    @property
    def axes(self) -> dict[str, list[Any]]:
        """Dotted parameter → values, for all parameters with values except seeds."""
        named = {AXES[field]: getattr(self, field) for field in AXES if field != "seeds"}
        return {key: values for key, values in {**named, **self.other}.items() if values}


@dataclass(frozen=True)
class Trial:
    """A configuration and a seed.

    Attributes:
        params: params.yaml with the trial's values, and with `base` alone.
        changes: dotted parameter → value, for the axes of the sweep and the seed.
        base: the ablation without differences from `pretrain`, which the trial trains.
    """

    params: Params
    changes: dict[str, Any]
    base: str

    @property
    def seed(self) -> int:
        """The trial's seed."""
        return self.params.pretrain.seeds[0]

    @property
    def configuration(self) -> dict[str, Any]:
        """The changes without the seed."""
        return {key: value for key, value in self.changes.items() if key != AXES["seeds"]}

    @property
    def overrides(self) -> dict[str, Any]:
        """Dotted parameter → value, for all that differs from params.yaml of the project."""
        return {**alone(self.params, self.base), **self.changes}

    def identity(self) -> dict[str, Any]:
        """All settings that decide its result; equal for equivalent trials."""
        return {**self.params.decisive_sections(), "pretrain": self.params.ablation(self.base).effective()}

    def unwatched_inputs(self) -> list[tuple[str, Path]]:
        """Returns the files and folders that decide its result, but that DVC does not watch, with their keys.

        These are starting models and published benchmarks: dvc.yaml cannot name a path that may be null.
        """
        unwatched = ("pretrain.", "evaluate.benchmarks.")
        return [(key, path) for key, path in self.params.inputs() if key.startswith(unwatched) and path.exists()]

    def unwatched_stages(self) -> set[str]:
        """Returns the names of the stages that read them."""
        return {f"{key.partition('.')[0]}@{self.base}" for key, _ in self.unwatched_inputs()}

    def experiment(self, inputs: Mapping[str, str]) -> str:
        """Returns the name of its DVC experiment, independent of the sweep; it changes with settings, data and code.

        Args:
            inputs: hashes of the data and code that decide its result.
        """
        config = self.params.ablation(self.base)
        text, sampler = config.text, config.long_texts.sampler
        mask = "" if text.corner_mask or not text.corner_tokens else "-no-mask"
        sub_captions = config.effective().get("long_texts.sub_captions", sampler)
        label = f"m{text.corner_tokens}{mask}-k{sub_captions}-c{text.context_length}-s{self.seed}"
        return f"{label}-{sha256_json([self.identity(), dict(inputs)])[:8]}"


def make_grid(sweep: Sweep, params: Params) -> list[Trial]:
    """Returns the trials of the grid, seeds innermost, without equivalent duplicates.

    Args:
        sweep: settings of the sweep.
        params: params.yaml of the project.

    Raises:
        ConfigError: `select_by` is not a score, no ablation equals `pretrain`, or a key or value is invalid; the
            message lists all problems.
    """
    base = base_of(params)
    plain = params.model_dump(mode="json", exclude_unset=True) | alone(params, base)
    axes, seeds = sweep.axes, sweep.seeds or params.pretrain.seeds
    trials: dict[str, Trial] = {}
    problems: list[str] = []
    for values in itertools.product(*axes.values(), [[seed] for seed in seeds]):
        changes = dict(zip([*axes, AXES["seeds"]], values, strict=True))
        try:
            trial = Trial(checked_params(with_changes(plain, changes), "params.yaml"), changes, base)
            selection(sweep, trial.params)
            trials.setdefault(sha256_json(trial.identity()), trial)
        except ConfigError as error:
            problems += [problem for problem in error.problems or [str(error)] if problem not in problems]
    if problems:
        raise ConfigError(f"sweep {sweep.name} is invalid:", problems)
    return list(trials.values())


def alone(params: Params, ablation: str) -> dict[str, Any]:
    """Returns the sections of params.yaml that name ablations, with one ablation, or none.

    Other ablations need not be valid with the values of a sweep, which does not train them.
    """
    sections: dict[str, Any] = {"ablations": {ablation: params.ablations[ablation]}}
    sections |= {"finetune": {}, "reproduce": {}, "tables": {}, "findings": {}}
    compute = params.compute.model_dump(mode="json", exclude_unset=True)
    if "ablations" in compute:
        own = {name: settings for name, settings in compute["ablations"].items() if name == ablation}
        sections["compute"] = {**compute, "ablations": own}
    return sections


def base_of(params: Params) -> str:
    """Returns the name of the ablation without differences from `pretrain`, which a sweep trains.

    Raises:
        ConfigError: there is none.
    """
    for name, differences in params.ablations.items():
        if not differences:
            return name
    raise ConfigError("a sweep needs an ablation that equals `pretrain`; add `lotlip: {}` to ablations")


def selection(sweep: Sweep, params: Params) -> tuple[str, tuple[Metric, ...]]:
    """Returns the benchmark and the scores whose mean selects the best trial; the benchmark may lack some of them.

    Args:
        sweep: settings of the sweep.
        params: params.yaml, whose first benchmark is the default.

    Raises:
        ConfigError: `select_by` is not the name of a score.
    """
    benchmarks = params.evaluate.names
    if sweep.select_by is None:
        return benchmarks[0], RECALLS
    scores = {f"{name}.{metric}": (name, (metric,)) for name in benchmarks for metric in Metric if not metric.is_rank}
    if sweep.select_by not in scores:
        raise ConfigError(
            f"select_by: no score {sweep.select_by!r}{nearest(sweep.select_by, scores)} "
            f"(there are: {', '.join(scores)})"
        )
    return scores[sweep.select_by]


def selection_scores(sweep: Sweep, trial: Trial, results: Mapping[str, BenchmarkScores]) -> dict[str, float]:
    """Returns the scores of a trial that select the best one, name → fraction.

    Args:
        sweep: settings of the sweep.
        trial: the trained trial.
        results: benchmark → results, in any order, since JSON files sort them by name.

    Raises:
        ConfigError: the benchmark has none of these scores.
    """
    benchmark, selecting = selection(sweep, trial.params)
    scores = results[benchmark].seeds[trial.seed]
    selected = {str(name): scores[name] for name in selecting if name in scores}
    if not selected:
        raise ConfigError(
            f"benchmark {benchmark} has no {' or '.join(selecting)} to select the best trial by; set "
            f"select_by to one of its scores, such as {', '.join(f'{benchmark}.{name}' for name in scores)}"
        )
    return selected


def with_changes(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with new values for some dotted parameters."""
    changed = dict(data)
    for dotted, value in changes.items():
        nested: Any = value
        for key in reversed(dotted.split(".")):
            nested = {key: nested}
        changed = merge(changed, nested)
    return changed


def short_name(dotted: str, others: Sequence[str]) -> str:
    """Returns the last part of a dotted parameter, or all of it if another one ends with the same part."""
    last = dotted.rpartition(".")[2]
    return dotted if any(other != dotted and other.rpartition(".")[2] == last for other in others) else last
