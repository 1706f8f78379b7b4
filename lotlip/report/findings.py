"""The paper's findings, and what this run says of each, by one test that is the same for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lotlip.figures.intervals import LEVEL, Estimate, estimate
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.measures import LONG, NOTE, SHORT, TOP1, Measure
from lotlip.report.tables import Cell, Column, Table, words

SUPPORTS, CONTRADICTS, CANNOT_TELL, NOT_RUN = "supports", "contradicts", "cannot tell", "not run"
VERDICTS = (SUPPORTS, CONTRADICTS, CANNOT_TELL, NOT_RUN)
TEST = (
    "Each finding is written as a difference that is above 0 where it holds. The difference is taken within each seed, "
    "since a seed's ablations see the samples in the same order and, where shapes allow, start from the same weights; "
    "its 95 % t interval is over seeds. Wholly above 0 supports the finding, wholly below 0 contradicts it; else, or "
    "with fewer than two seeds, this run cannot tell. Intervals are over seeds alone: the pictures are the same in all."
)

Weights = Mapping[str, float]  # ablation's name → what its measure counts in the difference


@dataclass(frozen=True)
class Runs:
    """The ablations that have results, by their roles in `findings` of params.yaml."""

    inputs: ReportInputs

    def one(self, role: str) -> Ablation | None:
        """The ablation of a role for one; None where it is not declared or has no results."""
        found = self.all(role)
        return found[0] if found else None

    def all(self, role: str) -> list[Ablation]:
        """The ablations of a role that have results."""
        return self.inputs.chosen(dict(self.inputs.params.findings.roles())[role])


Series = Callable[[Runs], Mapping[float, Ablation]]  # place on an axis, such as k → the ablation there
Pick = Callable[[Runs, Measure], Weights | None]  # None: too little was run


@dataclass(frozen=True)
class Finding:
    """One thing that the paper found.

    Attributes:
        slug: its name in files.
        says: the finding in words.
        where: the paper's tables and figures that show it.
        compares: the difference that is above 0 where it holds.
        measures: in which it is looked at, each on its own.
        pick: the difference as weights of ablations, chosen by their roles.
    """

    slug: str
    says: str
    where: str
    compares: str
    measures: tuple[Measure, ...]
    pick: Pick


@dataclass(frozen=True)
class Judged:
    """What this run says of one finding in one measure.

    Attributes:
        finding, measure: which.
        verdict: one of `VERDICTS`.
        reason: why it cannot be told, or is not run; empty where the interval says it all.
        weights: the ablations compared and what each counts.
        benchmarks: whose mean the measure is.
        by_seed: seed → the difference, in percent points.
        difference: its mean and interval; None where no seed has it.
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
        """Everything, as plain JSON types."""
        found = self.difference
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
            "points": None if found is None else found.value,
            "interval": None if found is None or found.low is None else [found.low, found.high],
        }


# --- judging ------------------------------------------------------------------------------------------------------


def judge_all(inputs: ReportInputs) -> list[Judged]:
    """A verdict on each finding in each of its measures."""
    runs = Runs(inputs)
    return [judge(finding, measure, runs) for finding in FINDINGS for measure in finding.measures]


def judge(finding: Finding, measure: Measure, runs: Runs) -> Judged:
    """The verdict on one finding in one measure, by `TEST`."""
    weights = finding.pick(runs, measure)
    if not weights:
        return Judged(finding, measure, NOT_RUN, f"needs {finding.compares}")
    compared = runs.inputs.chosen(weights)
    benchmarks = measure.benchmarks(compared)
    if not benchmarks:
        return Judged(finding, measure, NOT_RUN, f"no benchmark has {measure.label} for all of them", weights)
    scores = {ablation.name: measure.seeds(ablation, benchmarks) for ablation in compared}
    shared = sorted(set.intersection(*(set(of) for of in scores.values())))
    by_seed = {seed: sum(weight * scores[name][seed] for name, weight in weights.items()) for seed in shared}
    if not by_seed:
        return Judged(finding, measure, CANNOT_TELL, "no seed has a number for all of them", weights, benchmarks)
    found = estimate(list(by_seed.values()))
    if found.low is None or found.high is None:
        reason = f"one seed ({shared[0]}) has no interval; two at least are needed"
        return Judged(finding, measure, CANNOT_TELL, reason, weights, benchmarks, by_seed, found)
    verdict = SUPPORTS if found.low > 0 else CONTRADICTS if found.high < 0 else CANNOT_TELL
    return Judged(finding, measure, verdict, "", weights, benchmarks, by_seed, found)


def note(judged: Sequence[Judged]) -> str:
    """The test in words, and how many tests there were."""
    tests = sum(one.difference is not None and one.difference.low is not None for one in judged)
    if not tests:
        return f"{TEST} {NOTE}"
    return (
        f"{TEST} They are not corrected for their number, {tests}: were all of these differences 0 in truth, "
        f"{(1 - LEVEL) * tests:.1f} would be taken for another by chance. {NOTE}"
    )


