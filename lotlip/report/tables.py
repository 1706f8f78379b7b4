"""Tables as data: built once, then shown as HTML, as Markdown and as CSV."""

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
    """What is shown, and the number behind it.

    Attributes:
        text: for a person.
        value: the number, or the mean of several; None where the cell is words.
        spread: standard deviation over seeds; None where there is one seed.
        interval: ends of the value's 95 % confidence interval; None where it has none.
        span: the interval as it is shown, "[12.1, 14.9]", where `text` does not say it.
        best: of its column.
        kind: of a word that has a colour of its own on the page.
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
    """`key` names it in CSV; `group` stands above neighbours that share it."""

    key: str
    label: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A titled table.

    `references` are rows that take no part in who is best, such as guessing; `paper` says which of the paper's tables
    or figures it is shaped after.
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
        """The rows, the references last."""
        return [*self.rows, *self.references]

    @property
    def header_groups(self) -> list[tuple[str, int, bool]]:
        """Runs of columns under one heading: (heading, columns, numeric)."""
        runs: list[tuple[str, int, bool]] = []
        for column in self.columns:
            if runs and runs[-1][0] == column.group:
                runs[-1] = (column.group, runs[-1][1] + 1, column.numeric)
            else:
                runs.append((column.group, 1, column.numeric))
        return runs

    def to_csv(self) -> str:
        """All numbers in full; `<key>.std`, `<key>.low` and `<key>.high` follow a column wherever a cell has them."""
        every = list(zip(*self.all_rows, strict=True)) or [() for _ in self.columns]
        columns = [
            numbers
            for column, cells in zip(self.columns, every, strict=True)
            for numbers in _csv_columns(column.key, cells)
        ]
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(zip(*columns, strict=True))
        return file.getvalue()


def _csv_columns(key: str, cells: Sequence[Cell]) -> list[list[Any]]:
    """A column's values below their name, then what else its cells have."""
    columns: list[list[Any]] = [[key, *(cell.text if cell.value is None else cell.value for cell in cells)]]
    if any(cell.spread is not None for cell in cells):
        columns.append([f"{key}.std", *(cell.spread for cell in cells)])
    if any(cell.interval for cell in cells):
        for end, name in enumerate(("low", "high")):
            columns.append([f"{key}.{name}", *(cell.interval[end] if cell.interval else None for cell in cells)])
    return columns


# --- cells --------------------------------------------------------------------------------------------------------


def words(text: object) -> Cell:
    """A cell that is not a number."""
    return Cell(str(text) if text not in (None, "") else ABSENT)


def number(value: float | None, pattern: str = "{:,.0f}") -> Cell:
    """A number as `pattern` shows it; unknown is a dash."""
    if value is None or math.isnan(value):
        return Cell(ABSENT, math.nan)
    return Cell(pattern.format(value), value)


def percent(value: float | None) -> Cell:
    """A fraction, shown in percent with one decimal."""
    shown = number(None if value is None else 100 * value, "{:.1f}\u00a0%")
    return shown if shown.text == ABSENT else replace(shown, value=value)


def gigaflops(flops: int | None) -> Cell:
    """Floating-point operations, shown in billions (10⁹) with three digits."""
    if flops is None:
        return number(None)
    billions = flops / 1e9
    return Cell(f"{billions:,.0f}" if billions >= 99.95 else f"{billions:#.3g}", flops)


def duration(seconds: float) -> Cell:
    """Seconds the way a person says them."""
    if math.isnan(seconds):
        return number(None)
    whole, minutes = round(seconds), round(seconds / 60)
    if seconds < 59.95:
        text = f"{seconds:.1f} s"
    elif whole < 3600:
        text = f"{whole // 60} min {whole % 60:02d} s"
    else:
        text = f"{minutes // 60} h {minutes % 60:02d} min"
    return Cell(text, seconds)


def score(values: Sequence[float], metric: str, interval: tuple[float, float] | None = None) -> Cell:
    """A metric over seeds: percent with one decimal, ranks as they are; of several, `mean ± half the 95 % t interval`.

    Not a number in one seed makes the whole cell unknown.

    Args:
        values: one for each seed.
        metric: its name.
        interval: of a lone seed's value; several seeds have their own.
    """
    if not values or any(math.isnan(value) for value in values):
        return number(None)
    scale = 1 if is_rank(metric) else 100
    return estimate_cell(estimate(values, interval), scale, "{:.1f}")


def estimate_cell(found: Estimate, scale: float, pattern: str) -> Cell:
    """An estimate in one cell, shown `scale` times as large."""
    text = pattern.format(scale * found.value)
    if found.low is None or found.high is None:
        return Cell(text, found.value)
    interval = (found.low, found.high)
    if found.spread is not None:
        return Cell(f"{text} ± {pattern.format(scale * found.half)}", found.value, found.spread, interval)
    low, high = (pattern.format(scale * end) for end in interval)
    return Cell(text, found.value, interval=interval, span=f"[{low}, {high}]")


def is_rank(metric: str) -> bool:
    """Whether the metric is a rank, where less is better, and not a fraction."""
    return metric.endswith("rank")


def mark_best(cells: Sequence[Cell], metric: str) -> list[Cell]:
    """The column with its best value marked, and with it those that look the same; a lone value is not best."""
    known = [cell.value for cell in cells if cell.value is not None and not math.isnan(cell.value)]
    if len(known) < 2:
        return list(cells)
    best = min(known) if is_rank(metric) else max(known)
    shown = score([best], metric).text
    return [replace(cell, best=cell.text.split(" ± ")[0] == shown) for cell in cells]
