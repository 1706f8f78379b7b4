"""Reads rows of tables (`TABLES`) in small pieces from any position, however large the file is."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

from lotlip.core.listing import files_with_endings
from lotlip.data.fields import leaf_names, listed, values_at

# Endings of tables' names, with the kind of `ingest.source` that reads them.
TABLES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}

_LONGEST_LINE = 2**20  # bytes; a longer line is read in pieces, which are invalid rows; a longer object is an error
_PIECE = 2**16  # bytes of a JSON file that are read at once, or more if an object is longer
_LONGEST_FIELD = 2**17  # characters; an unclosed quote runs this far
_FIRST_RECORDS = 20  # of a CSV file, which tell its separator
_FIRST_OBJECTS = 100  # whose keys are a JSON file's columns; objects often lack keys without a value


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a table.

    Attributes:
        start: position of the first row: its number from 0 (Parquet), or its first byte.
        number: number of the first row for messages, from 1: its row, line or object.
        count: number of rows.
    """

    start: int
    number: int
    count: int


class TableRow(NamedTuple):
    """One row of a table.

    Attributes:
        number: for messages, from 1: the row (Parquet), the line where it begins (CSV, JSONL), or the object (JSON).
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
        unit: what row numbers count: "row", "line" or "object".
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
    with _readable(path, ValueError, OSError):  # pyarrow raises subclasses of both
        return _READERS[TABLES.get(path.suffix.lower(), "csv")](path)


class _OtherLayout(ValueError):
    """A file may be intact, but is no table."""


@contextmanager
def _readable(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of some kinds into errors that name the file and the remedy."""
    try:
        yield
    except kinds as error:
        remedy = "convert it" if isinstance(error, _OtherLayout) else "write it again"
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}; {remedy}") from error


def find_tables(path: Path, kind: str | None = None, skip: Path | None = None) -> list[Path]:
    """The file itself, or all tables below a folder, sorted, without hidden files and those below `skip`.

    Without a kind, JSON files beside tables of other kinds are metadata, such as the markers of finished units.

    Raises:
        ValueError: a table in the folder is compressed.
    """
    if not path.is_dir():
        return [path]
    if kind is not None:
        return files_with_endings(path, [ending for ending in TABLES if TABLES[ending] == kind], skip)
    tables = files_with_endings(path, [ending for ending in TABLES if ending != ".json"], skip)
    return tables or files_with_endings(path, [".json"], skip)


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
    names = listed(table.columns)
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

    Fields are separated by tabs if the file's name ends in .tsv, else by commas, semicolons or tabs, whichever fits the
    first records best. Programs seldom quote in a .tsv, so a quote is an ordinary character there unless quotes make a
    valid row.

    Args:
        path: the file.
        longest: characters of a field; a row with a longer one is invalid.
    """

    unit = "line"

    def __init__(self, path: Path, longest: int = _LONGEST_FIELD) -> None:
        self.path, self._longest = path, longest
        self.columns: list[str] = []
        self._tabs = path.suffix.lower() == ".tsv"
        separators = "\t" if self._tabs else ",;\t"
        self._separator = max(separators, key=self._fit)  # the first of equals
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
                    yield TableRow(number, problem=(_widths(len(fields), len(self.columns)), "row"))
                else:
                    values = tuple([fields[index] for index in indices])
                    if all(map(_is_text, values)):
                        yield TableRow(number, values)
                    else:
                        bad = [column for column, value in zip(columns, values, strict=True) if not _is_text(value)]
                        yield TableRow(number, problem=(f"{', '.join(bad)} is not UTF-8", "encoding"))

    def _records(self, file: IO[bytes], line: int) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
        """First byte, first line and fields of each record from the file's position on; blank lines are skipped.

        A quote may join lines that are rows of their own. So if several lines together are no valid row, only the first
        is used, as an error or (in a .tsv) without quoting, and the next record begins on the second.

        Args:
            file: positioned at the beginning of a record.
            line: number of the previous line.
        """
        if file.tell() == 0 and file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        lines: list[str] = []  # of one record
        ends: list[int] = []  # byte after each of them
        ended, width, place = False, len(self.columns), file.tell()

        def following() -> Iterator[str]:
            nonlocal ended
            while data := file.readline(max(_LONGEST_LINE, self._longest)):
                lines.append(data.decode("utf-8", "surrogateescape"))
                ends.append((ends[-1] if ends else place) + len(data))
                yield lines[-1]
            ended = True

        reader = self._reader(following(), strict=True)
        while True:
            lines.clear()
            ends.clear()
            csv.field_size_limit(self._longest)  # the limit is global to the process: other code may have changed it
            try:
                fields: list[str] | csv.Error = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fields = error
            start, number, used = place, line + 1, len(lines)
            if isinstance(fields, csv.Error) or (used > 1 and self._are_rows(lines, fields, width)):
                fields, used = self._alone(lines, fields, ended, width), 1
            place, line = ends[used - 1], line + used
            if used < len(lines):
                file.seek(place)
                ended, reader = False, self._reader(following(), strict=True)
            if fields:
                width = width or (0 if isinstance(fields, csv.Error) else len(fields))
                yield start, number, fields

    def _reader(self, lines: Iterable[str], **settings: Any) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._separator, **settings)

    def _are_rows(self, lines: Sequence[str], fields: list[str], width: int) -> bool:
        """Whether lines that quotes join to a record are no row of the header's width, or one each."""
        if len(fields) != width > 0:
            return True
        rows = [self._unquoted_fields(line) for line in lines]
        split = [row for row in rows if isinstance(row, list) and len(row) == width]
        # lines of a text may have as many separators, but no names alike
        return width > 1 and len(split) == len(rows) and any(map(_are_alike, zip(*split, strict=True)))

    def _unquoted_fields(self, line: str) -> list[str] | csv.Error:
        try:
            return next(self._reader([line], quoting=csv.QUOTE_NONE))
        except csv.Error as error:
            return error

    def _alone(
        self, lines: Sequence[str], fields: list[str] | csv.Error, ended: bool, width: int
    ) -> list[str] | csv.Error:
        """The fields of the first of lines that are no record, or why it has none.

        Args:
            lines: of the file, up to the fault.
            fields: of the lines together, or why there are none.
            ended: whether a quote is not closed up to the end of the file.
            width: number of the header's fields.
        """
        if self._tabs:
            return self._unquoted_fields(lines[0])
        if ended:
            return csv.Error("a quote is not closed up to the end of the file")
        if isinstance(fields, list) and len(fields) != width:
            return csv.Error(f"with the lines that a quote joins to it, {_widths(len(fields), width)}")
        if len(lines) > 1:
            more = "line" if len(lines) == 2 else f"{len(lines) - 1:,} lines"
            return csv.Error(f"a stray quote joins it with the next {more}; remove or double the quote")
        line = iter([lines[0], ""])
        try:
            fields = next(self._reader(line))  # text after a closing quote is accepted
        except csv.Error as error:
            return error
        return fields if next(line, None) is not None else csv.Error("a quote is not closed at its end")


