"""Charts as SVG for the report page, in the page's text colour, and as PNG for Markdown."""

from __future__ import annotations

import io
import logging
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lotlip.figures.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK = "#1f2733"
SYSTEM_COLOURS = {"LiT": "#64748b", "LiT + long texts": "#d97706", "Long-CLIP": "#059669", "LoTLIP": "#4f46e5"}
OTHER_COLOURS = (
    "#0891b2", "#be185d", "#65a30d", "#9333ea", "#0d9488", "#e11d48", "#2563eb", "#a16207", "#15803d", "#c026d3",
)  # fmt: skip
SMALL, WIDE, LOW = (4.6, 3.1), (9.4, 4.0), (9.4, 3.2)  # inches
LONGEST = 60  # maximum length of a label in characters
STYLE: Any = {  # Any: matplotlib types every key literally
    "text.parse_math": False,  # dollar signs in captions do not start formulas
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

    `slug` is its file name. A `wide` figure has the full width of the page. Without `svg` the page shows `png`.
    `problem` is the reason why the figure could not be drawn; it then has neither.
    """

    slug: str
    title: str
    note: str
    svg: str
    png: bytes
    wide: bool = False
    problem: str = ""


class Point(NamedTuple):
    """A point of a line: x and an estimate with its interval."""

    x: float
    y: Estimate


@dataclass(frozen=True)
class Line:
    """A line of a chart; without a label it is not in the legend."""

    label: str
    colour: str
    points: list[Point]
    dashed: bool = False
    hollow: bool = False


def x_values(lines: Sequence[Line]) -> list[float]:
    """Returns the x values that have a point, sorted."""
    return sorted({point.x for line in lines for point in line.points})


def draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    ticks: Sequence[float] | None,
    x_label: str,
    y_label: str,
    level: float | None = None,
    log: bool = False,
) -> None:
    """Draws lines with error bars, and a dotted line at the chance `level`; without `ticks`, matplotlib sets them.

    With `log`, the x axis is logarithmic and needs `ticks`.
    """
    lines = [line for line in lines if line.points]
    for line in lines:
        xs, ys = [point.x for point in line.points], [point.y for point in line.points]
        # A bootstrap bound may equal the value, or miss it by rounding; negative error bars are an error.
        lower = [max(y.value - y.low, 0.0) if y.low is not None else 0.0 for y in ys]
        upper = [max(y.high - y.value, 0.0) if y.high is not None else 0.0 for y in ys]
        axes.errorbar(
            xs,
            [y.value for y in ys],
            yerr=(lower, upper) if any(lower) or any(upper) else None,
            label=literal(line.label) or None,
            color=line.colour,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            marker="s" if line.dashed else "o",
            markerfacecolor="none" if line.hollow else line.colour,
            capsize=2,
            elinewidth=1,
        )
    if ticks is None:
        axes.locator_params(axis="x", nbins=5)
    else:
        if log:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(ticks, [in_millions(x) for x in ticks])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    shown = [value for line in lines for _, y in line.points for value in (y.value, y.low, y.high) if value is not None]
    if level is not None:
        axes.axhline(level, color=INK, linestyle=":", linewidth=1)
        shown.append(level)
    axes.set_ylim(*_range(shown))


def in_millions(value: float) -> str:
    """Formats a number; from a million in millions.

    >>> in_millions(0.5), in_millions(8000), in_millions(12_000_000)
    ('0.5', '8,000', '12M')
    """
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis in percent: close to the values, but at least 10 points apart so that noise looks small."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (10 - (high - low)) / 2)
    return max(low - pad, 0.0), min(high + pad, 101.0)


def literal(text: str, longest: int = LONGEST) -> str:
    """Makes a text printable in a figure: one line, without control characters, of limited length.

    All other characters are kept, because figures do not parse formulas (`STYLE`).
    """
    line = " ".join(text[: 4 * longest].split())
    clean = "".join("\ufffd" if unicodedata.category(one) in ("Cc", "Cs") else one for one in line)
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"


@contextmanager
def styled(more: Any = None) -> Iterator[None]:
    """Applies the report's style, and silences warnings about characters missing from the font."""
    import matplotlib

    with matplotlib.rc_context(STYLE | (more or {})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)  # some scripts
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield


def draw_figure(
    slug: str, title: str, note: str, size: tuple[float, float], *draws: Callable[[Axes], None], wide: bool = False
) -> Figure:
    """Draws a figure with `render`. If that fails, the figure has a `problem`, so that the report is still written."""
    try:
        svg, png = render(slug, size, *draws)
    except Exception as error:  # matplotlib raises many types
        reason = in_one_line(error)
        logging.getLogger(__name__).warning("%s could not be drawn: %s", title, reason)
        return Figure(slug, title, note, "", b"", wide, reason)
    return Figure(slug, title, note, svg, png, wide)


def in_one_line(error: Exception) -> str:
    """Returns an error's message on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def render(slug: str, size: tuple[float, float], *draws: Callable[[Axes], None]) -> tuple[str, bytes]:
    """Draws panels side by side under one legend and returns SVG and PNG; equal inputs give equal bytes."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with styled({"svg.hashsalt": slug, "savefig.format": "svg"}):  # the format whose text the layout measures
        canvas = Canvas(figsize=size)
        panels = canvas.subplots(1, len(draws), squeeze=False)[0]
        for draw, axes in zip(draws, panels, strict=True):
            draw(axes)
        _legend(canvas, panels)
        ConstrainedLayoutEngine().execute(canvas)  # as the figure's own engine, it would run again for each file
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return _inline(svg.getvalue()), png.getvalue()


def _legend(canvas: Canvas, panels: Sequence[Axes]) -> None:
    """Draws a legend above the panels, with each label once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        canvas.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left",
            ncols=2 if len(panels) == 1 else 4,
            frameon=False,
            fontsize=8.5,
            handlelength=3.4,
        )


def _inline(svg: str) -> str:
    """Converts an SVG file to an element of the page: no prolog, no duplicate ids, the page's colour and width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # unused, and the same in every figure
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    return svg.replace(INK, "currentColor")


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels lines at their right ends, given as (x, y, text, colour), and moves overlapping labels apart."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = 72 * axes.bbox.height / axes.figure.dpi  # in points; approximate, as the layout changes it later
    step = (high - low) * 11.5 / height
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [y for _, y, _, _ in ordered]
    for _ in range(20 * len(heights)):  # each pass moves neighbours apart that are too close
        for i in range(len(heights) - 1):
            short = step - (heights[i + 1] - heights[i])
            if short > 0:
                heights[i], heights[i + 1] = heights[i] - short / 2, heights[i + 1] + short / 2
    for (x, y, text, colour), label_y in zip(ordered, heights, strict=True):
        axes.annotate(
            literal(text),
            xy=(x, y),
            xytext=(1.03, label_y),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 3},
        )
