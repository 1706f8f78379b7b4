"""The verdicts on the findings in words and tables, and what could be detected."""

from __future__ import annotations

from collections.abc import Sequence

from lotlip.figures.intervals import Estimate
from lotlip.report.contrasts import Weights
from lotlip.report.findings import (
    CONTRADICTS,
    INCONCLUSIVE,
    NO_GAIN,
    NOT_RUN,
    ONE_SEED,
    SUPPORTS,
    TEST,
    FindingResult,
)
from lotlip.report.measures import NOTE
from lotlip.report.significance import ALPHA, POWER
from lotlip.report.tables import Cell, Column, ReportTable, number, words

RUN, STORED = "This run", "Stored seeds"
_SHOWN_P = 0.001  # smaller p values are shown as below it


def tally(tested: Sequence[FindingResult], stored: Sequence[FindingResult] = ()) -> str:
    """Counts the verdicts with and without correction; findings that were not run are listed separately.

    Args:
        tested: results of this run's seeds.
        stored: results of the stored seeds; empty if there are none.
    """
    sentences = [_counts(tested, "this run supports {supports} and contradicts {contradicts}")]
    if any(one.verdict != NOT_RUN for one in stored):
        verb = "the stored seeds support {supports} and contradict {contradicts}"
        sentences.append(_counts(stored, verb, "one stored seed"))
    return " ".join(filter(None, [*sentences, not_run(tested)]))


def _counts(tested: Sequence[FindingResult], verb: str, one_seed: str = "one seed") -> str:
    def said(verdicts: Sequence[str]) -> str:
        decided = verb.format(supports=verdicts.count(SUPPORTS), contradicts=verdicts.count(CONTRADICTS))
        no_gain, open_ones = verdicts.count(NO_GAIN), verdicts.count(INCONCLUSIVE)
        against = f"; {no_gain} {'shows' if no_gain == 1 else 'show'} no gain" if no_gain else ""
        return f"{decided}{against}; {open_ones} {'is' if open_ones == 1 else 'are'} inconclusive"

    run = [one for one in tested if one.verdict not in (NOT_RUN, ONE_SEED)]
    single = [one for one in tested if one.verdict == ONE_SEED]
    sentences = []
    if run:
        sentences.append(f"Of {_tests(len(run))} of the paper's findings, {said([one.verdict for one in run])}.")
    if any(one.tests for one in run):
        sentences.append(f"With Holm's correction, {said([one.holm_verdict for one in run])}.")
    if single:
        count = _tests(len(single), "further " if run else "")
        have = "has" if len(single) == 1 else "have"
        sentences.append(f"{count} of the paper's findings {have} {one_seed}, which decides nothing.")
    return " ".join(sentences)


def _tests(count: int, which: str = "") -> str:
    return f"{count} {which}{'test' if count == 1 else 'tests'}"


def not_run(tested: Sequence[FindingResult]) -> str:
    """Names the findings that were not tested; empty if all were."""
    missing = [one.finding.slug for one in tested if one.verdict == NOT_RUN]
    if not missing:
        return ""
    names = ", ".join(dict.fromkeys(missing))
    need = "needs" if len(missing) == 1 else "need"
    return f"{_tests(len(missing), 'further ')} {need} ablations or texts that were not run: {names}."


def note(tested: Sequence[FindingResult]) -> str:
    """Describes the test, its benchmarks and the number of tests."""
    tests = max((one.tests for one in tested), default=0)
    named = [one for one in tested if one.benchmarks and not one.apart and one.verdict != NOT_RUN]
    scored = dict.fromkeys((one.measure.label, ", ".join(one.benchmarks)) for one in named)
    benchmarks = f" Benchmarks: {'; '.join(f'{label}: {names}' for label, names in scored)}." if scored else ""
    if any(one.apart for one in tested):
        benchmarks += " Findings to which these are not fair name others (findings.other_benchmarks)."
    chance = (
        f" If all true differences were 0, {ALPHA * tests:.1f} of the {tests} tests would be expected to differ from 0 "
        "by chance without the correction; with it, the probability of any such verdict is at most 5\u00a0%."
    )
    return f"{TEST}{chance if tests else ''} {NOTE}{benchmarks}"


