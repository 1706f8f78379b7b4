"""The paper's findings, and the verdict of this run on each, by the same statistical test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lotlip.figures.intervals import LEVEL, Estimate, estimate
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.measures import LONG, NOTE, SHORT, TOP1, Measure
from lotlip.report.tables import Cell, Column, ReportTable, words

SUPPORTS, CONTRADICTS, INCONCLUSIVE, NOT_RUN = "supports", "contradicts", "inconclusive", "not run"
VERDICTS = (SUPPORTS, CONTRADICTS, INCONCLUSIVE, NOT_RUN)
TEST = (
    "Each finding is stated as a difference that is above 0 when the finding holds. The difference is taken within "
    "each seed, because the ablations of one seed see the samples in the same order and, where shapes allow, start "
    "from the same weights. Its 95 % t interval is over seeds. An interval above 0 supports the finding, and one below "
    "0 contradicts it. An interval that contains 0, or fewer than two seeds, is inconclusive. All seeds are evaluated "
    "on the same images, so the intervals do not include the variation between images."
)

Weights = Mapping[str, float]  # ablation → weight of its measure in the difference


@dataclass(frozen=True)
class Roles:
    """The ablations that have results, by their roles in `findings` of params.yaml."""

    inputs: ReportInputs

    def one(self, role: str) -> Ablation | None:
        """Returns the single ablation of a role; None if it is not declared or has no results."""
        ablations = self.all(role)
        return ablations[0] if ablations else None

    def all(self, role: str) -> list[Ablation]:
        """Returns the ablations of a role that have results."""
        return self.inputs.chosen(dict(self.inputs.params.findings.roles())[role])


Series = Callable[[Roles], Mapping[float, Ablation]]  # value of a setting, such as k → ablation
Contrast = Callable[[Roles, Measure], Weights | None]  # None if a needed ablation was not run


@dataclass(frozen=True)
class Finding:
    """A finding of the paper.

    Attributes:
        slug: name in files.
        says: the finding in words.
        where: tables and figures of the paper that show it.
        compares: the difference, in words, that is above 0 when the finding holds.
        measures: measures that the finding is tested in, separately.
        contrast: the difference as weights of ablations.
    """

    slug: str
    says: str
    where: str
    compares: str
    measures: tuple[Measure, ...]
    contrast: Contrast


@dataclass(frozen=True)
class FindingResult:
    """The result of testing one finding in one measure.

    Attributes:
        finding, measure: what was tested.
        verdict: one of `VERDICTS`.
        reason: why the test is inconclusive or was not run; empty if the interval decides.
        weights: the ablations compared and their weights.
        benchmarks: benchmarks that the measure is averaged over.
        by_seed: seed → the difference, in percentage points.
        difference: its mean and interval; None if no seed has it.
    """

    finding: Finding
    measure: Measure
    verdict: str
    reason: str = ""
    weights: Weights = field(default_factory=dict)
    benchmarks: Sequence[str] = ()
    by_seed: Mapping[int, float] = field(default_factory=dict)
    difference: Estimate | None = None

    def as_json(self) -> dict[str, Any]:
        """Converts the result to JSON types."""
        difference = self.difference
        return {
            "finding": self.finding.slug,
            "says": self.finding.says,
            "paper": self.finding.where,
            "measure": self.measure.slug,
            "compares": self.finding.compares,
            "verdict": self.verdict,
            "reason": self.reason,
            "ablations": dict(self.weights),
            "benchmarks": list(self.benchmarks),
            "points_by_seed": {str(seed): points for seed, points in self.by_seed.items()},
            "points": None if difference is None else difference.value,
            "interval": None if difference is None or difference.low is None else [difference.low, difference.high],
        }


# --- tests --------------------------------------------------------------------------------------------------------


def evaluate_findings(inputs: ReportInputs) -> list[FindingResult]:
    """Tests each finding in each of its measures."""
    roles = Roles(inputs)
    return [evaluate_finding(finding, measure, roles) for finding in FINDINGS for measure in finding.measures]


def evaluate_finding(finding: Finding, measure: Measure, roles: Roles) -> FindingResult:
    """Tests one finding in one measure, as `TEST` describes."""
    weights = finding.contrast(roles, measure)
    if not weights:
        return FindingResult(finding, measure, NOT_RUN, f"needs {finding.compares}")
    compared = roles.inputs.chosen(weights)
    benchmarks = measure.benchmarks(compared)
    if not benchmarks:
        reason = f"no benchmark has {measure.label} for all compared ablations"
        return FindingResult(finding, measure, NOT_RUN, reason, weights)
    scores = {ablation.name: measure.seeds(ablation, benchmarks) for ablation in compared}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in scores.values())))
    by_seed = {seed: sum(weight * scores[name][seed] for name, weight in weights.items()) for seed in shared}
    if not by_seed:
        reason = "no seed has scores for all compared ablations"
        return FindingResult(finding, measure, INCONCLUSIVE, reason, weights, benchmarks)
    difference = estimate(list(by_seed.values()))
    if difference.low is None or difference.high is None:
        reason = f"one seed ({shared[0]}) has no interval; at least two are needed"
        return FindingResult(finding, measure, INCONCLUSIVE, reason, weights, benchmarks, by_seed, difference)
    verdict = SUPPORTS if difference.low > 0 else CONTRADICTS if difference.high < 0 else INCONCLUSIVE
    return FindingResult(finding, measure, verdict, "", weights, benchmarks, by_seed, difference)


def note(tested: Sequence[FindingResult]) -> str:
    """Describes the test and the number of tests."""
    tests = sum(one.difference is not None and one.difference.low is not None for one in tested)
    if not tests:
        return f"{TEST} {NOTE}"
    return (
        f"{TEST} The {tests} tests are not corrected for multiple comparisons: if all true differences were 0, "
        f"{(1 - LEVEL) * tests:.1f} would be expected to differ from 0 by chance. {NOTE}"
    )


def tally(tested: Sequence[FindingResult]) -> str:
    """Counts the verdicts in one sentence; findings that were not run are listed separately."""
    count = {verdict: sum(one.verdict == verdict for one in tested) for verdict in VERDICTS}
    run = len(tested) - count[NOT_RUN]
    text = f"Of {run} tests of the paper's findings, this run supports {count[SUPPORTS]} and contradicts "
    text += f"{count[CONTRADICTS]}; {count[INCONCLUSIVE]} are inconclusive"
    return f"{text}. {not_run(tested)}".strip()


def not_run(tested: Sequence[FindingResult]) -> str:
    """Names the findings that were not tested; empty if all were."""
    missing = [one.finding.slug for one in tested if one.verdict == NOT_RUN]
    if not missing:
        return ""
    names = ", ".join(dict.fromkeys(missing))
    return f"{len(missing)} further tests need ablations or texts that were not run: {names}."


def findings_table(tested: Sequence[FindingResult]) -> ReportTable:
    """Returns the verdicts, a row per finding and measure that was tested."""
    columns = [
        Column("verdict", "This run", numeric=False),
        Column("says", "The paper's finding", numeric=False),
        Column("paper", "Paper", numeric=False),
        Column("measure", "Measure", numeric=False),
        Column("compares", "Difference", numeric=False),
        Column("points", "Points"),
        Column("seeds", "Seeds"),
    ]
    rows = [
        [
            Cell(one.verdict, kind=one.verdict.replace(" ", "-")),
            words(one.finding.says),
            words(one.finding.where),
            words(one.measure.label),
            Cell(one.finding.compares, span=_compared(one.weights)),
            points_cell(one.difference),
            Cell(str(len(one.by_seed)), len(one.by_seed)),
        ]
        for one in tested
        if one.verdict != NOT_RUN
    ]
    return ReportTable("findings", "The paper's findings", note(tested), columns, rows)


def _compared(weights: Weights) -> str:
    """Names the ablations, as "a − b" for a plain difference."""
    ordered = sorted(weights, key=lambda name: -weights[name]) if len(weights) == 2 else list(weights)
    return (" − " if list(weights.values()) in ([1.0, -1.0], [-1.0, 1.0]) else ", ").join(ordered)


def points_cell(difference: Estimate | None) -> Cell:
    """Formats a difference in percentage points with its sign and interval."""
    if difference is None:
        return words("")
    interval = None if difference.low is None or difference.high is None else (difference.low, difference.high)
    span = "" if interval is None else f"[{_signed(interval[0])}, {_signed(interval[1])}]"
    return Cell(_signed(difference.value), difference.value, difference.spread, interval, span)


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


# --- contrasts ----------------------------------------------------------------------------------------------------


def _between(better: str, worse: str) -> Contrast:
    """The ablation of one role minus that of another."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        a, b = roles.one(better), roles.one(worse)
        return {a.name: 1.0, b.name: -1.0} if a and b else None

    return contrast


