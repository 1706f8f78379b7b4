"""What a sweep is asked for, and the points of its grid."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from lotlip.config.params import DECISIVE_SECTIONS, Params, checked_params
from lotlip.core.files import sha256_json
from lotlip.core.section import ConfigError, Count, Name, NonNegative, Positive, Section, merge, nearest
from lotlip.evaluate.records import BenchmarkScores
from lotlip.evaluate.score_names import RECALLS, Metric

AXES = {
    "corner_tokens": "pretrain.text.corner_tokens",
    "corner_mask": "pretrain.text.corner_mask",
    "sub_captions": "pretrain.long_texts.sub_captions",
    "context_lengths": "pretrain.text.context_length",
    "seeds": "pretrain.seeds",
}
Value = bool | int | float | str | list[bool | int | float | str]


class Sweep(Section):
    """A grid of configurations, each trained and evaluated with each seed; an empty list: as params.yaml has it."""

    name: Name = Field(title="Name", description="runs in MLflow are found by the tag sweep.NAME")
    corner_tokens: list[Annotated[int, Field(ge=0, le=16)]] = Field([], title="Corner tokens", description="m, 0 to 16")
    corner_mask: list[bool] = Field([], title="Mask", description="corner tokens kept apart, or not")
    sub_captions: list[NonNegative] = Field([], title="Sub-captions", description="k; 0: short captions only")
    context_lengths: list[Annotated[int, Field(ge=8, le=512)]] = Field(
        [], title="Context lengths", description="tokens of a text, 8 to 512"
    )
    seeds: list[NonNegative] = Field([], title="Seeds", description="each is a run of its own")
    other: dict[str, list[Value]] = Field(
        {},
        title="Other parameters",
        description='dotted name in params.yaml → values: {"pretrain.optimizer.learning_rate": [0.0005, 0.001]}',
    )
    select_by: str | None = Field(
        None,
        title="Select by",
        description="score of the best point, such as scenes.long.text_to_image.r1; none: mean R@1 on long and short "
        "text of the first benchmark",
    )
    max_runs: Count | None = Field(None, title="Budget in runs", description="points that may be run; none: all")
    max_minutes: Positive | None = Field(
        None, title="Budget in minutes", description="after which no other point begins; none: no limit"
    )
    parallelism: Count = Field(1, title="Parallelism", description="points at a time")
    retries: NonNegative = Field(1, title="Retries", description="tries after the first, for a point")

    @model_validator(mode="after")
    def _axes(self) -> Sweep:
        for key, values in self.other.items():
            section, _, rest = key.partition(".")
            if section not in DECISIVE_SECTIONS or not rest:
                raise ValueError(
                    f"other.{key}: a sweep varies only settings that decide results, in {', '.join(DECISIVE_SECTIONS)}"
                )
            if not values:
                raise ValueError(f"other.{key} has no values; name some, or leave it out")
            for field, dotted in AXES.items():
                if key == dotted:
                    raise ValueError(f"other.{key}: list its values in {field}")
        return self

    @property
    def axes(self) -> dict[str, list[Any]]:
        """Dotted parameter → its values, of those that the sweep has values for, seeds excepted."""
        named = {AXES[field]: getattr(self, field) for field in AXES if field != "seeds"}
        return {key: values for key, values in {**named, **self.other}.items() if values}


@dataclass(frozen=True)
class Point:
    """A configuration and a seed.

    Attributes:
        params: params.yaml as the point has it.
        changes: dotted parameter → value, what is other than in the project's params.yaml or on an axis of the sweep.
        base: the ablation that is `pretrain` without differences, which is what is trained.
    """

    params: Params
    changes: dict[str, Any]
    base: str

    @property
    def seed(self) -> int:
        """Its only one."""
        return self.params.pretrain.seeds[0]

    @property
    def configuration(self) -> dict[str, Any]:
        """Its changes without the seed: what is compared over seeds."""
        return {key: value for key, value in self.changes.items() if key != AXES["seeds"]}

    def identity(self) -> dict[str, Any]:
        """All settings that decide its result, equal for points that mean the same."""
        return {**self.params.decisive_sections(), "pretrain": self.params.ablation(self.base).effective()}

    def experiment(self, inputs: Mapping[str, str]) -> str:
        """The name of its experiment in DVC: the same, whichever sweep asks for it, and another for other data or code.

        Args:
            inputs: hashes of what decides its result beside settings.
        """
        text, long_texts = self.params.pretrain.text, self.params.pretrain.long_texts
        mask = "" if text.corner_mask or not text.corner_tokens else "-no-mask"
        shown = f"m{text.corner_tokens}{mask}-k{long_texts.sub_captions}-c{text.context_length}-s{self.seed}"
        return f"{shown}-{sha256_json([self.identity(), dict(inputs)])[:8]}"


def points(sweep: Sweep, params: Params) -> list[Point]:
    """The grid, seeds innermost; points that mean the same are one.

    Args:
        sweep: what is asked for.
        params: the project's params.yaml.

    Raises:
        ConfigError: `select_by` is no score, no ablation is `pretrain` as it is, or a key or value is wrong; the
            message has all of them.
    """
    base = next((name for name, differences in params.ablations.items() if not differences), None)
    if base is None:
        raise ConfigError("a sweep trains `pretrain` as it is, which no ablation is; add `lotlip: {}` to ablations")
    plain = params.model_dump(mode="json", exclude_unset=True)
    axes, seeds = sweep.axes, sweep.seeds or params.pretrain.seeds
    found: dict[str, Point] = {}
    problems: list[str] = []
    for values in itertools.product(*axes.values(), [[seed] for seed in seeds]):
        changes = dict(zip([*axes, AXES["seeds"]], values, strict=True))
        try:
            point = Point(checked_params(with_changes(plain, changes), "params.yaml"), changes, base)
            selection(sweep, point.params)
            found.setdefault(sha256_json(point.identity()), point)
        except ConfigError as error:
            problems += [problem for problem in error.problems or [str(error)] if problem not in problems]
    if problems:
        raise ConfigError(f"sweep {sweep.name} cannot be run:", problems)
    return list(found.values())


def selection(sweep: Sweep, params: Params) -> tuple[str, tuple[Metric, ...]]:
    """The benchmark and its scores whose mean selects the best point; the benchmark may lack some of several.

    Args:
        sweep: what is asked for.
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


