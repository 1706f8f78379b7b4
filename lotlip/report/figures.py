"""The report's figures: SVG for the page, whose ink follows its text colour, and PNG for Markdown."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lotlip.report import groups
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.results import DIRECTIONS, FAMILIES, benchmark_names, metric_names
from lotlip.report.tables import score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f2733"
SYSTEM_COLOURS = {"LiT": "#64748b", "LiT + long texts": "#d97706", "LoTLIP": "#4f46e5"}
OTHER_COLOURS = (
    "#0891b2", "#be185d", "#65a30d", "#9333ea", "#0d9488", "#e11d48", "#2563eb", "#a16207", "#15803d", "#c026d3",
)  # fmt: skip
SMALL, WIDE, LOW = (4.6, 3.1), (9.4, 4.0), (9.4, 3.2)  # inches
STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    `slug` is its file name; it is `wide` when it takes the page's whole width; without `svg` the page shows `png`.
    """

    slug: str
    title: str
    note: str
    svg: str
    png: bytes
    wide: bool = False


@dataclass(frozen=True)
class _Line:
    """Points (x, mean, half the length of its bar) that belong together; hollow markers for what has no mask.

    One without a label is not in the legend.
    """

    label: str
    colour: str
    points: list[tuple[float, float, float]]
    dashed: bool = False
    hollow: bool = False


def colours(inputs: ReportInputs) -> dict[str, str]:
    """Ablation → colour, the same in every figure; the three systems have theirs in every report."""
    main = groups.main_systems(inputs.ablations, inputs.params.pretrain)
    chosen = {ablation.name: SYSTEM_COLOURS[name] for name, ablation in main.items()}
    rest = [ablation.name for ablation in inputs.ablations if ablation.name not in chosen]
    return chosen | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(rest)}


def benchmark_figures(inputs: ReportInputs, benchmark: str) -> list[Figure]:
    """R@1 against sub-captions and against corner tokens, for each kind of text; none where there is one point."""
    families = dict.fromkeys(
        name.split(".")[0] for name in metric_names(inputs.ablations, benchmark) if name.endswith(".r1")
    )
    drawn = [
        make(inputs, benchmark, family)
        for make in (_against_sub_captions, _against_corner_tokens)
        for family in families
    ]
    return [figure for figure in drawn if figure]


def _against_sub_captions(inputs: ReportInputs, benchmark: str, family: str) -> Figure | None:
    chosen = groups.sub_captions(inputs.ablations, inputs.params.pretrain)
    lines = []
    for direction, words in DIRECTIONS.items():
        for system, with_corners in (("LiT", False), ("LoTLIP", True)):
            members = [a for a in chosen if (a.config.text.corner_tokens > 0) == with_corners]
            points = _points(members, benchmark, f"{family}.{direction}.r1", lambda a: a.config.long_texts.sub_captions)
            colour = SYSTEM_COLOURS["LiT + long texts" if system == "LiT" else system]
            lines.append(_Line(f"{system}, {words}", colour, points, dashed=direction == "text_to_image"))
    text = FAMILIES.get(family, family)
    return _line_figure(
        f"{benchmark}-sub-captions-{family}",
        f"{text}: R@1 against sub-captions",
        "k, sub-captions in a long text",
        lines,
    )


def _against_corner_tokens(inputs: ReportInputs, benchmark: str, family: str) -> Figure | None:
    chosen = groups.corner_tokens(inputs.ablations, inputs.params.pretrain)
    lines = []
    for direction, words in DIRECTIONS.items():
        metric, dashed = f"{family}.{direction}.r1", direction == "text_to_image"
        parted = [a for a in chosen if not groups.masked_off(a)]
        open_ = [a for a in chosen if groups.masked_off(a)]
        parted_points, open_points = _points(parted, benchmark, metric, _m), _points(open_, benchmark, metric, _m)
        lines.append(_Line(words, SYSTEM_COLOURS["LoTLIP"], parted_points, dashed))
        lines.append(_Line(f"{words}, no mask", OTHER_COLOURS[1], open_points, dashed, hollow=True))
    text = FAMILIES.get(family, family)
    return _line_figure(
        f"{benchmark}-corner-tokens-{family}", f"{text}: R@1 against corner tokens", "m, corner tokens", lines
    )