def _slope(series: Series, sign: float = 1.0, up_to_lotlip: bool = False) -> Contrast:
    """The least-squares slope over a series, or over its values up to LoTLIP's."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        by_value = series(roles)
        if up_to_lotlip:
            end = _lotlip_value(roles, by_value)
            by_value = {value: ablation for value, ablation in by_value.items() if end is not None and value <= end}
        if len(by_value) < 2:
            return None
        mean = sum(by_value) / len(by_value)
        square = sum((value - mean) ** 2 for value in by_value)
        return {ablation.name: sign * (value - mean) / square for value, ablation in by_value.items()}

    return contrast


def _levels_off(series: Series, middle_of: Callable[[Roles, Mapping[float, Ablation]], float | None]) -> Contrast:
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


def _first_to_last(series: Series) -> Contrast:
    """The ablation at the largest value minus that at the smallest."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        by_value = series(roles)
        return {by_value[max(by_value)].name: 1.0, by_value[min(by_value)].name: -1.0} if len(by_value) > 1 else None

    return contrast


def _registers(roles: Roles, measure: Measure) -> Weights | None:
    """Corner tokens minus the same number of registers, averaged over the numbers that both were run with."""
    corners = {m: a.name for m, a in _by_corner_tokens(roles).items() if m}
    registers: dict[float, str] = {a.config.text.register_tokens: a.name for a in roles.all("registers")}
    both = sorted(corners.keys() & registers.keys())
    return {name: sign / len(both) for m in both for name, sign in ((corners[m], 1), (registers[m], -1))}