def tally(judged: Sequence[Judged]) -> str:
    """How many of each verdict, as one sentence; those that were not run are not counted."""
    count = {verdict: sum(one.verdict == verdict for one in judged) for verdict in VERDICTS}
    run = len(judged) - count[NOT_RUN]
    told = f"Of {run} tests of the paper's findings, this run supports {count[SUPPORTS]} and contradicts "
    told += f"{count[CONTRADICTS]}; it cannot tell for {count[CANNOT_TELL]}"
    return f"{told}. {not_run(judged)}".strip()


def not_run(judged: Sequence[Judged]) -> str:
    """One sentence on the findings that nothing was run for; empty where there are none."""
    missing = [one.finding.slug for one in judged if one.verdict == NOT_RUN]
    if not missing:
        return ""
    names = ", ".join(dict.fromkeys(missing))
    return f"{len(missing)} further tests need ablations or texts that were not run: {names}."


def findings_table(judged: Sequence[Judged]) -> Table:
    """A row for each verdict on what was run."""
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
        for one in judged
        if one.verdict != NOT_RUN
    ]
    return Table("findings", "The paper's findings", note(judged), columns, rows)


def _compared(weights: Weights) -> str:
    """The ablations by name: "a − b" of two that count alike."""
    ordered = sorted(weights, key=lambda name: -weights[name]) if len(weights) == 2 else list(weights)
    return (" − " if list(weights.values()) in ([1.0, -1.0], [-1.0, 1.0]) else ", ").join(ordered)


def points_cell(found: Estimate | None) -> Cell:
    """A difference in percent points with its sign, and its interval."""
    if found is None:
        return words("")
    interval = None if found.low is None or found.high is None else (found.low, found.high)
    span = "" if interval is None else f"[{_signed(interval[0])}, {_signed(interval[1])}]"
    return Cell(_signed(found.value), found.value, found.spread, interval, span)


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


# --- picking ------------------------------------------------------------------------------------------------------


def _between(better: str, worse: str) -> Pick:
    """The ablation of one role against that of another."""

    def pick(runs: Runs, measure: Measure) -> Weights | None:
        ours, theirs = runs.one(better), runs.one(worse)
        return {ours.name: 1.0, theirs.name: -1.0} if ours and theirs else None

    return pick


def _slope(series: Series, sign: float = 1.0, up_to_lotlip: bool = False) -> Pick:
    """Points for each further step, by least squares over all places, or over those up to LoTLIP's own."""

    def pick(runs: Runs, measure: Measure) -> Weights | None:
        found = series(runs)
        if up_to_lotlip:
            end = _own(runs, found)
            found = {place: ablation for place, ablation in found.items() if end is not None and place <= end}
        if len(found) < 2:
            return None
        middle = sum(found) / len(found)
        square = sum((place - middle) ** 2 for place in found)
        return {ablation.name: sign * (place - middle) / square for place, ablation in found.items()}

    return pick


def _levels_off(series: Series, middle_of: Callable[[Runs, Mapping[float, Ablation]], float | None]) -> Pick:
    """The gain from the first place to a middle one, less the gain from there to the last."""

    def pick(runs: Runs, measure: Measure) -> Weights | None:
        found = series(runs)
        if len(found) < 3:
            return None
        first, last, middle = min(found), max(found), middle_of(runs, found)
        if middle is None or not first < middle < last:
            return None
        return {found[middle].name: 2.0, found[first].name: -1.0, found[last].name: -1.0}

    return pick


def _first_to_last(series: Series) -> Pick:
    """The last place against the first."""

    def pick(runs: Runs, measure: Measure) -> Weights | None:
        found = series(runs)
        return {found[max(found)].name: 1.0, found[min(found)].name: -1.0} if len(found) > 1 else None

    return pick


def _registers(runs: Runs, measure: Measure) -> Weights | None:
    """Corner tokens against as many registers, the mean over the numbers that both were run with."""
    corners = {place: a.name for place, a in _by_m(runs).items() if place}
    registers: dict[float, str] = {a.config.text.register_tokens: a.name for a in runs.all("registers")}
    both = sorted(corners.keys() & registers.keys())
    return {name: sign / len(both) for place in both for name, sign in ((corners[place], 1), (registers[place], -1))}


def _captioners(best: bool) -> Pick:
    """LoTLIP, of all captioners, against each alone: against the mean of these, or the best of them over seeds."""

    def pick(runs: Runs, measure: Measure) -> Weights | None:
        every, alone = runs.one("lotlip"), runs.all("captioners")
        if not every or len(alone) < 2:
            return None
        if best:
            benchmarks = measure.benchmarks(alone)
            means = {a.name: estimate(list(of.values())).value for a in alone if (of := measure.seeds(a, benchmarks))}
            return {every.name: 1.0, max(means, key=lambda name: means[name]): -1.0} if means else None
        return {every.name: 1.0, **{a.name: -1 / len(alone) for a in alone}}

    return pick


