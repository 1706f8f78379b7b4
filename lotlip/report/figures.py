"""The report's figures: scores against a setting, scores and cost against context length, and training loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

from lotlip.core.section import flatten
from lotlip.evaluate.score_names import MAIN, Metric
from lotlip.figures.charts import (
    INK,
    LOW,
    OTHER_COLOURS,
    SMALL,
    SYSTEM_COLOURS,
    WIDE,
    Figure,
    Line,
    Point,
    draw_figure,
    draw_lines,
    label_ends,
    x_values,
)
from lotlip.report.config import SAMPLES, SHORT_SHARE, CostFigureConfig, ScoresFigureConfig, TableConfig
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.measures import MEASURES, NOTE, Measure
from lotlip.report.results import DIRECTIONS, benchmark_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CURVES = 12  # beyond this many, only the main systems' loss curves are labelled and coloured
LINE_COLOURS = (SYSTEM_COLOURS["LoTLIP"], SYSTEM_COLOURS["LiT + long texts"], *OTHER_COLOURS)
_PANELS = {1: SMALL, 2: LOW, 3: LOW}


def colours(inputs: ReportInputs) -> dict[str, str]:
    """Maps each ablation to a colour; the paper's systems have the same colour in every report."""
    chosen = {a.name: SYSTEM_COLOURS[system] for system, a in inputs.systems.items() if system in SYSTEM_COLOURS}
    rest = [ablation.name for ablation in inputs.ablations if ablation.name not in chosen]
    return chosen | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(rest)}


def scores_figure(
    inputs: ReportInputs, benchmark: str, slug: str, table: TableConfig, declared: ScoresFigureConfig
) -> Figure | None:
    """Draws a table's figure, one panel per measure with at least two x values; None if no measure has them.

    Args:
        inputs: the report's inputs.
        benchmark: the benchmark whose scores are drawn.
        slug: name of the table.
        table: the table that the figure belongs to.
        declared: the figure's settings.
    """
    members = declared.lines or {"": list(table.rows)}

    def x(ablation: Ablation) -> float:
        settings = flatten(ablation.config.model_dump(mode="json"))
        settings |= {SAMPLES: inputs.training_images(ablation.config), SHORT_SHARE: ablation.short_share}
        return sum(settings[key] for key in declared.x)

    def lines(measure: Measure) -> list[Line]:
        return [
            Line(label, colour, points, dashed=place % 3 == 1, hollow=place % 3 == 2)
            for place, ((label, names), colour) in enumerate(zip(members.items(), cycle(LINE_COLOURS), strict=False))
            if (points := _points(inputs.chosen(names), benchmark, measure, x))
        ]

    panels = {measure: drawable for measure in MEASURES if len(x_values(drawable := lines(measure))) > 1}
    if not panels:
        return None

    def draw(measure: Measure, axes: Axes) -> None:
        x_label = declared.x_label or " + ".join(declared.x)
        y_label = f"{measure.label} (%)"
        draw_lines(axes, panels[measure], x_values(panels[measure]), x_label, y_label, log=declared.x_scale == "log")

    title = f"Scores against {table.title[:1].lower()}{table.title[1:]}"
    note = f"{NOTE} {_error_bars_note(inputs)}".strip()
    draws = [partial(draw, measure) for measure in panels]
    return draw_figure(f"{benchmark}-{slug}", title, note, _PANELS[len(draws)], *draws, wide=len(draws) > 1)


def _points(
    ablations: Sequence[Ablation], benchmark: str, measure: Measure, x: Callable[[Ablation], float]
) -> list[Point]:
    """A point in percent for each ablation that has the measure."""
    estimates = [(x(ablation), measure.estimate(ablation, benchmark)) for ablation in ablations]
    return [Point(place, estimate) for place, estimate in estimates if estimate]


def _error_bars_note(inputs: ReportInputs) -> str:
    several = any(len(result.seeds) > 1 for a in inputs.scored for result in a.benchmarks.values())
    return f"Error bars: 95 % {'t intervals over seeds' if several else 'bootstrap intervals over images'}."


def context_figures(inputs: ReportInputs) -> list[Figure]:
    """Draws long-text R@1 and the text tower's FLOPs against context length, and R@1 against FLOPs.

    There is one figure per table with a figure of kind `cost` and per benchmark with scores at several context
    lengths. Without any, one figure shows the FLOPs alone, if they are known.
    """
    drawn_figures = []
    for slug, table in inputs.params.tables.items():
        members = inputs.chosen(table.rows) if isinstance(table.figure, CostFigureConfig) else []
        recalls = {}
        for benchmark in benchmark_names(inputs):
            lines = _recall(members, benchmark, lambda a: a.config.text.context_length)
            if len(x_values(lines)) > 1:
                recalls[benchmark] = lines
        counted = [a for a in members if a.flops_per_text]
        for benchmark, lines in recalls.items():
            by_cost = _recall(counted, benchmark, lambda a: (a.flops_per_text or 0) / 1e9)
            where = f" on {benchmark}" if len(recalls) > 1 else ""
            drawn_figures.append(_context_figure(inputs, f"{benchmark}-{slug}", where, lines, by_cost))
    drawn_figures = drawn_figures or [_context_figure(inputs, "context-length", "", [], [])]
    return [figure for figure in drawn_figures if figure]


