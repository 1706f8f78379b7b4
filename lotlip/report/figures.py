"""The report's figures of scores: against sub-captions, corner tokens and context length, and the loss."""

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
    draw_lines,
    drawn,
    label_ends,
    places,
)
from lotlip.report.config import CostFigureConfig, ScoresFigureConfig, TableConfig
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.measures import MEASURES, NOTE, Measure
from lotlip.report.results import DIRECTIONS, benchmark_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CURVES = 12  # with more of them, only the systems' loss curves have a name and a colour
LINE_COLOURS = (SYSTEM_COLOURS["LoTLIP"], SYSTEM_COLOURS["LiT + long texts"], *OTHER_COLOURS)
_PANELS = {1: SMALL, 2: LOW, 3: LOW}


def colours(inputs: ReportInputs) -> dict[str, str]:
    """Ablation → colour of its curve; the paper's systems have theirs in every report."""
    chosen = {a.name: SYSTEM_COLOURS[system] for system, a in inputs.systems.items() if system in SYSTEM_COLOURS}
    rest = [ablation.name for ablation in inputs.ablations if ablation.name not in chosen]
    return chosen | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(rest)}


def scores_figure(
    inputs: ReportInputs, benchmark: str, slug: str, table: TableConfig, declared: ScoresFigureConfig
) -> Figure | None:
    """The figure of a table, a panel for each measure that has several places on the x axis; None where none has.

    Args:
        inputs: what the report shows.
        benchmark: whose scores are drawn.
        slug: name of the table.
        table: that the figure belongs to.
        declared: the figure.
    """
    members = declared.lines or {"": list(table.rows)}

    def x(ablation: Ablation) -> float:
        settings = flatten(ablation.config.model_dump(mode="json"))
        return sum(settings[key] for key in declared.x)

    def lines(measure: Measure) -> list[Line]:
        return [
            Line(label, colour, points, dashed=place % 3 == 1, hollow=place % 3 == 2)
            for place, ((label, names), colour) in enumerate(zip(members.items(), cycle(LINE_COLOURS), strict=False))
            if (points := _points(inputs.chosen(names), benchmark, measure, x))
        ]

    panels = {measure: made for measure in MEASURES if len(places(made := lines(measure))) > 1}
    if not panels:
        return None

    def draw(measure: Measure, axes: Axes) -> None:
        x_label = declared.x_label or " + ".join(declared.x)
        draw_lines(axes, panels[measure], places(panels[measure]), x_label, f"{measure.label} (%)")

    title = f"Scores against {table.title[:1].lower()}{table.title[1:]}"
    note = f"{NOTE} {_bars(inputs)}".strip()
    draws = [partial(draw, measure) for measure in panels]
    return drawn(f"{benchmark}-{slug}", title, note, _PANELS[len(draws)], *draws, wide=len(draws) > 1)


def _points(
    ablations: Sequence[Ablation], benchmark: str, measure: Measure, x: Callable[[Ablation], float]
) -> list[Point]:
    """In percent, of those that have the measure."""
    found = [(x(ablation), measure.estimate(ablation, benchmark)) for ablation in ablations]
    return [Point(place, one) for place, one in found if one]


def _bars(inputs: ReportInputs) -> str:
    """What the bars in figures are."""
    several = any(len(result.seeds) > 1 for a in inputs.scored for result in a.benchmarks.values())
    return f"Bars: 95 % {'t intervals over seeds' if several else 'bootstrap intervals over pictures'}."


def context_figures(inputs: ReportInputs) -> list[Figure]:
    """Long-text R@1 and the text tower's operations against context length, and one against the other.

    One for each table with a figure of kind `cost` and each benchmark that its rows have scores on at several context
    lengths; where there is none, one of the operations alone; none where they are not known either.
    """
    found = []
    for slug, table in inputs.params.tables.items():
        members = inputs.chosen(table.rows) if isinstance(table.figure, CostFigureConfig) else []
        recalls = {}
        for benchmark in benchmark_names(inputs):
            lines = _recall(members, benchmark, lambda a: a.config.text.context_length)
            if len(places(lines)) > 1:
                recalls[benchmark] = lines
        counted = [a for a in members if a.flops_per_text]
        for benchmark, lines in recalls.items():
            by_cost = _recall(counted, benchmark, lambda a: (a.flops_per_text or 0) / 1e9)
            where = f" on {benchmark}" if len(recalls) > 1 else ""
            found.append(_context_figure(inputs, f"{benchmark}-{slug}", where, lines, by_cost))
    found = found or [_context_figure(inputs, "context-length", "", [], [])]
    return [figure for figure in found if figure]


def _recall(members: Sequence[Ablation], benchmark: str, x: Callable[[Ablation], float]) -> list[Line]:
    """Long-text R@1, a line for each direction."""
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
    """Panels of recall, where there is any, and of cost, where it is known; `where` ends the title."""
    towers = inputs.towers
    trained = places(recall) or sorted({a.config.text.context_length for a in towers})
    # a little further than recall is known: beyond that, its panel would be empty
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
        panels["recall"] = [draw_recall, *([draw_by_cost] if len(places(by_cost)) > 1 else [])]
        notes.append(f"Recall: of ablations that differ in the context length alone. {_bars(inputs)}")
    if len(lengths) > 1:
        panels["cost"] = [draw_cost]
        notes.append(f"Cost: of the text tower of {towers[0].name}, for one text that fills the context.")
        notes += ["A dot marks a length that was trained with."] if dots else []
    if not panels:
        return None
    title = f"Context length: {' and '.join(panels)}{where}"
    return drawn(slug, title, " ".join(notes), LOW, *(draw for draws in panels.values() for draw in draws), wide=True)


def loss_figure(inputs: ReportInputs) -> Figure | None:
    """Training loss of every ablation that left a history, the mean over its seeds."""
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
        "Mean over seeds. Curves compare only between ablations whose loss has the same terms: "
        "short captions alone are an easier task than short captions and long texts."
    )
    note += " Thin lines are all other ablations." if len(named) < len(curves) else ""
    return drawn("loss", "Training loss", note, WIDE, draw, wide=True)


def run_figures(history: Sequence[dict[str, float]], scores: dict[str, float]) -> dict[str, bytes]:
    """The figures of one run, for its tracker: file name → PNG. One that cannot be drawn is left out, with a warning.

    Args:
        history: the run's logged steps.
        scores: metric → fraction, of one benchmark.
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

    made = [drawn("loss", "Training loss", "", SMALL, draw_loss), drawn("recall", "Recall", "", WIDE, draw_recall)]
    return {f"{figure.slug}.png": figure.png for figure in made if figure.png}


def _mean_curve(histories: Sequence[Sequence[dict[str, float]]]) -> list[tuple[float, float]]:
    """(step, mean loss) at the steps that were logged."""
    at: dict[float, list[float]] = {}
    for history in histories:
        for entry in history:
            at.setdefault(entry["step"], []).append(entry["loss"])
    return [(step, statistics.fmean(losses)) for step, losses in sorted(at.items())]