def _are_alike(cells: Sequence[str]) -> bool:
    """Whether the cells of a column are names of one kind: paths with one ending, or letters and digits alike.

    >>> _are_alike(["a.jpg", "b/c.JPG"]), _are_alike(["img1", "img22"]), _are_alike(["1", "23"])
    (True, True, True)
    >>> _are_alike(["a.jpg", "1"]), _are_alike(["img1", "1"]), _are_alike(["dog", "cat"]), _are_alike(["a 1", "a 2"])
    (False, False, False, False)
    """
    kinds = set()
    for cell in cells:
        name = cell.strip().strip('"').lower()
        ending = PurePosixPath(name).suffix
        letters = re.sub(r"[0-9]+", "0", re.sub(r"[^\W\d_]+", "a", name))
        kind = ending or (letters if "0" in letters else "")
        kinds.add(None if " " in kind else kind or None)
    return len(kinds) == 1 and None not in kinds


def _widths(fields: int, header: int) -> str:
    return f"it has {fields} fields, but the header has {header}"


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
    """A UTF-8 file with a JSON object per line. The columns are the values of the first objects, also nested ones.

    A nested value's column has a dotted name, such as `meta.caption` or `conversations.1.value`. A list of texts is
    joined by spaces, because captions are often stored as lists of sentences. A column that an object lacks is null.
    """

    unit = "line"
    _start = 0  # first byte of the first object

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            file.seek(self._start)
            first = list(islice(self._records(file), _FIRST_OBJECTS))
        if not first:
            raise ValueError("the file is empty")
        if isinstance(first[0][2], str):
            raise ValueError(f"{self.unit} {first[0][1]}: {first[0][2]}")
        self.columns = list(
            dict.fromkeys(name for _, _, record in first if isinstance(record, dict) for name in leaf_names(record))
        )

    def ranges(self, size: int) -> Iterator[RowRange]:
        with self.path.open("rb") as file:
            yield from _ranges(self._lines(file), size)

    def rows(self, columns: Sequence[str], part: RowRange | None = None) -> Iterator[TableRow]:
        with self.path.open("rb") as file:
            file.seek(part.start if part else self._start)
            records = self._records(file, part.number - 1 if part else 0)
            for _, number, record in islice(records, part.count if part else None):
                if isinstance(record, str):
                    yield TableRow(number, problem=(record, "encoding" if "UTF-8" in record else "row"))
                    continue
                values = tuple([_value(record, column) for column in columns])
                bad = [name for name, value in zip(columns, values, strict=True) if not _is_encodable(value)]
                if bad:  # JSON can escape half of an emoji, for example where a model's caption was cut
                    yield TableRow(number, problem=(f"{', '.join(bad)} is not UTF-8: lone surrogate", "encoding"))
                else:
                    yield TableRow(number, values)

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
        """First byte, line, and object or problem of each line, from the file's position on."""
        for place, number, data in self._lines(file, line):
            yield place, number, _object(data)


