"""Indexes: files of features with metadata about their model, written in batches and searched in blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lotlip.core.files import atomic_write, check_free, not_a_file

_GROUP = 4096  # rows per row group of a Parquet file
_BLOCK = 16384  # rows of a .npy file searched at a time
_ABOUT = "lotlip"  # the key of an index's metadata


class IndexRows(NamedTuple):
    """Features with the names and, for texts, the texts of their items."""

    names: Sequence[str]
    texts: Sequence[str] | None
    features: np.ndarray  # float32 [N, D]


class Index(NamedTuple):
    """An index on disk.

    Attributes:
        about: metadata: "model", "weights_sha256", "kind" and "width", the dimension D of features; "source" and
            "split" of the embedded items, except in the oldest indexes.
        size: number of rows.
        blocks: yields the features in blocks [N, D].
        rows: numbers of rows → their names and texts.
        approximate: finds scores and numbers of about the best rows like `nearest`, faster; None: search exactly.
        parts: the indexes that this one joins, in order; empty if it is one file.
    """

    about: Mapping[str, Any]
    size: int
    blocks: Callable[[], Iterator[np.ndarray]]
    rows: Callable[[Sequence[int]], dict[int, tuple[str, str | None]]]
    approximate: Callable[[np.ndarray, int], list[tuple[float, int]]] | None = None
    parts: tuple[Index, ...] = ()

    def about_row(self, row: int) -> Mapping[str, Any]:
        """Returns the metadata of the file that contains a row."""
        for part in self.parts:
            if row < part.size:
                return part.about
            row -= part.size
        return self.about


def join(parts: Sequence[Index]) -> Index:
    """Returns one index of the rows of several, in order."""
    if len(parts) == 1:
        return parts[0]

    def blocks() -> Iterator[np.ndarray]:
        for part in parts:
            yield from part.blocks()

    def rows(numbers: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        by_number: dict[int, tuple[str, str | None]] = {}
        start = 0
        for part in parts:
            inside = [row - start for row in numbers if start <= row < start + part.size]
            if inside:
                by_number |= {start + row: one for row, one in part.rows(inside).items()}
            start += part.size
        return by_number

    return Index(parts[0].about, sum(part.size for part in parts), blocks, rows, parts=tuple(parts))


def index_writer(out: Path, about: Mapping[str, Any]) -> AbstractContextManager[Callable[[IndexRows], None]]:
    """Context manager that yields a function to write rows with; the index is written atomically.

    Args:
        out: a .parquet file with columns name, text (kind "texts") and embedding, and `about` in the schema's metadata;
            or a .npy file with an array [N, D], and names, texts and `about` in `<stem>.names.jsonl`.
        about: metadata, see `Index`.

    Raises:
        ValueError: the suffix is neither .parquet nor .npy.
    """
    return _format(out).writer(out, about)


def open_index(path: Path) -> Index:
    """Opens an index.

    Raises:
        ValueError: the file is missing or is not an index. `Index.blocks` raises it if a feature has NaN or infinity or
            the file is damaged.
    """
    kind = _format(path)
    if not path.is_file():
        raise ValueError(f"the index {path} {not_a_file(path)}; write it with `lotlip embed`")
    index = kind.opener(path)
    return index._replace(blocks=lambda: _finite(path, index.blocks()))


def _finite(path: Path, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    start = 0
    for block in blocks:
        broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(broken):
            raise ValueError(
                f"the index {path} is broken: row {start + int(broken[0])} has NaN or infinity; rewrite it with "
                "`lotlip embed` and an intact model"
            )
        yield block
        start += len(block)


def nearest(blocks: Iterable[np.ndarray], query: np.ndarray, top: int) -> list[tuple[float, int]]:
    """Returns score and number of the best rows, best first; ties are in index order.

    Args:
        blocks: features, [N, D] each.
        query: a feature, [D].
        top: number of rows.
    """
    scores, rows, start = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64), 0
    for block in blocks:
        # Float64 sums are rounded to float32, so that equal rows have equal scores at any position in a block.
        new = (block @ query.astype(np.float64)).astype(np.float32)
        scores, rows = np.append(scores, new), np.append(rows, np.arange(start, start + len(new)))
        best = np.argsort(-scores, kind="stable")[:top]
        scores, rows = scores[best], rows[best]
        start += len(new)
    return list(zip(scores.tolist(), rows.tolist(), strict=True))


# --- Parquet ----------------------------------------------------------------------------------------------------------


@contextmanager
def _write_parquet(out: Path, about: Mapping[str, Any]) -> Iterator[Callable[[IndexRows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = [pa.field("text", pa.string())] if about["kind"] == "texts" else []
    embedding = pa.field("embedding", pa.list_(pa.float32(), about["width"]))
    schema = pa.schema(
        [pa.field("name", pa.string()), *text, embedding], metadata={_ABOUT: json.dumps(about, allow_nan=False)}
    )
    buffered: list[pa.RecordBatch] = []

    # Features are almost all distinct, so dictionary encoding would be wasted.
    with atomic_write(out) as partial, pq.ParquetWriter(partial, schema, use_dictionary=False) as writer:

        def write(rows: IndexRows) -> None:
            texts = [] if rows.texts is None else [pa.array(rows.texts, pa.string())]
            features = pa.FixedSizeListArray.from_arrays(pa.array(rows.features.ravel()), about["width"])
            buffered.append(pa.record_batch([pa.array(rows.names, pa.string()), *texts, features], schema=schema))
            if sum(len(batch) for batch in buffered) >= _GROUP:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_batches(buffered, schema))
            buffered.clear()

        yield write
        if buffered:
            flush()


def _open_parquet(path: Path) -> Index:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from error
    schema, groups = file.schema_arrow, range(file.num_row_groups)
    about = _about(path, (schema.metadata or {}).get(_ABOUT.encode(), b"null"))
    columns = [name for name in ("name", "text") if name in schema.names]

    def read(group: int, names: list[str]) -> pa.Table:
        try:
            return file.read_row_group(group, names)
        except (pa.ArrowException, OSError) as error:  # damaged pages are only detected when they are read
            raise _damaged(path, "Parquet", error) from error

    def blocks() -> Iterator[np.ndarray]:
        for group in groups:
            column = read(group, ["embedding"]).column(0).combine_chunks()
            yield column.flatten().to_numpy().reshape(-1, about["width"])

    def rows(numbers: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        by_number: dict[int, tuple[str, str | None]] = {}
        start = 0
        for group in groups:
            end = start + file.metadata.row_group(group).num_rows
            if inside := [row for row in numbers if start <= row < end]:
                table = read(group, columns).take([row - start for row in inside]).to_pylist()
                by_number |= {row: (one["name"], one.get("text")) for row, one in zip(inside, table, strict=True)}
            start = end
        return by_number

    return Index(about, file.metadata.num_rows, blocks, rows)


# --- NumPy ------------------------------------------------------------------------------------------------------------


@contextmanager
def _write_npy(out: Path, about: Mapping[str, Any]) -> Iterator[Callable[[IndexRows], None]]:
    count = 0
    with (
        atomic_write(_names_file(out)) as partial_names,
        atomic_write(out) as partial,
        partial_names.open("w", encoding="utf-8") as names,
        partial.open("wb") as array,
    ):

        def write(rows: IndexRows) -> None:
            nonlocal count
            count += len(rows.names)
            array.write(rows.features.astype("<f4").tobytes())
            texts: Sequence[str | None] = rows.texts or [None] * len(rows.names)
            for name, text in zip(rows.names, texts, strict=True):
                row = {"name": name} if text is None else {"name": name, "text": text}
                names.write(json.dumps(row, allow_nan=False) + "\n")

        names.write(json.dumps({_ABOUT: about}, allow_nan=False) + "\n")
        _write_header(array, 0, about["width"])
        yield write
        array.seek(0)
        _write_header(array, count, about["width"])  # NumPy pads headers, so this one has the same length


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


def _open_npy(path: Path) -> Index:
    names = _names_file(path)
    if not names.is_file():
        problem = not_a_file(names)
        raise ValueError(f"{names}, which names the rows of {path}, {problem}; rewrite both with `lotlip embed`")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(path, "a NumPy array", error) from error
    with names.open("rb") as file:
        about = _about(names, file.readline(), _ABOUT)
        starts = np.cumsum([file.tell(), *map(len, file)])  # where each line starts, and the end
        lines = mmap(file.fileno(), 0, access=ACCESS_READ)  # of this file, also when it has been replaced
    if array.shape != (len(starts) - 1, about["width"]):
        raise ValueError(
            f"{path} has shape {array.shape}, but {names} names {len(starts) - 1} rows; rewrite both with "
            "`lotlip embed`"
        )
    if array.dtype != np.float32:
        raise _damaged(path, "an index", f"its dtype is {array.dtype}")

    def blocks() -> Iterator[np.ndarray]:
        return (array[start : start + _BLOCK] for start in range(0, len(array), _BLOCK))

    def rows(numbers: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        try:
            records = {row: json.loads(lines[starts[row] : starts[row + 1]]) for row in set(numbers)}
        except ValueError as error:
            raise _damaged(names, "JSON lines", error) from error
        return {row: (one["name"], one.get("text")) for row, one in records.items()}

    return Index(about, len(array), blocks, rows)


def _names_file(path: Path) -> Path:
    return path.with_suffix(".names.jsonl")


# --- checks before writing --------------------------------------------------------------------------------------------


def check_free_index(out: Path, force: bool = False) -> None:
    """Checks, before any work is done, that an index can be written and would replace only an index.

    Args:
        out: file of the index.
        force: allow replacing any regular file.

    Raises:
        ValueError: the index cannot be written there.
        ForeignFileError: it would replace another file.
    """
    _format(out)
    check_free(out, _is_index, force)
    if out.suffix == ".npy":
        check_free(_names_file(out), _is_names, force, f"--out {out} also writes")


def _is_index(path: Path) -> bool:
    if path.suffix == ".npy":
        return _is_names(_names_file(path))
    import pyarrow.parquet as pq

    try:
        return _ABOUT.encode() in (pq.read_schema(path).metadata or {})
    except (OSError, ValueError):
        return False


def _is_names(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            _about(path, file.readline(), _ABOUT)
    except (OSError, ValueError):
        return False
    return True


# --- both formats -----------------------------------------------------------------------------------------------------


def _about(path: Path, data: bytes, key: str | None = None) -> Mapping[str, Any]:
    """Reads the metadata of an index from JSON."""
    try:
        about = json.loads(data)
        about = about[key] if key else about
        return {**about, **{name: about[name] for name in ("model", "weights_sha256", "kind", "width")}}
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is not an index: it names no model; write one with `lotlip embed`") from error


def _damaged(path: Path, what: str, error: object) -> ValueError:
    return ValueError(f"{path} is damaged: it cannot be read as {what} ({error}); rewrite it with `lotlip embed`")


class _Format(NamedTuple):
    writer: Callable[[Path, Mapping[str, Any]], AbstractContextManager[Callable[[IndexRows], None]]]
    opener: Callable[[Path], Index]


_FORMATS = {".parquet": _Format(_write_parquet, _open_parquet), ".npy": _Format(_write_npy, _open_npy)}


def _format(path: Path) -> _Format:
    if path.suffix not in _FORMATS:
        raise ValueError(f"the index {path} has an unknown suffix; use {' or '.join(_FORMATS)}")
    return _FORMATS[path.suffix]
