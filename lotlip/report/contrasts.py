"""Differences that test findings, as weights of ablations that are chosen by their roles in `findings`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lotlip.figures.intervals import estimate
from lotlip.report.config import VALIDATION
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.measures import RECALL, Measure

Weights = Mapping[str, float]  # ablation → weight of its measure in the difference


@dataclass(frozen=True)
class Roles:
    """The ablations that have results, by their roles in `findings` of params.yaml.

    Attributes:
        declared: names of benchmarks that test a finding; empty: all that have its measure.
    """

    inputs: ReportInputs
    declared: Sequence[str] = ()

    def one(self, role: str) -> Ablation | None:
        """Returns the single ablation of a role; None if it is not declared or has no results."""
        ablations = self.all(role)
        return ablations[0] if ablations else None

    def all(self, role: str) -> list[Ablation]:
        """Returns the ablations of a role that have results."""
        return self.inputs.chosen(dict(self.inputs.params.findings.roles())[role])

    def steps(self, ablation: Ablation) -> int:
        """Returns the steps that an ablation was trained for, with those of the ablation that it started from."""
        finetuned = self.inputs.params.finetune.get(ablation.name)
        start = next((a for a in self.inputs.ablations if finetuned and a.name == finetuned.init_from), None)
        return ablation.config.steps + (self.steps(start) if start else 0)

    def testing(self, benchmarks: Sequence[str]) -> list[str]:
        """Returns the benchmarks that findings are tested on: all but those of the validation split, unless all are.

        Of these, only those of `declared` if any is among them.
        """
        testing = [name for name in benchmarks if name not in self._validation] or list(benchmarks)
        return [name for name in testing if name in self.declared] or testing

    def unscored(self, ablations: Sequence[Ablation]) -> list[str]:
        """Names the ablations without scores on any of `declared`; empty if it is empty."""
        return [a.name for a in ablations if self.declared and not set(self.declared) & set(a.benchmarks)]

    def choosing(self, benchmarks: Sequence[str]) -> list[str]:
        """Returns the benchmarks that the best ablation is chosen on: a validation split's, else those of the test."""
        return (
            [name for name in benchmarks if name in self._validation] if self._validation else self.testing(benchmarks)
        )

    @property
    def choice(self) -> str:
        """Says on which benchmarks the best ablation is chosen."""
        return f"chosen on {', '.join(self._validation)}" if self._validation else "chosen in hindsight"

    @property
    def _validation(self) -> list[str]:
        settings = self.inputs.params.evaluate.benchmarks
        scored = {name for ablation in self.inputs.scored for name in ablation.benchmarks}
        return [name for name in settings if name in scored and getattr(settings[name], "split", None) == VALIDATION]


Series = Callable[[Roles], Mapping[float, Ablation]]  # value of a setting, such as k → ablation
Contrast = Callable[[Roles, Measure], Weights | None]  # None if a needed ablation was not run


def between(better: str, worse: str) -> Contrast:
    """The ablation of one role minus that of another."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        a, b = roles.one(better), roles.one(worse)
        return {a.name: 1.0, b.name: -1.0} if a and b else None

    return contrast


def fitted_change(series: Series, sign: float = 1.0, up_to_lotlip: bool = False) -> Contrast:
    """The change from the smallest value of a series to the largest, or to LoTLIP's, on the least-squares line."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        by_value = series(roles)
        if up_to_lotlip:
            end = lotlip_value(roles, by_value)
            by_value = {value: ablation for value, ablation in by_value.items() if end is not None and value <= end}
        if len(by_value) < 2:
            return None
        mean = sum(by_value) / len(by_value)
        scale = sign * (max(by_value) - min(by_value)) / sum((value - mean) ** 2 for value in by_value)
        return {ablation.name: scale * (value - mean) for value, ablation in by_value.items()}

    return contrast