def _object(line: bytes) -> dict[str, Any] | str:
    """The JSON object in a line, or what is wrong with the line."""
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError:
        return "it is not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return value if isinstance(value, dict) else "it is not a JSON object"


def has_object_lines(path: Path) -> bool:
    """Whether the first two lines of a file are JSON objects. One object alone is no table."""
    with path.open("rb") as file:
        if _LIST.match(file.read(_PIECE)):  # a list's first line may be long
            return False
        file.seek(0)
        first = list(islice(JsonlTable._lines(file), 2))
    return len(first) == 2 and all(isinstance(_object(data), dict) for _, _, data in first)


class JsonTable(JsonlTable):
    """A UTF-8 JSON file whose value is a list of objects. Columns are as in JSONL."""

    unit = "object"

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            head = _LIST.match(file.read(_PIECE))
        if head is None:
            raise _OtherLayout(
                'it has neither a list of objects, as in [{"image": "a.jpg", "caption": "a dog"}, …], nor two or more '
                "lines with an object in each; an object of names and captions, or of lists (as COCO's), is no table"
            )
        if head[1]:
            raise ValueError("its list is empty")
        self._start = head.end()
        super().__init__(path)

    def ranges(self, size: int) -> Iterator[RowRange]:
        with _readable(self.path, ValueError), self.path.open("rb") as file:
            file.seek(self._start)
            yield from _ranges(self._records(file), size)

    def rows(self, columns: Sequence[str], part: RowRange | None = None) -> Iterator[TableRow]:
        with _readable(self.path, ValueError):
            yield from super().rows(columns, part)

    def _records(self, file: IO[bytes], number: int = 0) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
        """First byte, number, and object or problem of each element, from the file's position on.

        Args:
            file: positioned at the beginning of an element.
            number: of the previous element.

        Raises:
            ValueError: the rest of the file is not the rest of a list, or an element is too long.
        """
        place, text, start = file.tell(), "", 0  # text[start] is byte `place` of the file
        decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        while True:
            try:
                first = _after_blanks(text, start)
                value, end = _DECODER.raw_decode(text, first)
                if end - first > _LONGEST_LINE:
                    raise json.JSONDecodeError("it ends", text, end)
                end = _after_blanks(text, end) + 1
                if text[end - 1 : end] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end - 1)
            except (ValueError, RecursionError) as error:  # also if the element goes on after the text that was read
                held = len(text) - start
                # as much again as there is, so that the text is decoded twice at most on average
                data = file.read(max(held, _PIECE)) if held < 2 * _LONGEST_LINE else b""
                if data:
                    text, start = text[start:] + decode(data), 0
                    continue
                reason = str(getattr(error, "msg", error)).removesuffix(" at")
                where = place + _size(text[start : getattr(error, "pos", start)])
                raise ValueError(
                    f"object {number + 1} is broken, or longer than {_LONGEST_LINE:,} characters ({reason} at byte "
                    f"{where:,})"
                ) from error
            number += 1
            record = value if isinstance(value, dict) else "it is not a JSON object"
            yield place + first - start, number, record if _is_text(text[first:end]) else "it is not UTF-8"
            place += _size(text[start:end])
            start = end
            if text[end - 1] == "]":
                break
        file.seek(place)
        while data := file.read(_PIECE):
            if data.strip(b" \t\r\n"):
                raise ValueError(f"after the list, which ends at byte {place:,}, there is more than blanks")


_DECODER = json.JSONDecoder()
_LIST = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*(\]?)")
_BLANKS = re.compile(r"[ \t\r\n]*")


def _after_blanks(text: str, position: int) -> int:
    return _BLANKS.match(text, position).end()  # type: ignore[union-attr]  # it always matches


def _size(text: str) -> int:
    """Bytes in the file of a text that was decoded from it."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _is_encodable(value: Any) -> bool:
    return not isinstance(value, str) or _is_text(value)


def _value(record: dict[str, Any], column: str) -> Any:
    """The value in a column, or null."""
    if column in record:
        return _cell(record[column])
    try:
        (suffix, value), *more = values_at(record, column)
    except LookupError:
        return None
    return _cell([value, *(other for _, other in more)]) if suffix else value


def _cell(value: Any) -> Any:
    if isinstance(value, list) and all(part is None or isinstance(part, str) for part in value):
        return " ".join(part.strip() for part in value if part)
    return value


def _json_table(path: Path) -> JsonlTable:
    """Opens a list of objects, or an object per line, which many programs name .json too."""
    return JsonlTable(path) if has_object_lines(path) else JsonTable(path)


_READERS: dict[str, Callable[[Path], TableFile]] = {
    "csv": CsvTable,
    "jsonl": JsonlTable,
    "json": _json_table,
    "parquet": ParquetTable,
}
