"""One figure of all findings: their differences with intervals, for this run's seeds and the stored ones."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lotlip.figures.charts import INK, SYSTEM_COLOURS, Figure, draw_figure
from lotlip.report.findings import FindingResult
from lotlip.report.significance import ALPHA
from lotlip.report.verdicts import RUN, STORED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {RUN: SYSTEM_COLOURS["LoTLIP"], STORED: SYSTEM_COLOURS["LiT + long texts"]}
_MARKERS = {RUN: "o", STORED: "s"}
_WIDTH, _ROW, _MARGIN = 9.4, 0.36, 1.1  # inches
_LINEAR = 3.0  # points up to which the axis is linear
_TICKS = (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100)
_LABEL = 62  # characters of a line of a label


def forest_figure(tested: Sequence[FindingResult], stored: Sequence[FindingResult] = ()) -> Figure | None:
    """Draws the difference of each test with its 95 % and its simultaneous interval; None if no test has any.

    Args:
        tested: results of this run's seeds.
        stored: results of the stored seeds, in the same order; empty if there are none.
    """
    sources = {RUN: tested, **({STORED: stored} if stored else {})}
    rows = [pair for pair in zip(*sources.values(), strict=True) if any(one.difference for one in pair)]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for source, results in zip(sources, zip(*rows, strict=True), strict=True):
            shift = 0.0 if len(sources) == 1 else {RUN: -0.17, STORED: 0.17}[source]
            _draw_source(axes, results, source, shift)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xscale("symlog", linthresh=_LINEAR, linscale=1.0)
        axes.minorticks_off()
        low, high = _limits(rows)
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:+d}".replace("-", "−") if tick else "0" for tick in ticks])
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_label(rows, place) for place in range(len(rows))], fontsize=8)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        for place in range(1, len(rows)):
            if rows[place][0].finding is not rows[place - 1][0].finding:
                axes.axhline(place - 0.5, color=INK, linewidth=0.6, alpha=0.2)
        axes.set_xlabel("difference in points (linear up to ±3); above 0 supports the finding")

    tests = max(one.tests for pair in rows for one in pair)
    note = (
        "Thick: 95 % t interval over seeds, not corrected. Thin: simultaneous interval, at the level "
        f"{ALPHA} divided by the number of tests (Bonferroni); Holm's method decides at least as many tests. An open "
        "marker is a difference without an interval."
    )
    size = (_WIDTH, _MARGIN + _ROW * len(rows))
    return draw_figure("findings", "All differences", note if tests else "", size, draw, wide=True)


def _draw_source(axes: Axes, results: Sequence[FindingResult], source: str, shift: float) -> None:
    """Draws the rows of one set of seeds, moved vertically by `shift`."""
    colour, label = COLOURS[source], source
    for place, one in enumerate(results):
        if one.difference is None:
            continue
        y = place + shift
        for interval, width in ((one.simultaneous_interval, 1.0), (one.interval, 3.2)):
            if interval:
                axes.plot(interval, (y, y), color=colour, linewidth=width, solid_capstyle="butt")
        axes.plot(
            [one.difference.value],
            [y],
            color=colour,
            linestyle="none",
            marker=_MARKERS[source],
            markersize=4.5,
            markerfacecolor=colour if one.interval else "none",
            label=f"{label} ({_seeds(results)})" if label else None,
        )
        label = ""


def _seeds(results: Sequence[FindingResult]) -> str:
    """The number of seeds of the tests, such as "3 seeds" or "2 to 3 seeds"."""
    counts = sorted({len(one.by_seed) for one in results if one.difference})
    return f"{counts[0]} seed{'s' * (counts != [1])}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _limits(rows: Sequence[Sequence[FindingResult]]) -> tuple[float, float]:
    """Limits of the axis: all differences and 95 % intervals, but simultaneous ones only up to ±100 points."""
    ends = [0.0]
    for pair in rows:
        for one in pair:
            if one.difference:
                ends += [one.difference.value, *(one.interval or ())]
                ends += [min(max(end, -100.0), 100.0) for end in one.simultaneous_interval or ()]
    return min(1.15 * min(ends), -_LINEAR), max(1.15 * max(ends), _LINEAR)


def _label(rows: Sequence[Sequence[FindingResult]], place: int) -> str:
    """The measure of a row, after the finding in its first row."""
    one = rows[place][0]
    if place and rows[place - 1][0].finding is one.finding:
        return one.measure.label
    unbroken = one.measure.label.replace(" ", "\u00a0")
    return "\n".join(textwrap.wrap(f"{one.finding.says.removesuffix('.')}: {unbroken}", _LABEL))