def _m(ablation: Ablation) -> float:
    return ablation.config.text.corner_tokens


def _points(
    ablations: Sequence[Ablation], benchmark: str, metric: str, x: Callable[[Ablation], float]
) -> list[tuple[float, float, float]]:
    """(x, mean, spread) in percent, of those that have the metric."""
    points = []
    for ablation in ablations:
        result = ablation.benchmarks.get(benchmark)
        cell = score(result.values(metric) if result else [], metric)
        if cell.value is not None and not math.isnan(cell.value):
            points.append((x(ablation), 100 * cell.value, 100 * (cell.spread or 0.0)))
    return points


def _line_figure(slug: str, title: str, x_label: str, lines: Sequence[_Line]) -> Figure | None:
    places = _places(lines)
    if len(places) < 2:
        return None
    svg, png = _render(slug, SMALL, lambda axes: _draw_lines(axes, lines, places, x_label, "R@1 (%)"))
    return Figure(slug, title, "", svg, png)


def _places(lines: Sequence[_Line]) -> list[float]:
    return sorted({x for line in lines for x, _, _ in line.points})


def _draw_lines(
    axes: Axes,
    lines: Sequence[_Line],
    ticks: Sequence[float],
    x_label: str,
    y_label: str,
    level: float | None = None,
) -> None:
    """Lines with their spreads, and a dotted one at `level`, what guessing has."""
    lines = [line for line in lines if line.points]
    for line in lines:
        xs, means, spreads = (list(values) for values in zip(*line.points, strict=True))
        axes.errorbar(
            xs,
            means,
            yerr=spreads if any(spreads) else None,
            label=line.label or None,
            color=line.colour,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            marker="s" if line.dashed else "o",
            markerfacecolor="none" if line.hollow else line.colour,
            capsize=2,
            elinewidth=1,
        )
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    shown = [value for line in lines for _, y, spread in line.points for value in (y - spread, y + spread)]
    if level is not None:
        axes.axhline(level, color=INK, linestyle=":", linewidth=1)
        shown.append(level)
    axes.set_ylim(*_range(shown))
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5, handlelength=3.4)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of the R@1 axis: close around the values, but never so close that noise looks large."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (10 - (high - low)) / 2)
    return max(low - pad, 0.0), min(high + pad, 101.0)


def reading_figures(inputs: ReportInputs, benchmark: str) -> list[Figure]:
    """Whether the systems read to the end: accuracy against one false sentence by where it stands, and R@1 against the
    sentences that a text has; none where nobody was asked.
    """
    systems = groups.main_systems(inputs.ablations, inputs.params.pretrain)
    found = {name: a.benchmarks[benchmark].reading for name, a in systems.items() if benchmark in a.benchmarks}
    found = {name: readings for name, readings in found.items() if readings}
    return [_against_hard_negatives(benchmark, found), _against_sentences(benchmark, found)] if found else []


def _against_hard_negatives(benchmark: str, found: Mapping[str, Mapping[int, dict[str, Any]]]) -> Figure:
    answers = {
        name: [reading["hard_negatives"]["by_position"] for reading in readings.values()]
        for name, readings in found.items()
    }
    lines = [
        _Line(name, SYSTEM_COLOURS[name], _over_seeds(positions, "position", "accuracy"))
        for name, positions in answers.items()
    ]
    tokens = [position["tokens_before"] for position in next(iter(answers.values()))[0]]
    told = "; ".join(f"{line.label} {line.points[0][1]:.1f} % and {line.points[-1][1]:.1f} %" for line in lines)
    name, readings = list(found.items())[-1]
    attributes = ", ".join(
        f"{same[0]['attribute']} {100 * statistics.fmean(one['accuracy']['value'] for one in same):.1f} %"
        for same in zip(*(reading["hard_negatives"]["by_attribute"] for reading in readings.values()), strict=True)
    )
    slug = f"{benchmark}-hard-negatives"
    places = _places(lines)

    def draw(axes: Axes) -> None:
        _draw_lines(axes, lines, places, "place of the changed sentence", "accuracy (%)", level=50)

    svg, png = _render(slug, SMALL, draw)
    note = (
        "One attribute of one small object is told wrong: the share of pictures that are nearer to the true text, by "
        "where that object's sentence stands among those on small objects. In the first place (on average "
        f"{tokens[0]:.0f} word pieces stand before it) and in the last ({tokens[-1]:.0f}): {told}. By what is wrong, "
        f"{name}: {attributes}. The dotted line is guessing; bars are 95 % intervals over pictures."
    )
    return Figure(slug, "Does the model read to the end?", note, svg, png)


