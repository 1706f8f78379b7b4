"""How the report draws: SVG for the page, whose ink follows its text colour, and PNG for Markdown."""

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
LONGEST = 60  # characters of a name in a figure
STYLE: Any = {  # matplotlib types its keys one by one
    "text.parse_math": False,  # dollar signs in captions are no formulas
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
    `problem` is the reason why it could not be drawn; it then has neither.
    """

    slug: str
    title: str
    note: str
    svg: str
    png: bytes
    wide: bool = False
    problem: str = ""


class Point(NamedTuple):
    """Where on the x axis, and the number there with its interval."""

    x: float
    y: Estimate


@dataclass(frozen=True)
class Line:
    """Points that belong together; hollow markers for what has no mask. One without a label is not in the legend."""

    label: str
    colour: str
    points: list[Point]
    dashed: bool = False
    hollow: bool = False


def places(lines: Sequence[Line]) -> list[float]:
    """All places on the x axis that have a point."""
    return sorted({point.x for line in lines for point in line.points})


def draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    ticks: Sequence[float] | None,
    x_label: str,
    y_label: str,
    level: float | None = None,
) -> None:
    """Lines with their intervals as bars, and a dotted one at `level`, what guessing has; without `ticks`, a few."""
    lines = [line for line in lines if line.points]
    for line in lines:
        xs, found = [point.x for point in line.points], [point.y for point in line.points]
        # a bootstrap interval may end at the value itself, or by rounding just before it
        lower = [max(one.value - one.low, 0.0) if one.low is not None else 0.0 for one in found]
        upper = [max(one.high - one.value, 0.0) if one.high is not None else 0.0 for one in found]
        axes.errorbar(
            xs,
            [one.value for one in found],
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
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    shown = [value for line in lines for _, y in line.points for value in (y.value, y.low, y.high) if value is not None]
    if level is not None:
        axes.axhline(level, color=INK, linestyle=":", linewidth=1)
        shown.append(level)
    axes.set_ylim(*_range(shown))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of percents: close around the values, but never so close that noise looks large."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (10 - (high - low)) / 2)
    return max(low - pad, 0.0), min(high + pad, 101.0)


def literal(text: str, longest: int = LONGEST) -> str:
    """A text from data or params.yaml as a figure can show it: one line, no control characters, of limited length.

    Figures do not read formulas in texts (`STYLE`), so all other characters stay as they are.
    """
    line = " ".join(text[: 4 * longest].split())
    clean = "".join("\ufffd" if unicodedata.category(one) in ("Cc", "Cs") else one for one in line)
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"


@contextmanager
def styled(more: Any = None) -> Iterator[None]:
    """The report's style for what is drawn inside; characters that the font lacks are boxes, without a warning."""
    import matplotlib

    with matplotlib.rc_context(STYLE | (more or {})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)  # some scripts
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield


def drawn(
    slug: str, title: str, note: str, size: tuple[float, float], *draws: Callable[[Axes], None], wide: bool = False
) -> Figure:
    """A figure as `render` draws it; where that fails, one that says why, so that the rest of the page is made."""
    try:
        svg, png = render(slug, size, *draws)
    except Exception as error:  # matplotlib raises many types, and no figure is worth the others
        reason = in_one_line(error)
        logging.getLogger(__name__).warning("%s could not be drawn: %s", title, reason)
        return Figure(slug, title, note, "", b"", wide, reason)
    return Figure(slug, title, note, svg, png, wide)


def in_one_line(error: Exception) -> str:
    """An error's message in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def render(slug: str, size: tuple[float, float], *draws: Callable[[Axes], None]) -> tuple[str, bytes]:
    """Draws each panel once, side by side, under one legend; the same numbers give the same bytes."""
    from matplotlib.figure import Figure as Canvas

    with styled({"svg.hashsalt": slug}):
        canvas = Canvas(figsize=size, layout="constrained")
        panels = canvas.subplots(1, len(draws), squeeze=False)[0]
        for draw, axes in zip(draws, panels, strict=True):
            draw(axes)
        _legend(canvas, panels)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return _inline(svg.getvalue()), png.getvalue()


def _legend(canvas: Canvas, panels: Sequence[Axes]) -> None:
    """Above all panels, each label once; none where no line has one."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        canvas.legend(
            list(found.values()),
            list(found),
            loc="outside upper left",
            ncols=2 if len(panels) == 1 else 4,
            frameon=False,
            fontsize=8.5,
            handlelength=3.4,
        )


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


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
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
            literal(text),
            xy=(x, y),
            xytext=(1.03, place),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 3},
        )