def _by_m(runs: Runs) -> dict[float, Ablation]:
    """Number of corner tokens → ablation."""
    return {a.config.text.corner_tokens: a for a in runs.all("corner_tokens")}


def _by_k(role: str) -> Series:
    """Number of sub-captions → ablation, of a role."""
    return lambda runs: {a.config.long_texts.sub_captions: a for a in runs.all(role)}


def _by_context(runs: Runs) -> dict[float, Ablation]:
    """Context length in tokens → ablation."""
    return {a.config.text.context_length: a for a in runs.all("context_lengths")}


def _own(runs: Runs, series: Mapping[float, Ablation]) -> float | None:
    """LoTLIP's own place in a series."""
    return next((place for place, ablation in series.items() if ablation is runs.one("lotlip")), None)


def _middle_length(runs: Runs, series: Mapping[float, Ablation]) -> float | None:
    """The length that halves the way from the shortest to the longest in doublings, as nearly as there is one."""
    first, *between, last = sorted(series)
    return min(between, key=lambda place: abs(math.log(place**2 / (first * last))), default=None)


FINDINGS = (
    Finding(
        "long-texts-teach-long",
        "Long texts in training teach the model to understand long text.",
        "Table 2, Fig. 2",
        "(LiT + long texts) − LiT",
        (LONG,),
        _between("lit_long", "lit"),
    ),
    Finding(
        "long-texts-cost-short",
        "Long texts alone cost understanding of short text.",
        "Fig. 2",
        "LiT − (LiT + long texts)",
        (SHORT, TOP1),
        _between("lit", "lit_long"),
    ),
    Finding(
        "more-sub-captions-cost-more",
        "Without corner tokens, the more sub-captions in a long text, the worse short text gets.",
        "Fig. 2",
        "LiT's loss for each further sub-caption, k > 0",
        (SHORT, TOP1),
        _slope(_by_k("lit_by_sub_captions"), sign=-1.0),
    ),
    Finding(
        "corner-tokens-win-short-back",
        "Corner tokens win short text back.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts)",
        (SHORT, TOP1),
        _between("lotlip", "lit_long"),
    ),
    Finding(
        "corner-tokens-keep-long",
        "Corner tokens are no worse on long text, or better.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts)",
        (LONG,),
        _between("lotlip", "lit_long"),
    ),
    Finding(
        "better-than-long-clip",
        "LoTLIP is better than Long-CLIP.",
        "Table 2",
        "LoTLIP − Long-CLIP, which is fine-tuned, so trained twice",
        (LONG, SHORT),
        _between("lotlip", "long_clip"),
    ),
    Finding(
        "mask",
        "The mask, which parts corner tokens from one another and from [CLS], helps.",
        "Table 3",
        "mask on − mask off, at LoTLIP's m",
        (LONG, SHORT),
        _between("lotlip", "no_mask"),
    ),
    Finding(
        "corner-tokens-level-off",
        "More corner tokens do not keep helping.",
        "Table 3",
        "gain from the fewest to LoTLIP's m − gain from there to the most",
        (LONG, SHORT),
        _levels_off(_by_m, _own),
    ),
    Finding(
        "more-sub-captions-help-long",
        "More sub-captions in a long text help long text.",
        "Fig. 5",
        "LoTLIP's gain for each further sub-caption, from k = 1 to its own",
        (LONG,),
        _slope(_by_k("lotlip_by_sub_captions"), up_to_lotlip=True),
    ),
    Finding(
        "sub-captions-level-off",
        "The gain from more sub-captions levels off.",
        "Fig. 5",
        "LoTLIP's gain from the least k > 0 to its own − gain from there to the most",
        (LONG,),
        _levels_off(_by_k("lotlip_by_sub_captions"), _own),
    ),
    Finding(
        "longer-context-helps",
        "A longer context helps long text.",
        "Fig. 4",
        "the longest − the shortest",
        (LONG,),
        _first_to_last(_by_context),
    ),
    Finding(
        "context-levels-off",
        "A longer context helps up to a point.",
        "Fig. 4",
        "gain over the first half of the doublings − gain over the second",
        (LONG,),
        _levels_off(_by_context, _middle_length),
    ),
    Finding(
        "better-than-registers",
        "Corner tokens are worth more than as many register tokens.",
        "Table 7",
        "corner tokens − registers, the mean over equal m",
        (LONG, SHORT),
        _registers,
    ),
    Finding(
        "captioners-beat-mean",
        "Several captioners are better than one of them: than their mean.",
        "Table 9",
        "all captioners − the mean of each alone",
        (LONG, SHORT),
        _captioners(best=False),
    ),
    Finding(
        "captioners-beat-best",
        "Several captioners are better than one of them: than the best, chosen after the fact.",
        "Table 9",
        "all captioners − the best one alone",
        (LONG, SHORT),
        _captioners(best=True),
    ),
)
