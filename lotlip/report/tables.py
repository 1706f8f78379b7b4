"""Tables as data, rendered as HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lotlip.figures.intervals import Estimate, estimate

ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """A table cell: the text shown and the value behind it.

    Attributes:
        text: the text shown.
        value: the number, or the mean of several; None if the cell is text.
        spread: standard deviation over seeds; None for a single seed.
        interval: bounds of the value's 95 % confidence interval; None if it has none.
        span: the interval as shown, such as "[12.1, 14.9]"; empty if `text` includes it.
        best: whether it is the best of its column.
        kind: CSS class of a label that is coloured on the page.
    """

    text: str
    value: float | None = None
    spread: float | None = None
    interval: tuple[float, float] | None = None
    span: str = ""
    best: bool = False
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its name in CSV (`key`), its label, and the heading shared with neighbouring columns (`group`)."""

    key: str
    label: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class ReportTable:
    """A titled table.

    `references` are rows at the end, such as chance, that are never marked as best. `paper` is the table or figure of
    the paper that this table reproduces.
    """

    slug: str
    title: str
    note: str
    columns: list[Column]
    rows: list[list[Cell]]
    references: list[list[Cell]] = field(default_factory=list)
    paper: str = ""

    @property
    def all_rows(self) -> list[list[Cell]]:
        """All rows, with the references at the end."""
        return [*self.rows, *self.references]

    @property
    def header_groups(self) -> list[tuple[str, int, bool]]:
        """Runs of columns with the same group: (group, number of columns, numeric)."""
        runs: list[tuple[str, int, bool]] = []
        for column in self.columns:
            if runs and runs[-1][0] == column.group:
                runs[-1] = (column.group, runs[-1][1] + 1, column.numeric)
            else:
                runs.append((column.group, 1, column.numeric))
        return runs

    def to_csv(self) -> str:
        """Returns the table as CSV with unrounded numbers.

        Columns `<key>.std`, `<key>.low` and `<key>.high` follow a column if any of its cells has these values.
        """
        cells_by_column = list(zip(*self.all_rows, strict=True)) or [() for _ in self.columns]
        columns = [
            values
            for column, cells in zip(self.columns, cells_by_column, strict=True)
            for values in _csv_columns(column.key, cells)
        ]
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(zip(*columns, strict=True))
        return file.getvalue()


def _csv_columns(key: str, cells: Sequence[Cell]) -> list[list[Any]]:
    """Returns the CSV columns of a table column, each with its name first."""
    columns: list[list[Any]] = [[key, *(cell.text if cell.value is None else cell.value for cell in cells)]]
    if any(cell.spread is not None for cell in cells):
        columns.append([f"{key}.std", *(cell.spread for cell in cells)])
    if any(cell.interval for cell in cells):
        for end, name in enumerate(("low", "high")):
            columns.append([f"{key}.{name}", *(cell.interval[end] if cell.interval else None for cell in cells)])
    return columns


# --- cells --------------------------------------------------------------------------------------------------------


def words(text: object) -> Cell:
    """Returns a text cell; an empty text is a dash."""
    return Cell(str(text) if text not in (None, "") else ABSENT)


def number(value: float | None, pattern: str = "{:,.0f}") -> Cell:
    """Returns a number formatted by `pattern`; None and NaN are a dash."""
    if value is None or math.isnan(value):
        return Cell(ABSENT, math.nan)
    return Cell(pattern.format(value), value)


def percent(value: float | None) -> Cell:
    """Returns a fraction, shown in percent with one decimal, or with one significant digit if it is below 0.05 %."""
    digits = ".1g" if value and 0 < value < 5e-4 else ".1f"
    shown = number(None if value is None else 100 * value, f"{{:{digits}}}\u00a0%")
    return shown if shown.text == ABSENT else replace(shown, value=value)


def gigaflops(flops: int | None) -> Cell:
    """Returns a number of FLOPs, shown in billions (10⁹) with three digits."""
    if flops is None:
        return number(None)
    billions = flops / 1e9
    return Cell(f"{billions:,.0f}" if billions >= 99.95 else f"{billions:#.3g}", flops)


def duration(seconds: float) -> Cell:
    """Returns a duration, shown in seconds, minutes or hours."""
    if math.isnan(seconds):
        return number(None)
    rounded, minutes = round(seconds), round(seconds / 60)
    if seconds < 59.95:
        text = f"{seconds:.1f} s"
    elif rounded < 3600:
        text = f"{rounded // 60} min {rounded % 60:02d} s"
    else:
        text = f"{minutes // 60} h {minutes % 60:02d} min"
    return Cell(text, seconds)


def score(values: Sequence[float], metric: str, interval: tuple[float, float] | None = None) -> Cell:
    """Returns a metric over seeds: fractions in percent, ranks as they are.

    Several seeds are shown as `mean ± half the 95 % t interval`. A NaN in any seed makes the cell a dash.

    Args:
        values: the value for each seed.
        metric: name of the metric.
        interval: bootstrap interval of a single seed's value; ignored for several seeds.
    """
    if not values or any(math.isnan(value) for value in values):
        return number(None)
    scale = 1 if is_rank(metric) else 100
    return estimate_cell(estimate(values, interval), scale, "{:.1f}")


def estimate_cell(value: Estimate, scale: float, pattern: str) -> Cell:
    """Returns an estimate with its interval, both shown multiplied by `scale`."""
    text = pattern.format(scale * value.value)
    if value.low is None or value.high is None:
        return Cell(text, value.value)
    interval = (value.low, value.high)
    if value.spread is not None:
        return Cell(f"{text} ± {pattern.format(scale * value.half)}", value.value, value.spread, interval)
    low, high = (pattern.format(scale * bound) for bound in interval)
    return Cell(text, value.value, interval=interval, span=f"[{low}, {high}]")


def is_rank(metric: str) -> bool:
    """Whether the metric is a rank, where lower is better, rather than a fraction."""
    return metric.endswith("rank")


def mark_best(cells: Sequence[Cell], metric: str) -> list[Cell]:
    """Marks the best value of a column and all values shown as the same; a single value is not marked."""
    known = [cell.value for cell in cells if cell.value is not None and not math.isnan(cell.value)]
    if len(known) < 2:
        return list(cells)
    best = min(known) if is_rank(metric) else max(known)
    shown = score([best], metric).text
    return [replace(cell, best=cell.text.split(" ± ")[0] == shown) for cell in cells]
