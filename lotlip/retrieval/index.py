"""Files of features that remember their model: written as they come, searched without being held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lotlip.core.files import atomic_write, check_free, not_a_file

_GROUP = 4096  # rows of a Parquet file that are written, and later searched, at a time
_BLOCK = 16384  # rows of a .npy file that are searched at a time
_ABOUT = "lotlip"  # the key of what an index says of itself


class Rows(NamedTuple):
    """Features with what they are of; images have no texts."""

    names: Sequence[str]
    texts: Sequence[str] | None
    features: np.ndarray  # float32 [N, D]


class Index(NamedTuple):
    """An index on disk.

    Attributes:
        about: "model", "weights_sha256", "kind" and "width", the D of its features; "source" and "split" of what was
            embedded, in all but the oldest indexes.
        blocks: gives the features, some rows [N, D] at a time.
        rows: number of a row → its name and text.
    """

    about: Mapping[str, Any]
    blocks: Callable[[], Iterator[np.ndarray]]
    rows: Callable[[Sequence[int]], dict[int, tuple[str, str | None]]]


def index_writer(out: Path, about: Mapping[str, Any]) -> AbstractContextManager[Callable[[Rows], None]]:
    """A block that is given a function to write rows with. The index is there, atomic_write, when the block ends well.

    Args:
        out: a .parquet file: columns name, text (of kind "texts") and embedding, `about` in the schema's metadata; or a
            .npy file: an array [N, D], with names, texts and `about` beside it in `<stem>.names.jsonl`.
        about: as of `Index`.

    Raises:
        ValueError: the ending is another.
    """
    return _format(out).writer(out, about)


def open_index(path: Path) -> Index:
    """Opens what `index_writer` wrote.

    Raises:
        ValueError: it is not there, or not such a file. Its blocks raise one where a feature has NaN or infinity, or
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
                f"the index {path} is broken: row {start + int(broken[0])} has NaN or infinity; write it again with "
                "`lotlip embed` and an intact model"
            )
        yield block
        start += len(block)


def nearest(blocks: Iterable[np.ndarray], query: np.ndarray, top: int) -> list[tuple[float, int]]:
    """Score and number of the best rows, best first; of equal ones, the earlier first.

    Args:
        blocks: features, [N, D] each.
        query: a feature, [D].
        top: how many rows.
    """
    scores, rows, start = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64), 0
    for block in blocks:
        # summed in float64 and then rounded, so that equal rows score the same wherever they are in a block
        new = (block @ query.astype(np.float64)).astype(np.float32)
        scores, rows = np.append(scores, new), np.append(rows, np.arange(start, start + len(new)))
        best = np.argsort(-scores, kind="stable")[:top]
        scores, rows = scores[best], rows[best]
        start += len(new)
    return list(zip(scores.tolist(), rows.tolist(), strict=True))


# --- Parquet ----------------------------------------------------------------------------------------------------------