def _captioners(best: bool) -> Contrast:
    """LoTLIP with all captioners minus the mean of single captioners, or minus the best of them."""

    def contrast(roles: Roles, measure: Measure) -> Weights | None:
        lotlip, single = roles.one("lotlip"), roles.all("captioners")
        if not lotlip or len(single) < 2:
            return None
        if best:
            benchmarks = measure.benchmarks(single)
            scores = {a.name: measure.seeds(a, benchmarks) for a in single}
            means = {name: estimate(list(by_seed.values())).value for name, by_seed in scores.items() if by_seed}
            return {lotlip.name: 1.0, max(means, key=lambda name: means[name]): -1.0} if means else None
        return {lotlip.name: 1.0, **{a.name: -1 / len(single) for a in single}}

    return contrast


def _by_corner_tokens(roles: Roles) -> dict[float, Ablation]:
    """Number of corner tokens (m) → ablation."""
    return {a.config.text.corner_tokens: a for a in roles.all("corner_tokens")}


def _by_sub_captions(role: str) -> Series:
    """Number of sub-captions (k) → ablation, for one role."""
    return lambda roles: {a.config.long_texts.sub_captions: a for a in roles.all(role)}


def _by_context_length(roles: Roles) -> dict[float, Ablation]:
    """Context length in tokens → ablation."""
    return {a.config.text.context_length: a for a in roles.all("context_lengths")}


def _lotlip_value(roles: Roles, series: Mapping[float, Ablation]) -> float | None:
    """LoTLIP's value in a series."""
    return next((value for value, ablation in series.items() if ablation is roles.one("lotlip")), None)


def _middle_length(roles: Roles, series: Mapping[float, Ablation]) -> float | None:
    """The length closest to the geometric mean of the shortest and the longest."""
    first, *between, last = sorted(series)
    return min(between, key=lambda length: abs(math.log(length**2 / (first * last))), default=None)


