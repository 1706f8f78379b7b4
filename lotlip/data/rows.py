"""Rows of Parquet and CSV files: one at a time, from any place, however large the file is."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from lotlip.core.listing import files_below

_LONGEST_LINE = 2**20  # bytes; a longer one is read in pieces, which are no rows
_LONGEST_FIELD = 2**17  # characters; so far a quote runs that nobody closes


@dataclass(frozen=True)
class Range:
    """Rows of a table that stand together.

    Attributes:
        start: where the first one is: its number from 0 (Parquet), its first byte (CSV).
        number: what a person calls the first one: its number or line, from 1.
        count: how many.
    """

    start: int
    number: int
    count: int


class Row(NamedTuple):
    """One row.

    Attributes:
        number: what a person calls it: its number (Parquet) or the line where it begins (CSV), from 1.
        values: of the columns that were asked for; None for null, which CSV does not have.
        problem: why there are no values, and one word for it: "row" or "encoding"; None where there are.
    """

    number: int
    values: tuple[Any, ...] = ()
    problem: tuple[str, str] | None = None


class Table(Protocol):
    """A file of rows.

    Attributes:
        path: the file.
        columns: their names.
        unit: what a row's number counts: "row" or "line".
    """

    path: Path
    columns: list[str]
    unit: str

    def ranges(self, size: int) -> Iterator[Range]:
        """All rows, `size` at a time."""

    def rows(self, columns: Sequence[str], part: Range | None = None) -> Iterator[Row]:
        """Rows in their order; all of them where no part is given."""


def open_table(path: Path) -> Table:
    """A table, by the ending of its name.

    Raises:
        ValueError: the file cannot be read as what its name says.
    """
    try:
        return ParquetTable(path) if path.suffix.lower() == ".parquet" else CsvTable(path)
    except (ValueError, OSError) as error:  # pyarrow raises kinds of both
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}; write it again") from error


def find_tables(path: Path, endings: Sequence[str], leave: Path | None = None) -> list[Path]:
    """The file itself, or all tables below a folder, sorted; nothing hidden, and nothing below `leave`."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in files_below(path, leave) if file.name.lower().endswith(tuple(endings)))


def as_name(value: Any) -> str:
    """What a cell calls a sample: its text, or a number's digits; "" where it has nothing.

    A column of whole numbers becomes one of floating-point numbers where a row has none, so `1.0` is `1`.

    >>> as_name(1.0), as_name(1.5), as_name(" a.jpg "), as_name(float("nan")), as_name(None)
    ('1', '1.5', ' a.jpg ', '', '')
    """
    if value is None or value != value:  # not a number
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float | Decimal) and value == value // 1:
        return str(int(value))
    return str(value)