@contextmanager
def _write_parquet(out: Path, about: Mapping[str, Any]) -> Iterator[Callable[[Rows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = [pa.field("text", pa.string())] if about["kind"] == "texts" else []
    embedding = pa.field("embedding", pa.list_(pa.float32(), about["width"]))
    schema = pa.schema(
        [pa.field("name", pa.string()), *text, embedding], metadata={_ABOUT: json.dumps(about, allow_nan=False)}
    )
    held: list[pa.RecordBatch] = []

    # hardly a feature comes twice: a dictionary of them would only be tried and given up
    with atomic_write(out) as partial, pq.ParquetWriter(partial, schema, use_dictionary=False) as writer:

        def write(rows: Rows) -> None:
            texts = [] if rows.texts is None else [pa.array(rows.texts, pa.string())]
            features = pa.FixedSizeListArray.from_arrays(pa.array(rows.features.ravel()), about["width"])
            held.append(pa.record_batch([pa.array(rows.names, pa.string()), *texts, features], schema=schema))
            if sum(len(batch) for batch in held) >= _GROUP:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_batches(held, schema))
            held.clear()

        yield write
        if held:
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
        except (pa.ArrowException, OSError) as error:  # a damaged page shows only when it is read
            raise _damaged(path, "Parquet", error) from error

    def blocks() -> Iterator[np.ndarray]:
        for group in groups:
            column = read(group, ["embedding"]).column(0).combine_chunks()
            yield column.flatten().to_numpy().reshape(-1, about["width"])

    def rows(wanted: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        found: dict[int, tuple[str, str | None]] = {}
        start = 0
        for group in groups:
            end = start + file.metadata.row_group(group).num_rows
            if inside := [row for row in wanted if start <= row < end]:
                table = read(group, columns).take([row - start for row in inside]).to_pylist()
                found |= {row: (one["name"], one.get("text")) for row, one in zip(inside, table, strict=True)}
            start = end
        return found

    return Index(about, blocks, rows)


# --- NumPy ------------------------------------------------------------------------------------------------------------


@contextmanager
def _write_npy(out: Path, about: Mapping[str, Any]) -> Iterator[Callable[[Rows], None]]:
    count = 0
    with (
        atomic_write(_names_file(out)) as partial_names,
        atomic_write(out) as partial,
        partial_names.open("w", encoding="utf-8") as names,
        partial.open("wb") as array,
    ):

        def write(rows: Rows) -> None:
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
        _write_header(array, count, about["width"])  # of the same length: NumPy leaves room for any number


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


def _open_npy(path: Path) -> Index:
    names = _names_file(path)
    if not names.is_file():
        fault = not_a_file(names)
        raise ValueError(f"{names}, which names the rows of {path}, {fault}; write both with `lotlip embed`")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(path, "a NumPy array", error) from error
    with names.open("rb") as file:
        about = _about(names, file.readline(), _ABOUT)
        lines = sum(1 for _ in file)
    if array.shape != (lines, about["width"]):
        raise ValueError(f"{path} is of shape {array.shape}, but {names} names {lines} rows; write both anew")
    if array.dtype != np.float32:
        raise _damaged(path, "an index", f"its numbers are {array.dtype}")

    def blocks() -> Iterator[np.ndarray]:
        return (array[start : start + _BLOCK] for start in range(0, len(array), _BLOCK))

    def rows(wanted: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        numbers = set(wanted)
        with names.open(encoding="utf-8") as file:
            lines = {row: line for row, line in enumerate(islice(file, 1, None)) if row in numbers}
        try:
            found = {row: json.loads(line) for row, line in lines.items()}
        except ValueError as error:
            raise _damaged(names, "JSON lines", error) from error
        return {row: (one["name"], one.get("text")) for row, one in found.items()}

    return Index(about, blocks, rows)


def _names_file(path: Path) -> Path:
    return path.with_suffix(".names.jsonl")


# --- where a user wants one -------------------------------------------------------------------------------------------


def check_free_index(out: Path, force: bool = False) -> None:
    """Checks, before any work is done, that an index can be written, and replaces nothing but an index.

    Args:
        out: of the index.
        force: replace any regular file.

    Raises:
        ValueError: it cannot be written there.
        ForeignFileError: another file is there.
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


# --- either -----------------------------------------------------------------------------------------------------------


def _about(path: Path, data: bytes, key: str | None = None) -> Mapping[str, Any]:
    """What an index says of itself, from JSON."""
    try:
        about = json.loads(data)
        about = about[key] if key else about
        return {**about, **{name: about[name] for name in ("model", "weights_sha256", "kind", "width")}}
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} does not say which model made it; write an index with `lotlip embed`") from error


def _damaged(path: Path, what: str, error: object) -> ValueError:
    return ValueError(f"{path} cannot be read as {what} ({error}); it is damaged: write it again with `lotlip embed`")


class _Format(NamedTuple):
    writer: Callable[[Path, Mapping[str, Any]], AbstractContextManager[Callable[[Rows], None]]]
    opener: Callable[[Path], Index]


_FORMATS = {".parquet": _Format(_write_parquet, _open_parquet), ".npy": _Format(_write_npy, _open_npy)}


def _format(path: Path) -> _Format:
    if path.suffix not in _FORMATS:
        raise ValueError(f"the index {path} has none of the endings {', '.join(_FORMATS)}, which say how it is written")
    return _FORMATS[path.suffix]