def findings_table(tested: Sequence[FindingResult], stored: Sequence[FindingResult] = ()) -> ReportTable:
    """Returns the verdicts, a row per finding and measure that was tested.

    Args:
        tested: results of this run's seeds.
        stored: results of the stored seeds, in the same order; empty if there are none.
    """
    columns = [
        Column("says", "The paper's finding", numeric=False),
        Column("measure", "Measure", numeric=False),
        *_columns("", RUN),
        *(_columns("stored_", STORED) if stored else []),
        Column("compares", "Difference", numeric=False),
        Column("paper", "Paper", numeric=False),
    ]
    rows = [
        [
            words(one.finding.says),
            words(one.measure.label),
            *_cells(one),
            *(_cells(other) if stored else []),
            Cell(one.compares, span=_compared(one.weights or other.weights)),
            words(one.finding.where),
        ]
        for one, other in zip(tested, stored or tested, strict=True)
        if {one.verdict, other.verdict} != {NOT_RUN}
    ]
    return ReportTable("findings", "The paper's findings", note(tested), columns, rows)


def _columns(prefix: str, group: str) -> list[Column]:
    return [
        Column(f"{prefix}verdict", "Uncorrected", group, numeric=False),
        Column(f"{prefix}verdict_holm", "Holm", group, numeric=False),
        Column(f"{prefix}points", "Points", group),
        Column(f"{prefix}seeds", "Seeds", group),
    ]


def _cells(one: FindingResult) -> list[Cell]:
    return [
        Cell(one.verdict, kind=one.verdict.replace(" ", "-"), span=_p(one.p)),
        Cell(one.holm_verdict, kind=one.holm_verdict.replace(" ", "-"), span=_p(one.p_holm)),
        points_cell(one.difference),
        Cell(str(len(one.by_seed)), len(one.by_seed)),
    ]


def _p(value: float | None) -> str:
    """Formats a p value, such as "p = 0.012"; empty if there is none."""
    if value is None:
        return ""
    return f"p < {_SHOWN_P}" if value < _SHOWN_P else f"p = {value:.2g}"


def power_table(tested: Sequence[FindingResult], stored: Sequence[FindingResult] = ()) -> ReportTable:
    """Returns the smallest difference that each test detects; no rows if no test has two seeds.

    Args:
        tested: results of this run's seeds.
        stored: results of the stored seeds, in the same order; empty if there are none.
    """
    sources = [("", RUN, tested), *([("stored_", STORED, stored)] if stored else [])]
    columns = [Column("says", "The paper's finding", numeric=False), Column("measure", "Measure", numeric=False)]
    for prefix, group, results in sources:
        tests = max((one.tests for one in results), default=0)
        columns += [
            Column(f"{prefix}seeds", "Seeds", group),
            Column(f"{prefix}spread", "Spread", group),
            Column(f"{prefix}detectable", f"Detectable, α = {ALPHA}", group),
            Column(f"{prefix}detectable_corrected", f"α = {ALPHA}/{tests}" if tests else "corrected", group),
        ]
    rows = [
        [
            words(pair[0].finding.says),
            words(pair[0].measure.label),
            *(cell for one in pair for cell in _power_cells(one)),
        ]
        for pair in zip(*(results for _, _, results in sources), strict=True)
        if any(one.tests for one in pair)
    ]
    text = (
        f"Detectable: the smallest true difference, in points, that a test finds with {100 * POWER:.0f} % probability, "
        "given its number of seeds and the observed spread (standard deviation over seeds) of its paired differences. "
        f"The second column is for the level {ALPHA} divided by the number of tests, the strictest level of Holm's "
        "method. An inconclusive test says nothing about smaller differences. A spread over three seeds is itself "
        "uncertain: the true one is, with 95 % probability, between 0.5 and 6.3 times as large."
    )
    return ReportTable("power", "What could be detected", text, columns, rows)


def _power_cells(one: FindingResult) -> list[Cell]:
    spread = one.difference.spread if one.difference else None
    corrected = one.detectable(ALPHA / one.tests) if one.tests else None
    return [
        Cell(str(len(one.by_seed)), len(one.by_seed)),
        *(number(value, "{:.2f}") for value in (spread, one.detectable(ALPHA), corrected)),
    ]


def _compared(weights: Weights) -> str:
    """Names the ablations, as "a − b" for a plain difference."""
    ordered = sorted(weights, key=lambda name: -weights[name]) if len(weights) == 2 else list(weights)
    return (" − " if list(weights.values()) in ([1.0, -1.0], [-1.0, 1.0]) else ", ").join(ordered)


def points_cell(difference: Estimate | None) -> Cell:
    """Formats a difference in percentage points with its sign and interval."""
    if difference is None:
        return words("")
    interval = None if difference.low is None or difference.high is None else (difference.low, difference.high)
    span = "" if interval is None else f"[{signed(interval[0])}, {signed(interval[1])}]"
    return Cell(signed(difference.value), difference.value, difference.spread, interval, span)


def signed(value: float) -> str:
    """Formats a number of points with its sign and one decimal."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