def selecting_scores(sweep: Sweep, point: Point, results: Mapping[str, BenchmarkScores]) -> dict[str, float]:
    """Score → share, of those that select the best point.

    Args:
        sweep: what is asked for.
        point: that was trained.
        results: benchmark → what was measured; in any order, since JSON files sort them by name.

    Raises:
        ConfigError: the benchmark has none of these scores.
    """
    benchmark, selecting = selection(sweep, point.params)
    scores = results[benchmark].seeds[point.seed]
    found = {str(name): scores[name] for name in selecting if name in scores}
    if not found:
        raise ConfigError(
            f"benchmark {benchmark} has no {' or '.join(selecting)}, by which the sweep selects the best point; set "
            f"select_by to a score that it has, such as {', '.join(f'{benchmark}.{name}' for name in scores)}"
        )
    return found


def with_changes(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values for some dotted parameters."""
    changed = dict(data)
    for dotted, value in changes.items():
        nested: Any = value
        for key in reversed(dotted.split(".")):
            nested = {key: nested}
        changed = merge(changed, nested)
    return changed


def short(dotted: str, others: Sequence[str]) -> str:
    """The last word of a dotted parameter, or all of it where another ends with the same word."""
    last = dotted.rpartition(".")[2]
    return dotted if any(other != dotted and other.rpartition(".")[2] == last for other in others) else last