def levels_off(series: Series, middle_of: Callable[[Roles, Mapping[float, Ablation]], float | None]) -> Contrast:
    """The gain from the first value to a middle one, minus the gain from there to the last."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        by_value = series(roles)
        if len(by_value) < 3:
            return None
        first, last, middle = min(by_value), max(by_value), middle_of(roles, by_value)
        if middle is None or not first < middle < last:
            return None
        return {by_value[middle].name: 2.0, by_value[first].name: -1.0, by_value[last].name: -1.0}

    return contrast


def first_to_last(series: Series) -> Contrast:
    """The ablation at the largest value minus that at the smallest."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        by_value = series(roles)
        return {by_value[max(by_value)].name: 1.0, by_value[min(by_value)].name: -1.0} if len(by_value) > 1 else None

    return contrast


def corners_over_registers(roles: Roles, measure: Measure) -> Weights | None:
    """Corner tokens minus the same number of registers, averaged over the numbers that both were run with."""
    corners = {m: a.name for m, a in by_corner_tokens(roles).items() if m}
    registers: dict[float, str] = {a.config.text.register_tokens: a.name for a in roles.all("registers")}
    both = sorted(corners.keys() & registers.keys())
    return {name: sign / len(both) for m in both for name, sign in ((corners[m], 1), (registers[m], -1))}


def over_mean_captioner(roles: Roles, measure: Measure) -> Weights | None:
    """LoTLIP with all captioners minus the mean of single captioners."""
    lotlip, single = roles.one("lotlip"), roles.all("captioners")
    if not lotlip or len(single) < 2:
        return None
    return {lotlip.name: 1.0, **{a.name: -1 / len(single) for a in single}}


def over_best_captioner(roles: Roles, measure: Measure) -> Weights | None:
    """LoTLIP with all captioners minus the single captioner that is best in the measure."""
    lotlip, single = roles.one("lotlip"), roles.all("captioners")
    best = _best(roles, single, measure)
    return {lotlip.name: 1.0, best.name: -1.0} if lotlip and best else None


def at_equal_steps(better: str, worse: str) -> Contrast:
    """The ablation of one role minus that of another, if both were trained for the same number of steps in total."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        a, b = roles.one(better), roles.one(worse)
        return {a.name: 1.0, b.name: -1.0} if a and b and roles.steps(a) == roles.steps(b) else None

    return contrast


def best_over_best(better: str, worse: str) -> Contrast:
    """The best ablation of one role minus the best of another, each by the mean of the four recalls."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        a, b = (_best(roles, roles.all(role), RECALL) for role in (better, worse))
        return {a.name: 1.0, b.name: -1.0} if a and b else None

    return contrast


def _best(roles: Roles, ablations: Sequence[Ablation], measure: Measure) -> Ablation | None:
    """The ablation with the highest mean over seeds on `Roles.choosing`; None if there are not two to choose from."""
    benchmarks = roles.choosing(measure.benchmarks(ablations))
    scores = {a.name: list(measure.seeds(a, benchmarks).values()) for a in ablations}
    means = {name: estimate(values).value for name, values in scores.items() if values}
    if len(ablations) < 2 or not means:
        return None
    best = max(means, key=lambda name: means[name])
    return next(a for a in ablations if a.name == best)


def by_corner_tokens(roles: Roles) -> dict[float, Ablation]:
    """Number of corner tokens (m) → ablation."""
    return {a.config.text.corner_tokens: a for a in roles.all("corner_tokens")}


def by_sub_captions(role: str) -> Series:
    """Number of sub-captions (k) → ablation, for one role."""
    return lambda roles: {a.config.long_texts.sub_captions: a for a in roles.all(role)}


def by_context_length(roles: Roles) -> dict[float, Ablation]:
    """Context length in tokens → ablation."""
    return {a.config.text.context_length: a for a in roles.all("context_lengths")}


def lotlip_value(roles: Roles, series: Mapping[float, Ablation]) -> float | None:
    """LoTLIP's value in a series."""
    return next((value for value, ablation in series.items() if ablation is roles.one("lotlip")), None)


def middle_length(roles: Roles, series: Mapping[float, Ablation]) -> float | None:
    """The length closest to the geometric mean of the shortest and the longest."""
    first, *between, last = sorted(series)
    return min(between, key=lambda length: abs(math.log(length**2 / (first * last))), default=None)