def _against_sentences(benchmark: str, found: Mapping[str, Mapping[int, dict[str, Any]]]) -> Figure:
    lengths = {name: [reading["lengths"] for reading in readings.values()] for name, readings in found.items()}
    lines = [
        _Line("" if dashed else name, SYSTEM_COLOURS[name], _over_seeds(of, "sentences", way), dashed)
        for name, of in lengths.items()
        for way, dashed in (("image_to_text", False), ("text_to_image", True))
    ]
    tokens = [length["tokens"] for length in next(iter(lengths.values()))[0]]
    dashed_points = zip(lengths, (line.points for line in lines if line.dashed), strict=True)
    told = "; ".join(f"{name} {points[0][1]:.1f} % and {points[-1][1]:.1f} %" for name, points in dashed_points)
    slug = f"{benchmark}-sentences"
    places = _places(lines)

    def draw(axes: Axes) -> None:
        _draw_lines(axes, lines, places, "sentences of the text", "R@1 (%)")

    svg, png = _render(slug, SMALL, draw)
    note = (
        f"Long texts that end after so many sentences; shorter ones are whole. Solid: {DIRECTIONS['image_to_text']}; "
        f"dashed: {DIRECTIONS['text_to_image']}, which is, after the first sentence (on average {tokens[0]:.0f} word "
        f"pieces) and with all ({tokens[-1]:.0f}): {told}. Bars are 95 % intervals over pictures."
    )
    return Figure(slug, "Long text: R@1 against its length", note, svg, png)


def _over_seeds(
    readings: Sequence[Sequence[dict[str, Any]]], place: str, share: str
) -> list[tuple[float, float, float]]:
    """(place, mean of the share, half the mean interval's width) in percent, of lists with the same places."""
    points = []
    for same in zip(*readings, strict=True):
        half = statistics.fmean((one[share]["interval"][1] - one[share]["interval"][0]) / 2 for one in same)
        points.append((same[0][place], 100 * statistics.fmean(one[share]["value"] for one in same), 100 * half))
    return points


def context_figures(inputs: ReportInputs) -> list[Figure]:
    """Long-text R@1 and the text tower's operations against context length, side by side (paper, Fig. 4).

    One for each benchmark that ablations of several context lengths have scores on; where there is none, one of the
    operations alone; none where they are not known either.
    """
    members = groups.context_lengths(inputs.ablations, inputs.params.pretrain)
    recalls = {}
    for benchmark in benchmark_names(inputs):
        lines = [
            _Line(
                words,
                SYSTEM_COLOURS["LoTLIP"],
                _points(members, benchmark, f"long.{direction}.r1", lambda a: a.config.text.context_length),
                dashed=direction == "text_to_image",
            )
            for direction, words in DIRECTIONS.items()
        ]
        if len(_places(lines)) > 1:
            recalls[benchmark] = lines
    if not recalls:
        drawn = [_context_figure(inputs, "context-length", "", [])]
    else:
        several = len(recalls) > 1
        drawn = [
            _context_figure(inputs, f"{benchmark}-context-length", f" on {benchmark}" if several else "", lines)
            for benchmark, lines in recalls.items()
        ]
    return [figure for figure in drawn if figure]


def _context_figure(inputs: ReportInputs, slug: str, where: str, recall: Sequence[_Line]) -> Figure | None:
    """A panel of recall, where there is any, and one of cost, where it is known; `where` ends the title."""
    towers = groups.with_base_tower(inputs.ablations, inputs.params.pretrain)
    trained = _places(recall) or sorted({a.config.text.context_length for a in towers})
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
        _draw_lines(axes, recall, ticks, x_label, "long text, R@1 (%)")

    def draw_cost(axes: Axes) -> None:
        axes.plot(lengths, [costs[length] for length in lengths], color=INK)
        axes.plot(dots, [costs[length] for length in dots], "o", color=SYSTEM_COLOURS["LoTLIP"])
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xlabel(x_label)
        axes.set_ylabel("GFLOPs per text")
        axes.set_ylim(bottom=0)

    panels, notes = {}, []
    if recall:
        panels["recall"] = draw_recall
        notes.append("Recall: of ablations that differ in the context length alone.")
    if len(lengths) > 1:
        panels["cost"] = draw_cost
        notes.append(f"Cost: of the text tower of {towers[0].name}, for one text that fills the context.")
        notes += ["A dot marks a length that was trained with."] if dots else []
    if not panels:
        return None
    svg, png = _render(slug, LOW, *panels.values())
    return Figure(slug, f"Context length: {' and '.join(panels)}{where}", " ".join(notes), svg, png, wide=True)


