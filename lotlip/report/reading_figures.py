"""Figures on whether models read long texts to their end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lotlip.figures.charts import SMALL, Figure, Line, Point, draw_lines, drawn, places
from lotlip.figures.intervals import estimate
from lotlip.report.figures import colours
from lotlip.report.inputs import ReportInputs
from lotlip.report.results import DIRECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reading_figures(inputs: ReportInputs, benchmark: str) -> list[Figure]:
    """Whether the systems read to the end: accuracy against one false sentence by where it stands, and R@1 against the
    sentences that a text has; none where nobody was asked.
    """
    systems = inputs.systems
    found = {name: a.benchmarks[benchmark].reading for name, a in systems.items() if benchmark in a.benchmarks}
    found = {name: readings for name, readings in found.items() if readings}
    if not found:
        return []
    of_ablation = colours(inputs)
    palette = {name: of_ablation[systems[name].name] for name in found}
    return [_against_hard_negatives(benchmark, found, palette), _against_sentences(benchmark, found, palette)]


def _against_hard_negatives(
    benchmark: str, found: Mapping[str, Mapping[int, dict[str, Any]]], palette: Mapping[str, str]
) -> Figure:
    answers = {
        name: [reading["hard_negatives"]["by_position"] for reading in readings.values()]
        for name, readings in found.items()
    }
    lines = [
        Line(name, palette[name], _over_seeds(positions, "position", "accuracy")) for name, positions in answers.items()
    ]
    tokens = [position["tokens_before"] for position in next(iter(answers.values()))[0]]
    told = "; ".join(
        f"{line.label} {line.points[0].y.value:.1f} % and {line.points[-1].y.value:.1f} %" for line in lines
    )
    name, readings = list(found.items())[-1]
    attributes = ", ".join(
        f"{same[0]['attribute']} {100 * statistics.fmean(one['accuracy']['value'] for one in same):.1f} %"
        for same in zip(*(reading["hard_negatives"]["by_attribute"] for reading in readings.values()), strict=True)
    )
    slug = f"{benchmark}-hard-negatives"
    ticks = places(lines)

    def draw(axes: Axes) -> None:
        draw_lines(axes, lines, ticks, "place of the changed sentence", "accuracy (%)", level=50)

    note = (
        "One attribute of one small object is told wrong: the share of pictures that are nearer to the true text, by "
        "where that object's sentence stands among those on small objects. In the first place (on average "
        f"{tokens[0]:.0f} word pieces stand before it) and in the last ({tokens[-1]:.0f}): {told}. By what is wrong, "
        f"{name}: {attributes}. The dotted line is guessing; bars are 95 % intervals over "
        f"{_over(found)}."
    )
    return drawn(slug, "Does the model read to the end?", note, SMALL, draw)


def _against_sentences(
    benchmark: str, found: Mapping[str, Mapping[int, dict[str, Any]]], palette: Mapping[str, str]
) -> Figure:
    lengths = {name: [reading["lengths"] for reading in readings.values()] for name, readings in found.items()}
    lines = [
        Line("" if dashed else name, palette[name], _over_seeds(of, "sentences", way), dashed)
        for name, of in lengths.items()
        for way, dashed in (("image_to_text", False), ("text_to_image", True))
    ]
    tokens = [length["tokens"] for length in next(iter(lengths.values()))[0]]
    dashed_points = zip(lengths, (line.points for line in lines if line.dashed), strict=True)
    told = "; ".join(
        f"{name} {points[0].y.value:.1f} % and {points[-1].y.value:.1f} %" for name, points in dashed_points
    )
    slug = f"{benchmark}-sentences"
    ticks = places(lines)

    def draw(axes: Axes) -> None:
        draw_lines(axes, lines, ticks, "sentences of the text", "R@1 (%)")

    note = (
        f"Long texts that end after so many sentences; shorter ones are whole. Solid: {DIRECTIONS['image_to_text']}; "
        f"dashed: {DIRECTIONS['text_to_image']}, which is, after the first sentence (on average {tokens[0]:.0f} word "
        f"pieces) and with all ({tokens[-1]:.0f}): {told}. Bars are 95 % intervals "
        f"over {_over(found)}."
    )
    return drawn(slug, "Long text: R@1 against its length", note, SMALL, draw)


def _over_seeds(readings: Sequence[Sequence[dict[str, Any]]], place: str, share: str) -> list[Point]:
    """The share in percent at each place, of lists with the same places; of one seed, its interval over pictures."""
    points = []
    for same in zip(*readings, strict=True):
        low, high = same[0][share]["interval"]
        found = estimate([100 * one[share]["value"] for one in same], (100 * low, 100 * high))
        points.append(Point(same[0][place], found))
    return points


def _over(found: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    """What the intervals are over."""
    several = [len(readings) > 1 for readings in found.values()]
    if all(several):
        return "seeds"
    return "seeds, or pictures where there is one seed" if any(several) else "pictures"
