"""Reads rows of Parquet, CSV and JSONL files in small pieces from any position, however large the file is."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from lotlip.core.listing import files_below

_LONGEST_LINE = 2**20  # bytes; a longer line is read in pieces, which are invalid rows
_LONGEST_FIELD = 2**17  # characters; an unclosed quote runs this far
_FIRST_RECORDS = 20  # of a CSV file, which tell its separator
_FIRST_OBJECTS = 100  # of a JSONL file, whose keys are its columns; objects often lack keys without a value


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a table.

    Attributes:
        start: position of the first row: its number from 0 (Parquet), its first byte (CSV, JSONL).
        number: number of the first row for messages: its row or line, from 1.
        count: number of rows.
    """

    start: int
    number: int
    count: int


class TableRow(NamedTuple):
    """One row of a table.

    Attributes:
        number: for messages, from 1: the row (Parquet), or the line where it begins (CSV, JSONL).
        values: of the requested columns; None for null, which CSV does not have.
        problem: why there are no values, and a kind: "row" or "encoding"; None if the row is valid.
    """

    number: int
    values: tuple[Any, ...] = ()
    problem: tuple[str, str] | None = None


class TableFile(Protocol):
    """A file with rows.

    Attributes:
        path: the file.
        columns: their names.
        unit: what row numbers count: "row" or "line".
    """

    path: Path
    columns: list[str]
    unit: str

    def ranges(self, size: int) -> Iterator[RowRange]:
        """All rows, in ranges of `size`."""

    def rows(self, columns: Sequence[str], part: RowRange | None = None) -> Iterator[TableRow]:
        """The rows of a range, or of the whole file if None, in order."""


def open_table(path: Path) -> TableFile:
    """Opens a table; the ending of its name decides the format.

    Raises:
        ValueError: the file cannot be read in that format.
    """
    try:
        return _FORMATS.get(path.suffix.lower(), CsvTable)(path)
    except (ValueError, OSError) as error:  # pyarrow raises subclasses of both
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}; write it again") from error


def find_tables(path: Path, endings: Sequence[str], skip: Path | None = None) -> list[Path]:
    """The file itself, or all tables below a folder, sorted, without hidden files and those below `skip`."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in files_below(path, skip) if file.name.lower().endswith(tuple(endings)))


def as_name(value: Any) -> str:
    """The name of a sample in a cell: its text, or a number's digits; "" if the cell is empty.

    A column of integers with an empty cell becomes a column of floats, so `1.0` is read as `1`.

    >>> as_name(1.0), as_name(1.5), as_name(" a.jpg "), as_name(float("nan")), as_name(None)
    ('1', '1.5', ' a.jpg ', '', '')
    """
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float | Decimal) and value == value // 1:
        return str(int(value))
    return str(value)


def require(table: TableFile, columns: Sequence[str], remedy: str) -> None:
    """Checks that a table has each of the columns exactly once.

    Raises:
        ValueError: one is missing or duplicated; the message lists the table's columns and the remedy.
    """
    names = ", ".join(table.columns) or "none"
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{table.path} has no column {', '.join(missing)} (it has {names}); {remedy}")
    repeated = [column for column in columns if table.columns.count(column) > 1]
    if repeated:
        raise ValueError(f"{table.path} has more than one column {', '.join(repeated)} (it has {names}); rename them")


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds texts: plain, large or view strings, or a dictionary of them (pandas' category)."""
    from pyarrow.types import is_dictionary, is_large_string, is_string, is_string_view

    kind = kind.value_type if is_dictionary(kind) else kind
    return is_string(kind) or is_large_string(kind) or is_string_view(kind)