def loss_figure(inputs: ReportInputs) -> Figure | None:
    """Training loss of every ablation that left a history, the mean over its seeds."""
    curves = {a.name: _mean_curve(list(a.history.values())) for a in inputs.ablations if a.history}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    palette = colours(inputs)
    main = {a.name for a in groups.main_systems(inputs.ablations, inputs.params.pretrain).values()}

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            steps, losses = zip(*curve, strict=True)
            front = name in main
            axes.plot(steps, losses, color=palette[name], linewidth=2.0 if front else 1.2, zorder=3 if front else 2)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.margins(x=0.01)
        _label_ends(axes, [(*curve[-1], name, palette[name]) for name, curve in curves.items()])

    svg, png = _render("loss", WIDE, draw)
    note = (
        "Mean over seeds. Curves compare only between ablations whose loss has the same terms: "
        "raw captions alone are an easier task than raw captions and long texts."
    )
    return Figure("loss", "Training loss", note, svg, png, wide=True)


def run_figures(history: Sequence[dict[str, float]], scores: dict[str, float]) -> dict[str, bytes]:
    """The figures of one run, for its tracker: file name → PNG.

    Args:
        history: the run's logged steps.
        scores: metric → fraction, of one benchmark.
    """
    recalls = {name: 100 * value for name, value in scores.items() if name.endswith((".r1", ".r5", ".r10"))}

    def draw_loss(axes: Axes) -> None:
        axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")

    def draw_recall(axes: Axes) -> None:
        axes.barh(list(recalls), list(recalls.values()), color=SYSTEM_COLOURS["LoTLIP"])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("recall (%)")

    return {
        "loss.png": _render("loss", SMALL, draw_loss)[1],
        "recall.png": _render("recall", WIDE, draw_recall)[1],
    }


def _mean_curve(histories: Sequence[Sequence[dict[str, float]]]) -> list[tuple[float, float]]:
    """(step, mean loss) at the steps that were logged."""
    at: dict[float, list[float]] = {}
    for history in histories:
        for entry in history:
            at.setdefault(entry["step"], []).append(entry["loss"])
    return [(step, statistics.fmean(losses)) for step, losses in sorted(at.items())]


# --- drawing ------------------------------------------------------------------------------------------------------


def _render(slug: str, size: tuple[float, float], *draws: Callable[[Axes], None]) -> tuple[str, bytes]:
    """Draws each panel once, side by side on the same x; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": slug}):
        canvas = Canvas(figsize=size, layout="constrained")
        panels = canvas.subplots(1, len(draws), sharex=True, squeeze=False)[0]
        for draw, axes in zip(draws, panels, strict=True):
            draw(axes)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return _inline(svg.getvalue()), png.getvalue()


def _inline(svg: str) -> str:
    """An SVG file as an element of the page: no prolog, no repeated ids, the page's ink and width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that nothing refers to, the same in every figure
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    return svg.replace(INK, "currentColor")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names lines at their right ends, (x, y, text, colour) each, moved apart where they would overlap."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = 72 * axes.bbox.height / axes.figure.dpi  # in points; the layout changes it a little later
    step = (high - low) * 11.5 / height
    ordered = sorted(ends, key=lambda end: end[1])
    places = [y for _, y, _, _ in ordered]
    for _ in range(20 * len(places)):  # each round pushes neighbours that are too close apart, half each
        for i in range(len(places) - 1):
            short = step - (places[i + 1] - places[i])
            if short > 0:
                places[i], places[i + 1] = places[i] - short / 2, places[i + 1] + short / 2
    for (x, y, text, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 3},
        )