FINDINGS = (
    Finding(
        "long-texts-teach-long",
        "Training on long texts improves long-text understanding.",
        "Table 2, Fig. 2",
        "(LiT + long texts) − LiT",
        (LONG,),
        _between("lit_long", "lit"),
    ),
    Finding(
        "long-texts-cost-short",
        "Training on long texts without corner tokens harms short-text understanding.",
        "Fig. 2",
        "LiT − (LiT + long texts)",
        (SHORT, TOP1),
        _between("lit", "lit_long"),
    ),
    Finding(
        "more-sub-captions-cost-more",
        "Without corner tokens, more sub-captions per long text harm short-text understanding further.",
        "Fig. 2",
        "drop of LiT + long texts per further sub-caption, k > 0",
        (SHORT, TOP1),
        _slope(_by_sub_captions("lit_by_sub_captions"), sign=-1.0),
    ),
    Finding(
        "corner-tokens-win-short-back",
        "Corner tokens restore short-text understanding.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts)",
        (SHORT, TOP1),
        _between("lotlip", "lit_long"),
    ),
    Finding(
        "corner-tokens-keep-long",
        "Corner tokens preserve or improve long-text understanding.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts)",
        (LONG,),
        _between("lotlip", "lit_long"),
    ),
    Finding(
        "better-than-long-clip",
        "LoTLIP outperforms Long-CLIP.",
        "Table 2",
        "LoTLIP − Long-CLIP, which is finetuned and so trained for longer",
        (LONG, SHORT),
        _between("lotlip", "long_clip"),
    ),
    Finding(
        "mask",
        "The attention mask between corner tokens, and between them and [CLS], helps.",
        "Table 3",
        "LoTLIP with the mask − without it",
        (LONG, SHORT),
        _between("lotlip", "no_mask"),
    ),
    Finding(
        "corner-tokens-level-off",
        "The gain from more corner tokens levels off.",
        "Table 3",
        "gain from the smallest m to LoTLIP's − gain from there to the largest",
        (LONG, SHORT),
        _levels_off(_by_corner_tokens, _lotlip_value),
    ),
    Finding(
        "more-sub-captions-help-long",
        "More sub-captions per long text improve long-text understanding.",
        "Fig. 5",
        "gain per further sub-caption, up to LoTLIP's k",
        (LONG,),
        _slope(_by_sub_captions("lotlip_by_sub_captions"), up_to_lotlip=True),
    ),
    Finding(
        "sub-captions-level-off",
        "The gain from more sub-captions levels off.",
        "Fig. 5",
        "gain from the smallest k > 0 to LoTLIP's − gain from there to the largest",
        (LONG,),
        _levels_off(_by_sub_captions("lotlip_by_sub_captions"), _lotlip_value),
    ),
    Finding(
        "longer-context-helps",
        "A longer context improves long-text understanding.",
        "Fig. 4",
        "longest context − shortest context",
        (LONG,),
        _first_to_last(_by_context_length),
    ),
    Finding(
        "context-levels-off",
        "The gain from a longer context levels off.",
        "Fig. 4",
        "gain from the shortest context to the (geometric) middle − gain from there to the longest",
        (LONG,),
        _levels_off(_by_context_length, _middle_length),
    ),
    Finding(
        "better-than-registers",
        "Corner tokens outperform the same number of register tokens.",
        "Table 7",
        "corner tokens − registers, mean over equal numbers of tokens",
        (LONG, SHORT),
        _registers,
    ),
    Finding(
        "captioners-beat-mean",
        "Several captioners outperform the average single captioner.",
        "Table 9",
        "all captioners − mean of single captioners",
        (LONG, SHORT),
        _captioners(best=False),
    ),
    Finding(
        "captioners-beat-best",
        "Several captioners outperform the best single captioner, chosen in hindsight.",
        "Table 9",
        "all captioners − best single captioner",
        (LONG, SHORT),
        _captioners(best=True),
    ),
)