class ParquetTable:
    """A Parquet file, read by row groups, a few rows at a time. A list of texts is joined by spaces, as in JSONL."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        # pre_buffer would keep a whole row group in memory
        self._file = pq.ParquetFile(path, buffer_size=2**16, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.columns = list(self.schema.names)

    def is_text(self, column: str) -> bool:
        """Whether a column holds texts."""
        return is_text(self.schema.field(column).type)

    def ranges(self, size: int) -> Iterator[RowRange]:
        total = self._file.metadata.num_rows
        for start in range(0, total, size):
            yield RowRange(start, start + 1, min(size, total - start))

    def rows(self, columns: Sequence[str], part: RowRange | None = None) -> Iterator[TableRow]:
        metadata = self._file.metadata
        # small batches if rows may hold images
        size = 4096 if all(map(self.is_text, columns)) else 64
        start, end = (part.start, part.start + part.count) if part else (0, metadata.num_rows)
        first = 0  # row of the next group
        for group in range(metadata.num_row_groups):
            place, first = first, first + metadata.row_group(group).num_rows
            if first <= start or place >= end:
                continue
            for batch in self._file.iter_batches(size, [group], list(columns), use_threads=False):
                low, high = max(start - place, 0), min(end - place, batch.num_rows)
                if low < high:
                    yield from self._rows(batch.slice(low, high - low), columns, place + low)
                place += batch.num_rows

    def _rows(self, batch: Any, columns: Sequence[str], place: int) -> Iterator[TableRow]:
        try:
            rows = zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
        except UnicodeDecodeError as error:  # one invalid text makes the whole batch fail
            if batch.num_rows == 1:
                yield TableRow(place + 1, problem=(f"a text is not UTF-8: {error.reason}", "encoding"))
                return
            for row in range(batch.num_rows):
                yield from self._rows(batch.slice(row, 1), columns, place + row)
            return
        for row, values in enumerate(rows):
            yield TableRow(place + row + 1, tuple(map(_cell, values)))


def _ranges(records: Iterable[tuple[int, int, object]], size: int) -> Iterator[RowRange]:
    """Ranges of `size` records, each given by its first byte, its first line and its content."""
    places = ((place, line) for place, line, _ in records)
    while part := list(islice(places, size)):
        yield RowRange(*part[0], len(part))


class CsvTable:
    """A UTF-8 CSV file with a header line; quoted fields may contain separators, quotes and newlines.

    Fields are separated by commas, semicolons or tabs, whichever fits the first records best.
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._separator = max(",;\t", key=self._fit)  # the first of equals
        with path.open("rb") as file:
            # the header ends where the next record begins
            header = list(islice(self._records(file, 0), 2))
            if not header:
                raise ValueError("the file is empty: it has no header line")
            self._end = (header[1][0], header[1][1] - 1) if len(header) == 2 else (file.tell(), header[0][1])
        first = header[0][2]
        if isinstance(first, csv.Error) or not all(map(_is_text, first)):
            raise ValueError("its first line is not a UTF-8 header")
        self.columns = first

    def _fit(self, separator: str) -> tuple[bool, float, int]:
        """How well a separator fits: several columns, the share of records with as many as the header, and how many."""
        self._separator = separator
        with self.path.open("rb") as file:
            widths = [
                len(fields)
                for _, _, fields in islice(self._records(file, 0), _FIRST_RECORDS)
                if not isinstance(fields, csv.Error)
            ]
        return (widths[0] > 1, widths.count(widths[0]) / len(widths), widths[0]) if widths else (False, 0.0, 0)

    def ranges(self, size: int) -> Iterator[RowRange]:
        with self.path.open("rb") as file:
            file.seek(self._end[0])
            yield from _ranges(self._records(file, self._end[1]), size)

    def rows(self, columns: Sequence[str], part: RowRange | None = None) -> Iterator[TableRow]:
        start, line, count = (part.start, part.number - 1, part.count) if part else (*self._end, None)
        indices = [self.columns.index(column) for column in columns]
        with self.path.open("rb") as file:
            file.seek(start)
            for _, number, fields in islice(self._records(file, line), count):
                if isinstance(fields, csv.Error):
                    yield TableRow(number, problem=(f"it cannot be read as CSV: {fields}", "row"))
                elif len(fields) != len(self.columns):
                    reason = f"it has {len(fields)} fields, but the header has {len(self.columns)}"
                    yield TableRow(number, problem=(reason, "row"))
                else:
                    values = tuple([fields[index] for index in indices])
                    if all(map(_is_text, values)):
                        yield TableRow(number, values)
                    else:
                        bad = [column for column, value in zip(columns, values, strict=True) if not _is_text(value)]
                        yield TableRow(number, problem=(f"{', '.join(bad)} is not UTF-8", "encoding"))

    def _records(self, file: IO[bytes], line: int) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
        """First byte, first line and fields of each record from the file's position on; blank lines are skipped.

        An unclosed quote runs to the field size limit, and everything in it is one error.

        Args:
            file: positioned at the beginning of a record.
            line: number of the previous line.
        """
        place = file.tell()

        def lines() -> Iterator[str]:
            nonlocal place, line
            while data := file.readline(_LONGEST_LINE):
                text = data.removeprefix(codecs.BOM_UTF8) if place == 0 else data
                place += len(data)
                line += 1
                yield text.decode("utf-8", "surrogateescape")

        reader = csv.reader(lines(), delimiter=self._separator)
        while True:
            start, first = place, line + 1
            csv.field_size_limit(_LONGEST_FIELD)  # the limit is global to the process: other code may have changed it
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
    """Whether a decoded text was valid UTF-8."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class JsonlTable:
    """A UTF-8 file with a JSON object per line. The columns are the keys of the first objects.

    A list of texts is joined by spaces, because captions are often stored as lists of sentences. A column that an
    object lacks is null.
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            first = list(islice(self._records(file), _FIRST_OBJECTS))
        if not first:
            raise ValueError("the file is empty")
        if isinstance(first[0][2], str):
            raise ValueError(f"line {first[0][1]}: {first[0][2]}")
        self.columns = list(
            dict.fromkeys(name for _, _, record in first if isinstance(record, dict) for name in record)
        )

    def ranges(self, size: int) -> Iterator[RowRange]:
        with self.path.open("rb") as file:
            yield from _ranges(self._lines(file), size)

    def rows(self, columns: Sequence[str], part: RowRange | None = None) -> Iterator[TableRow]:
        with self.path.open("rb") as file:
            file.seek(part.start if part else 0)
            records = self._records(file, part.number - 1 if part else 0)
            for _, number, record in islice(records, part.count if part else None):
                if isinstance(record, str):
                    yield TableRow(number, problem=(record, "encoding" if "UTF-8" in record else "row"))
                else:
                    yield TableRow(number, tuple(_cell(record.get(column)) for column in columns))

    @staticmethod
    def _lines(file: IO[bytes], line: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """First byte, number and bytes of each line that is not blank, from the file's position on."""
        place = file.tell()
        while data := file.readline(_LONGEST_LINE):
            line += 1
            if data.strip():
                yield place, line, data
            place += len(data)

    def _records(self, file: IO[bytes], line: int = 0) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
        """First byte, line, and object or problem of each line."""
        for place, number, data in self._lines(file, line):
            try:
                value = json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
                record = value if isinstance(value, dict) else "it is not a JSON object"
            except UnicodeDecodeError:
                record = "it is not UTF-8"
            except ValueError as error:
                record = f"it is not JSON ({error})"
            yield place, number, record


def _cell(value: Any) -> Any:
    if isinstance(value, list) and all(part is None or isinstance(part, str) for part in value):
        return " ".join(part.strip() for part in value if part)
    return value


_FORMATS: dict[str, Callable[[Path], TableFile]] = {
    ".parquet": ParquetTable,
    ".jsonl": JsonlTable,
    ".jsonlines": JsonlTable,
}