def require(table: Table, columns: Sequence[str], remedy: str) -> None:
    """Makes sure that the columns are there, once.

    Raises:
        ValueError: one is not, or is there twice; the message lists those there are, and the remedy.
    """
    there = ", ".join(table.columns) or "none"
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{table.path} has no column {', '.join(missing)} (it has {there}); {remedy}")
    repeated = [column for column in columns if table.columns.count(column) > 1]
    if repeated:
        raise ValueError(f"{table.path} has more than one column {', '.join(repeated)} (it has {there}); rename them")


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds texts: plain, large or viewed strings, or a dictionary of them (pandas' category)."""
    from pyarrow.types import is_dictionary, is_large_string, is_string, is_string_view

    kind = kind.value_type if is_dictionary(kind) else kind
    return is_string(kind) or is_large_string(kind) or is_string_view(kind)


class ParquetTable:
    """Read by row groups, a few rows at a time."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        # pre_buffer would hold a whole row group
        self._file = pq.ParquetFile(path, buffer_size=2**16, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.columns = list(self.schema.names)

    def is_text(self, column: str) -> bool:
        """Whether a column holds texts."""
        return is_text(self.schema.field(column).type)

    def ranges(self, size: int) -> Iterator[Range]:
        total = self._file.metadata.num_rows
        for start in range(0, total, size):
            yield Range(start, start + 1, min(size, total - start))

    def rows(self, columns: Sequence[str], part: Range | None = None) -> Iterator[Row]:
        metadata = self._file.metadata
        # few at a time where rows may hold images
        size = 4096 if all(map(self.is_text, columns)) else 64
        start, end = (part.start, part.start + part.count) if part else (0, metadata.num_rows)
        first = 0  # row of the group
        for group in range(metadata.num_row_groups):
            place, first = first, first + metadata.row_group(group).num_rows
            if first <= start or place >= end:
                continue
            for batch in self._file.iter_batches(size, [group], list(columns), use_threads=False):
                low, high = max(start - place, 0), min(end - place, batch.num_rows)
                if low < high:
                    yield from self._rows(batch.slice(low, high - low), columns, place + low)
                place += batch.num_rows

    def _rows(self, batch: Any, columns: Sequence[str], place: int) -> Iterator[Row]:
        try:
            found = zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
        except UnicodeDecodeError as error:  # one text spoils the batch
            if batch.num_rows == 1:
                yield Row(place + 1, problem=(f"a text is not UTF-8: {error.reason}", "encoding"))
                return
            for row in range(batch.num_rows):
                yield from self._rows(batch.slice(row, 1), columns, place + row)
            return
        for row, values in enumerate(found):
            yield Row(place + row + 1, values)


class CsvTable:
    """UTF-8 with a header line; quoted fields may hold commas, quotes and line ends."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            # the end of the header is where the next record begins
            header = list(islice(self._records(file, 0), 2))
            if not header:
                raise ValueError("it is empty, without so much as a header line")
            self._end = (header[1][0], header[1][1] - 1) if len(header) == 2 else (file.tell(), header[0][1])
        first = header[0][2]
        if isinstance(first, csv.Error) or not all(map(_is_text, first)):
            raise ValueError("its first line is no header in UTF-8")
        self.columns = first

    def ranges(self, size: int) -> Iterator[Range]:
        with self.path.open("rb") as file:
            file.seek(self._end[0])
            start, number, count = *self._end, 0
            for place, line, _ in self._records(file, self._end[1]):
                if count == size:
                    yield Range(start, number, count)
                    count = 0
                if count == 0:
                    start, number = place, line
                count += 1
            if count:
                yield Range(start, number, count)

    def rows(self, columns: Sequence[str], part: Range | None = None) -> Iterator[Row]:
        start, line, count = (part.start, part.number - 1, part.count) if part else (*self._end, None)
        indices = [self.columns.index(column) for column in columns]
        with self.path.open("rb") as file:
            file.seek(start)
            for _, number, found in islice(self._records(file, line), count):
                if isinstance(found, csv.Error):
                    yield Row(number, problem=(f"it cannot be read as CSV: {found}", "row"))
                elif len(found) != len(self.columns):
                    reason = f"it has {len(found)} fields, and the header {len(self.columns)}"
                    yield Row(number, problem=(reason, "row"))
                else:
                    values = tuple([found[index] for index in indices])
                    if all(map(_is_text, values)):
                        yield Row(number, values)
                    else:
                        bad = [column for column, value in zip(columns, values, strict=True) if not _is_text(value)]
                        yield Row(number, problem=(f"{', '.join(bad)} is not UTF-8", "encoding"))

    @staticmethod
    def _records(file: IO[bytes], line: int) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
        """First byte, first line and fields of each record from where the file stands; blank lines are none.

        A quote that nobody closes runs to the limit for a field, and what it ran over is one error.

        Args:
            file: at the beginning of a record.
            line: number of the line before it.
        """
        place = file.tell()

        def lines() -> Iterator[str]:
            nonlocal place, line
            while data := file.readline(_LONGEST_LINE):
                text = data.removeprefix(codecs.BOM_UTF8) if place == 0 else data
                place += len(data)
                line += 1
                yield text.decode("utf-8", "surrogateescape")

        reader = csv.reader(lines())
        while True:
            start, first = place, line + 1
            csv.field_size_limit(_LONGEST_FIELD)  # the limit is the process's: others may have set their own
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield start, first, error
                continue
            if fields:
                yield start, first, fields


def _is_text(value: str) -> bool:
    """Whether it came from UTF-8."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
