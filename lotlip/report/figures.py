"""The report's figures of scores: against sub-captions, corner tokens and context length, and the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

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
from lotlip.report import groups
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.measures import MEASURES, NOTE, Measure
from lotlip.report.results import DIRECTIONS, benchmark_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CURVES = 12  # with more of them, only the systems' loss curves have a name and a colour
_PANELS = {1: SMALL, 2: LOW, 3: LOW}


def colours(inputs: ReportInputs) -> dict[str, str]:
    """Ablation → colour of its curve; the systems have theirs in every report."""
    main = groups.main_systems(inputs.ablations, inputs.params.pretrain)
    chosen = {ablation.name: SYSTEM_COLOURS[name] for name, ablation in main.items()}
    rest = [ablation.name for ablation in inputs.ablations if ablation.name not in chosen]
    return chosen | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(rest)}


def against_sub_captions(inputs: ReportInputs, benchmark: str) -> Figure | None:
    """LiT and LoTLIP against k, a panel for each measure (paper, Figs. 2 and 5); None where there is one k."""
    chosen = groups.sub_captions(inputs.scored, inputs.params.pretrain)

    def lines(measure: Measure) -> list[Line]:
        members = {"LiT": [a for a in chosen if not _m(a)], "LoTLIP": [a for a in chosen if _m(a)]}
        return [
            Line(label, SYSTEM_COLOURS["LiT + long texts" if label == "LiT" else label], points, label == "LiT")
            for label, own in members.items()
            if (points := _points(own, benchmark, measure, lambda a: a.config.long_texts.sub_captions))
        ]

    title = "Scores against sub-captions"
    return _panels(inputs, f"{benchmark}-sub-captions", title, "k, sub-captions in a long text", lines)


def against_corner_tokens(inputs: ReportInputs, benchmark: str) -> Figure | None:
    """Corner tokens with and without mask, and registers, a panel for each measure (paper, Tables 3 and 7)."""
    base = inputs.params.pretrain
    chosen = groups.corner_tokens(inputs.scored, base)
    masked = [a for a in chosen if not groups.masked_off(a)]
    registers = [a for a in groups.registers(inputs.scored, base) if not _m(a)]
    lines_of = {
        "corner tokens": (SYSTEM_COLOURS["LoTLIP"], masked, _m),
        "corner tokens, no mask": (OTHER_COLOURS[1], [a for a in chosen if a not in masked], _m),
        "register tokens": (OTHER_COLOURS[0], registers, lambda a: a.config.text.register_tokens),
    }

    def lines(measure: Measure) -> list[Line]:
        return [
            Line(label, colour, points, dashed=label == "register tokens", hollow=label.endswith("no mask"))
            for label, (colour, own, x) in lines_of.items()
            if (points := _points(own, benchmark, measure, x))
        ]

    title = "Scores against corner tokens"
    return _panels(inputs, f"{benchmark}-corner-tokens", title, "m, extra tokens", lines)


def _m(ablation: Ablation) -> int:
    return ablation.config.text.corner_tokens


def _points(
    ablations: Sequence[Ablation], benchmark: str, measure: Measure, x: Callable[[Ablation], float]
) -> list[Point]:
    """In percent, of those that have the measure."""
    found = [(x(ablation), measure.estimate(ablation, benchmark)) for ablation in ablations]
    return [Point(place, one) for place, one in found if one]


def _panels(
    inputs: ReportInputs, slug: str, title: str, x_label: str, lines: Callable[[Measure], list[Line]]
) -> Figure | None:
    """A panel for each measure that there are several places of; None where there is no such."""
    panels = {measure: made for measure in MEASURES if len(places(made := lines(measure))) > 1}
    if not panels:
        return None

    def draw(measure: Measure, axes: Axes) -> None:
        draw_lines(axes, panels[measure], places(panels[measure]), x_label, f"{measure.label} (%)")

    note = f"{NOTE} {_bars(inputs)}".strip()
    draws = [partial(draw, measure) for measure in panels]
    return drawn(slug, title, note, _PANELS[len(draws)], *draws, wide=len(draws) > 1)


def _bars(inputs: ReportInputs) -> str:
    """What the bars in figures are."""
    several = any(len(result.seeds) > 1 for a in inputs.scored for result in a.benchmarks.values())
    return f"Bars: 95 % {'t intervals over seeds' if several else 'bootstrap intervals over pictures'}."


def context_figures(inputs: ReportInputs) -> list[Figure]:
    """Long-text R@1 and the text tower's operations against context length, and one against the other (paper, Fig. 4).

    One for each benchmark that ablations of several context lengths have scores on; where there is none, one of the
    operations alone; none where they are not known either.
    """
    members = groups.context_lengths(inputs.scored, inputs.params.pretrain)
    recalls = {}
    for benchmark in benchmark_names(inputs):
        lines = _recall(members, benchmark, lambda a: a.config.text.context_length)
        if len(places(lines)) > 1:
            recalls[benchmark] = lines
    if not recalls:
        found = [_context_figure(inputs, "context-length", "", [], [])]
    else:
        several = len(recalls) > 1
        counted = [a for a in members if a.flops_per_text]
        found = [
            _context_figure(
                inputs,
                f"{benchmark}-context-length",
                f" on {benchmark}" if several else "",
                lines,
                _recall(counted, benchmark, lambda a: (a.flops_per_text or 0) / 1e9),
            )
            for benchmark, lines in recalls.items()
        ]
    return [figure for figure in found if figure]


def _recall(members: Sequence[Ablation], benchmark: str, x: Callable[[Ablation], float]) -> list[Line]:
    """Long-text R@1, a line for each direction."""
    directions = {
        words: Measure(f"long-{direction}", "long text, R@1", (f"long.{direction}.r1",))
        for direction, words in DIRECTIONS.items()
    }
    return [
        Line(words, SYSTEM_COLOURS["LoTLIP"], _points(members, benchmark, measure, x), words == "text → image")
        for words, measure in directions.items()
    ]


def _context_figure(
    inputs: ReportInputs, slug: str, where: str, recall: Sequence[Line], by_cost: Sequence[Line]
) -> Figure | None:
    """Panels of recall, where there is any, and of cost, where it is known; `where` ends the title."""
    towers = groups.with_base_tower(inputs.scored, inputs.params.pretrain)
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
    main = {a.name for a in groups.main_systems(inputs.ablations, inputs.params.pretrain).values()}
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
        "raw captions alone are an easier task than raw captions and long texts."
    )
    note += " Thin lines are all other ablations." if len(named) < len(curves) else ""
    return drawn("loss", "Training loss", note, WIDE, draw, wide=True)


def run_figures(history: Sequence[dict[str, float]], scores: dict[str, float]) -> dict[str, bytes]:
    """The figures of one run, for its tracker: file name → PNG. One that cannot be drawn is left out, with a warning.

    Args:
        history: the run's logged steps.
        scores: metric → fraction, of one benchmark.
    """
    # the same picture from scores just made and from those read back, whose names are sorted as text: r1, r10, r5
    names = sorted((name for name in scores if name.endswith((".r1", ".r5", ".r10"))), key=_by_rank)
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


def _by_rank(name: str) -> tuple[str, int]:
    """Orders recalls such as long.image_to_text.r5 by what is asked, then by rank."""
    asked, _, rank = name.rpartition(".r")
    return asked, int(rank)


def _mean_curve(histories: Sequence[Sequence[dict[str, float]]]) -> list[tuple[float, float]]:
    """(step, mean loss) at the steps that were logged."""
    at: dict[float, list[float]] = {}
    for history in histories:
        for entry in history:
            at.setdefault(entry["step"], []).append(entry["loss"])
    return [(step, statistics.fmean(losses)) for step, losses in sorted(at.items())]
