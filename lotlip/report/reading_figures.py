"""Figures that show whether models use long texts to the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lotlip.figures.charts import SMALL, Figure, Line, Point, draw_figure, draw_lines, x_values
from lotlip.figures.intervals import estimate
from lotlip.report.figures import colours
from lotlip.report.inputs import ReportInputs
from lotlip.report.results import DIRECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reading_figures(inputs: ReportInputs, benchmark: str) -> list[Figure]:
    """Draws accuracy against the position of a false sentence, and R@1 against the number of sentences of a text.

    Returns no figures if none of the main systems has reading results.
    """
    systems = inputs.systems
    results = {name: a.benchmarks[benchmark].reading for name, a in systems.items() if benchmark in a.benchmarks}
    results = {name: by_seed for name, by_seed in results.items() if by_seed}
    if not results:
        return []
    by_ablation = colours(inputs)
    palette = {name: by_ablation[systems[name].name] for name in results}
    return [_hard_negatives_figure(benchmark, results, palette), _sentences_figure(benchmark, results, palette)]


def _hard_negatives_figure(
    benchmark: str, results: Mapping[str, Mapping[int, dict[str, Any]]], palette: Mapping[str, str]
) -> Figure:
    by_position = {
        name: [reading["hard_negatives"]["by_position"] for reading in by_seed.values()]
        for name, by_seed in results.items()
    }
    lines = [
        Line(name, palette[name], _over_seeds(positions, "position", "accuracy"))
        for name, positions in by_position.items()
    ]
    tokens = [position["tokens_before"] for position in next(iter(by_position.values()))[0]]
    accuracies = "; ".join(
        f"{line.label} {line.points[0].y.value:.1f} % and {line.points[-1].y.value:.1f} %" for line in lines
    )
    name, by_seed = list(results.items())[-1]
    attributes = ", ".join(
        f"{same[0]['attribute']} {100 * statistics.fmean(one['accuracy']['value'] for one in same):.1f} %"
        for same in zip(*(reading["hard_negatives"]["by_attribute"] for reading in by_seed.values()), strict=True)
    )
    slug = f"{benchmark}-hard-negatives"
    ticks = x_values(lines)

    def draw(axes: Axes) -> None:
        draw_lines(axes, lines, ticks, "position of the changed sentence", "accuracy (%)", level=50)

    note = (
        "Hard negatives: one attribute of one small object is changed in the text. Accuracy is the share of images "
        "that are closer to the true text, by the position of that object's sentence among those on small objects. At "
        f"the first position (after {tokens[0]:.0f} word pieces on average) and at the last ({tokens[-1]:.0f}): "
        f"{accuracies}. By the changed attribute, {name}: {attributes}. The dotted line is chance; error bars are "
        f"95 % intervals over {_over(results)}."
    )
    return draw_figure(slug, "Does the model read to the end?", note, SMALL, draw)


def _sentences_figure(
    benchmark: str, results: Mapping[str, Mapping[int, dict[str, Any]]], palette: Mapping[str, str]
) -> Figure:
    lengths = {name: [reading["lengths"] for reading in by_seed.values()] for name, by_seed in results.items()}
    lines = [
        Line("" if dashed else name, palette[name], _over_seeds(by_length, "sentences", direction), dashed)
        for name, by_length in lengths.items()
        for direction, dashed in (("image_to_text", False), ("text_to_image", True))
    ]
    first = next(iter(lengths.values()))[0]
    tokens, images = [length["tokens"] for length in first], first[0]["images"]
    dashed_points = zip(lengths, (line.points for line in lines if line.dashed), strict=True)
    recalls = "; ".join(
        f"{name} {points[0].y.value:.1f} % and {points[-1].y.value:.1f} %" for name, points in dashed_points
    )
    slug = f"{benchmark}-sentences"
    ticks = x_values(lines)

    def draw(axes: Axes) -> None:
        draw_lines(axes, lines, ticks, "sentences per text", "R@1 (%)")

    note = (
        "Long texts truncated after this many sentences; shorter texts are complete. Retrieval is among "
        f"{images:,} images. Solid: {DIRECTIONS['image_to_text']}; dashed: {DIRECTIONS['text_to_image']}. The latter "
        f"with the first sentence only ({tokens[0]:.0f} word pieces on average) and with all sentences "
        f"({tokens[-1]:.0f}): {recalls}. Error bars are 95 % intervals over {_over(results)}."
    )
    return draw_figure(slug, "Long text: R@1 against its length", note, SMALL, draw)


def _over_seeds(readings: Sequence[Sequence[dict[str, Any]]], place: str, share: str) -> list[Point]:
    """Averages a share over seeds at each place, in percent; a single seed has an interval over images.

    Args:
        readings: for each seed, its entries, at the same places for all seeds.
        place: key of an entry's x value.
        share: key of an entry's value and interval.
    """
    points = []
    for same in zip(*readings, strict=True):
        low, high = same[0][share]["interval"]
        points.append(
            Point(same[0][place], estimate([100 * one[share]["value"] for one in same], (100 * low, 100 * high)))
        )
    return points


def _over(results: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    """Names what the intervals are over."""
    several = [len(by_seed) > 1 for by_seed in results.values()]
    if all(several):
        return "seeds"
    return "seeds, or images for a single seed" if any(several) else "images"