def _recall(members: Sequence[Ablation], benchmark: str, x: Callable[[Ablation], float]) -> list[Line]:
    """Long-text R@1, one line per direction."""
    directions = {
        DIRECTIONS[metric.direction]: Measure(f"long-{metric.direction}", "long text, R@1", (metric,))
        for metric in MAIN["long"]
    }
    return [
        Line(words, SYSTEM_COLOURS["LoTLIP"], _points(members, benchmark, measure, x), words == "text → image")
        for words, measure in directions.items()
    ]


def _context_figure(
    inputs: ReportInputs, slug: str, where: str, recall: Sequence[Line], by_cost: Sequence[Line]
) -> Figure | None:
    """Draws the panels of recall and of cost that have data; `where` is appended to the title."""
    towers = inputs.towers
    trained = x_values(recall) or sorted({a.config.text.context_length for a in towers})
    # The shared x axis ends shortly after the last recall, or the recall panel would be mostly empty.
    end = 1.5 * max(trained) if recall else math.inf
    costs: dict[float, float] = {
        length: flops / 1e9 for a in towers for length, flops in a.text_tower_flops.items() if length <= end
    }
    lengths = sorted(costs)
    dots = [length for length in trained if length in costs]
    ticks = sorted({*trained, *(length for length in costs if length % 64 == 0)})
    x_label = "context length, tokens"

    def draw_recall(axes: Axes) -> None:
        draw_lines(axes, recall, ticks, x_label, "long text, R@1 (%)")

    def draw_by_cost(axes: Axes) -> None:
        draw_lines(axes, by_cost, None, "GFLOPs per text", "long text, R@1 (%)")

    def draw_cost(axes: Axes) -> None:
        axes.plot(lengths, [costs[length] for length in lengths], color=INK)
        axes.plot(dots, [costs[length] for length in dots], "o", color=SYSTEM_COLOURS["LoTLIP"])
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xlabel(x_label)
        axes.set_ylabel("GFLOPs per text")
        axes.set_ylim(bottom=0)

    panels, notes = {}, []
    if recall:
        panels["recall"] = [draw_recall, *([draw_by_cost] if len(x_values(by_cost)) > 1 else [])]
        notes.append(f"Recall: ablations that differ only in context length. {_error_bars_note(inputs)}")
    if len(lengths) > 1:
        panels["cost"] = [draw_cost]
        notes.append(f"Cost: the text tower of {towers[0].name}, for one text that fills the context.")
        notes += ["A dot marks a length used in training."] if dots else []
    if not panels:
        return None
    title = f"Context length: {' and '.join(panels)}{where}"
    return draw_figure(
        slug, title, " ".join(notes), LOW, *(draw for draws in panels.values() for draw in draws), wide=True
    )


def loss_figure(inputs: ReportInputs) -> Figure | None:
    """Draws the training loss of every ablation that has a history, averaged over its seeds."""
    curves = {a.name: _mean_curve(list(a.history.values())) for a in inputs.ablations if a.history}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    main = {a.name for a in inputs.systems.values()}
    named = set(curves) if len(curves) <= NAMED_CURVES else main & set(curves)
    palette = {name: colour if name in named else INK for name, colour in colours(inputs).items()}

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            steps, losses = zip(*curve, strict=True)
            axes.plot(
                steps,
                losses,
                color=palette[name],
                alpha=1 if name in named else 0.25,
                linewidth=2.0 if name in main else 1.2,
                zorder=3 if name in main else 2,
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.margins(x=0.01)
        label_ends(axes, [(*curve[-1], name, palette[name]) for name, curve in curves.items() if name in named])

    note = (
        "Mean over seeds. Curves are comparable only between ablations whose loss has the same terms: "
        "short captions alone are an easier task than short captions and long texts."
    )
    note += " Thin lines are the other ablations." if len(named) < len(curves) else ""
    return draw_figure("loss", "Training loss", note, WIDE, draw, wide=True)


def run_figures(history: Sequence[dict[str, float]], scores: dict[str, float]) -> dict[str, bytes]:
    """Draws the figures of one training run for its tracker.

    Args:
        history: the run's logged steps.
        scores: metric → fraction, on one benchmark.

    Returns:
        File name → PNG. A figure that cannot be drawn is left out with a warning.
    """
    names = [name for name in Metric if name in scores and name.statistic in ("r1", "r5", "r10")]
    recalls = {name: 100 * scores[name] for name in names}

    def draw_loss(axes: Axes) -> None:
        axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")

    def draw_recall(axes: Axes) -> None:
        axes.barh(list(recalls), list(recalls.values()), color=SYSTEM_COLOURS["LoTLIP"])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("recall (%)")

    figures = [
        draw_figure("loss", "Training loss", "", SMALL, draw_loss),
        draw_figure("recall", "Recall", "", WIDE, draw_recall),
    ]
    return {f"{figure.slug}.png": figure.png for figure in figures if figure.png}


def _mean_curve(histories: Sequence[Sequence[dict[str, float]]]) -> list[tuple[float, float]]:
    """(step, mean loss) at each logged step."""
    losses_at: dict[float, list[float]] = {}
    for history in histories:
        for entry in history:
            losses_at.setdefault(entry["step"], []).append(entry["loss"])
    return [(step, statistics.fmean(losses)) for step, losses in sorted(losses_at.items())]
