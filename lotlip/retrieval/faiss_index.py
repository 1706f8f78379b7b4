"""FAISS indexes beside files of `lotlip embed`: built, extended, and read memory-mapped for fast approximate search.

`pictures.parquet.faiss` is FAISS's file, followed by a record of the files that the index covers. FAISS does not read
beyond its own end. One file for both is replaced atomically, so they always belong together.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from lotlip.core.files import atomic_write, check_free, sha256_files
from lotlip.retrieval.index import Index, join, nearest, open_index

KINDS = ("hnsw", "ivf-pq", "flat")
EXACT_BELOW = 100_000  # items; search is exact below this
TOP = 10  # recall is measured, and effort chosen, at this number of results
RECALL = 0.97  # the effort of a search is the least that reaches this recall, with a margin over 0.95
_QUERIES = 200
_EFFORTS = {"hnsw": (16, 32, 64, 128, 256, 512, 1024), "ivf-pq": (4, 8, 16, 32, 64, 128, 256), "flat": (0,)}
_NEIGHBOURS, _CONSTRUCTION = 16, 40  # of HNSW: links per item, and candidates for them
_REFINE = 20  # candidates per result that IVF-PQ compares at full width
_ITERATIONS = 10  # of k-means; FAISS's default of 25 gains little
_PER_CLUSTER = 40  # training features per cluster of IVF-PQ
_MIN_IVF = 10_000  # items that the training of IVF-PQ needs
_ENDING = ".faiss"
_MARK = b"LoTLIPix"  # the last bytes of the file, after the length of the record

_Progress = Callable[[int, int], None]


class _Part(BaseModel):
    """A file of `lotlip embed` that an index covers.

    Attributes:
        path: relative to the folder of the index.
        rows: number of features.
        signatures: size and time of modification (ns) of the file, and of the file of its names if there is one.
        sha256: hash of these files.
    """

    model_config = ConfigDict(extra="forbid")
    path: str
    rows: int
    signatures: list[tuple[int, int]]
    sha256: str


class _Record(BaseModel):
    """What is stored after FAISS's own bytes, `size` of them; `effort` is HNSW's efSearch or IVF's nprobe."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    size: int
    effort: int
    parts: list[_Part]


class Built(NamedTuple):
    """What `build` and `add` wrote.

    Attributes:
        path: file of the index.
        kind: one of `KINDS`.
        rows: number of items.
        recall: share of the 10 nearest items, by exact search, that the index finds.
        queries: number of queries that recall was measured with.
        milliseconds: mean time of a query.
        effort: HNSW's efSearch or IVF's nprobe.
    """

    path: Path
    kind: str
    rows: int
    recall: float
    queries: int
    milliseconds: float
    effort: int


def faiss_file(embeddings: Path) -> Path:
    """The file of the FAISS index of a file of `lotlip embed`."""
    return embeddings.with_name(embeddings.name + _ENDING)


def build(
    embeddings: Path,
    kind: str | None = None,
    queries: Path | None = None,
    force: bool = False,
    on_progress: _Progress = lambda done, total: None,
) -> Built:
    """Builds the FAISS index of a file of features and measures its recall.

    Args:
        embeddings: written by `lotlip embed`.
        kind: "hnsw": a graph over float16 features. "ivf-pq": clusters of compressed features, of which the best are
            compared again in float16. "flat": all float32 features, exact. None: "ivf-pq", or "hnsw" for items that
            are too few for it.
        queries: features to measure recall with, by the same model; default: items of the index, which then do not
            count as their own results.
        force: replace a file that is not a FAISS index of this function.
        on_progress: called with the number of items added and the total.

    Raises:
        ValueError: the kind is unknown, the file is not one of `lotlip embed`, or it has too few items.
        ForeignFileError: the index would replace another file.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose {', '.join(KINDS)}")
    source = open_index(embeddings)
    kind = kind or ("ivf-pq" if source.size >= _MIN_IVF else "hnsw")
    out = faiss_file(embeddings)
    check_free(out, _is_ours, force, "the index")
    index = _new(kind, source, embeddings)
    return _write(out, kind, index, [(_part(out, embeddings, source), source)], [], queries, on_progress)


def add(
    embeddings: Path,
    more: Sequence[Path],
    queries: Path | None = None,
    on_progress: _Progress = lambda done, total: None,
) -> Built:
    """Adds files of features to the FAISS index of `embeddings`, without building it again.

    Raises:
        ValueError: there is no index, it does not match its files, or a file is of another model or has items that are
            already in it.
    """
    out = faiss_file(embeddings)
    if not out.is_file():
        raise ValueError(f"{embeddings} has no index to add to; build it with `lotlip index {embeddings}`")
    record = _read_record(out)
    covered = _open_parts(out, record)
    new: list[tuple[_Part, Index]] = []
    for path in more:
        source = open_index(path)
        part = _part(out, path, source)
        if part.sha256 in {one.sha256 for one in (*record.parts, *(one for one, _ in new))}:
            raise ValueError(f"{path} is already in {out}")
        for name in ("weights_sha256", "kind", "width"):
            if source.about[name] != covered[0].about[name]:
                raise ValueError(
                    f"{path} cannot be added to {out}: its {name} is {source.about[name]}, not that of "
                    f"{embeddings}, {covered[0].about[name]}; embed it with the same model"
                )
        for other in (*covered, *(one for _, one in new)):
            if both := _items_in_both(source, other):
                raise ValueError(
                    f"{path} has {len(both):,} items that are already in {out}, such as {min(both)[0]}; embed only the "
                    f"new ones, or {_rebuild(path)}"
                )
        new.append((part, source))
    index = _read_faiss(out)
    return _write(out, record.kind, index, new, list(zip(record.parts, covered, strict=True)), queries, on_progress)


def _items_in_both(one: Index, other: Index) -> set[tuple[str, str]]:
    """Names and texts of the items that two files of features have from one source."""
    if one.about.get("source") is None or one.about["source"] != other.about.get("source"):
        return set()
    items = ({(name, text or "") for name, text in file.rows(range(file.size)).values()} for file in (one, other))
    return set.intersection(*items)


def open_searchable(embeddings: Path, exact: bool = False) -> Index:
    """Opens a file of `lotlip embed` for search, with the files added to its FAISS index if there is one.

    Search uses the FAISS index, memory-mapped, if there are at least `EXACT_BELOW` items.

    Args:
        embeddings: written by `lotlip embed`.
        exact: search exactly, whatever the number of items.

    Raises:
        ValueError: the file is not one of `lotlip embed`, or the FAISS index is damaged or of other embeddings.
    """
    out = faiss_file(embeddings)
    if not out.is_file():
        return open_index(embeddings)
    record = _read_record(out)
    index = join(_open_parts(out, record))
    if exact or index.size < EXACT_BELOW:
        return index
    found = _read_faiss(out, mapped=True)
    if (found.ntotal, found.d) != (index.size, index.about["width"]):
        raise ValueError(f"{out} is damaged: it has {found.ntotal} items; {_rebuild(embeddings)}")

    def approximate(query: np.ndarray, top: int) -> list[tuple[float, int]]:
        # the effort was chosen for `TOP` results; more are in proportionally more clusters, or further in the graph
        _set_effort(found, math.ceil(record.effort * max(top / TOP, 1)))
        scores, rows = found.search(query[None].astype(np.float32), min(top, index.size))
        if (rows < 0).any():  # FAISS found fewer
            return nearest(index.blocks(), query, top)
        return list(zip(scores[0].tolist(), rows[0].tolist(), strict=True))

    return index._replace(approximate=approximate)


# --- FAISS ------------------------------------------------------------------------------------------------------------


def _new(kind: str, source: Index, path: Path) -> Any:
    import faiss

    width = source.about["width"]
    if kind == "ivf-pq":
        if source.size < _MIN_IVF:
            raise ValueError(f"{path} has {source.size:,} items; ivf-pq needs {_MIN_IVF:,}: use --kind hnsw or flat")
        clusters = 2 ** round(np.log2(4 * source.size**0.5))
        clusters = int(min(clusters, source.size // 39))  # FAISS warns below 39 training features per cluster
        bytes_per_item = max(size for size in range(1, max(width // 4, 1) + 1) if width % size == 0)
        # np: without polysemous training, which takes most of the time and serves Hamming distances, not used here
        spec = f"IVF{clusters},PQ{bytes_per_item}np,Refine(SQfp16)"
    else:
        clusters, spec = 1, "Flat" if kind == "flat" else f"HNSW{_NEIGHBOURS}_SQfp16"
    index: Any = faiss.index_factory(width, spec, faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = _CONSTRUCTION
    if kind == "ivf-pq":
        index.k_factor = _REFINE
        ivf: Any = faiss.downcast_index(index.base_index)
        ivf.cp.niter = ivf.pq.cp.niter = _ITERATIONS
    if not index.is_trained:
        index.train(_sample(source, max(_PER_CLUSTER * clusters, _MIN_IVF))[1])
    return index


def _set_effort(index: Any, effort: int) -> None:
    import faiss

    ivf: Any = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = effort
    elif hasattr(index, "hnsw"):
        index.hnsw.efSearch = effort


def _read_faiss(path: Path, mapped: bool = False) -> Any:
    import faiss

    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is damaged: FAISS cannot read it ({error}); {_rebuild(path.with_suffix(''))}"
        ) from error


# --- building ---------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    kind: str,
    index: Any,
    new: Sequence[tuple[_Part, Index]],
    covered: Sequence[tuple[_Part, Index]],
    queries: Path | None,
    on_progress: _Progress,
) -> Built:
    """Adds features to an index, chooses its effort and writes it."""
    import faiss

    total, done = sum(source.size for _, source in new), 0
    parts, sources = [part for part, _ in (*covered, *new)], [source for _, source in (*covered, *new)]
    on_progress(0, total)
    for _, source in new:
        for block in source.blocks():
            index.add(np.ascontiguousarray(block))
            done += len(block)
            on_progress(done, total)
    asked, truth, top = _truth(join(sources), queries)
    for effort in _EFFORTS[kind]:
        _set_effort(index, effort)
        index.search(asked[:1], top)  # the first query allocates
        start = time.perf_counter()
        found = [index.search(query[None], top)[1][0] for query in asked]
        milliseconds = (time.perf_counter() - start) / len(asked) * 1000
        recall = float(np.mean([np.isin(of, found_of).mean() for of, found_of in zip(truth, found, strict=True)]))
        if recall >= RECALL:
            break
    with atomic_write(out) as partial:
        faiss.write_index(index, str(partial))
        record = _Record(kind=kind, size=partial.stat().st_size, effort=effort, parts=parts)
        with partial.open("ab") as file:
            data = record.model_dump_json().encode()
            file.write(data + len(data).to_bytes(8, "little") + _MARK)
    return Built(out, kind, index.ntotal, recall, len(asked), milliseconds, effort)


def _truth(index: Index, queries: Path | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Queries [Q, D], the numbers of their nearest rows by exact search [Q, 10] at most, and how many to search for."""
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth

    if queries is None:
        rows, asked = _sample(index, _QUERIES)
    else:
        source = open_index(queries)
        if source.about["weights_sha256"] != index.about["weights_sha256"]:
            raise ValueError(f"{queries} was made by another model than the index; embed it with the same model")
        rows, asked = None, _sample(source, _QUERIES)[1]
    top = min(TOP + (rows is not None), index.size)
    _, truth = knn_ground_truth(asked, index.blocks(), top, metric_type=faiss.METRIC_INNER_PRODUCT)
    if rows is None or top == 1:
        return asked, truth, top
    # An item is its own nearest, so the search is for one more, and the item does not count.
    others = [of[of != row][: top - 1] for row, of in zip(rows, truth, strict=True)]
    return asked, np.stack(others), top


def _sample(index: Index, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [N] and features [N, D] of up to `number` rows, by chance but always the same."""
    rows = np.random.default_rng(0).choice(index.size, min(number, index.size), replace=False)
    rows.sort()
    blocks, start = [], 0
    for block in index.blocks():
        inside = rows[(rows >= start) & (rows < start + len(block))] - start
        blocks.append(block[inside])
        start += len(block)
    return rows, np.concatenate(blocks)


# --- the files of an index --------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """The files of features: the file itself and that of its names."""
    names = path.with_suffix(".names.jsonl")
    return [path, names] if path.suffix == ".npy" else [path]


def _signatures(path: Path) -> list[tuple[int, int]]:
    return [(status.st_size, status.st_mtime_ns) for status in (file.stat() for file in _files(path))]


def _part(out: Path, path: Path, source: Index) -> _Part:
    relative = os.path.relpath(path.resolve(), out.parent.resolve())
    return _Part(path=relative, rows=source.size, signatures=_signatures(path), sha256=sha256_files(_files(path)))


def _open_parts(out: Path, record: _Record) -> list[Index]:
    """Opens the files that an index covers, if they are those that it was built from."""
    first = (out.parent / record.parts[0].path).resolve()
    sources = []
    for part in record.parts:
        path = Path(os.path.normpath(out.parent / part.path))
        if not path.is_file():
            raise ValueError(f"{path}, which {out} covers, does not exist; restore it, or {_rebuild(first)}")
        source, signatures = open_index(path), _signatures(path)
        # Only the sizes and times are compared if they are equal: hashing gigabytes takes seconds.
        if signatures != part.signatures and (
            [size for size, _ in signatures] != [size for size, _ in part.signatures]
            or sha256_files(_files(path)) != part.sha256
        ):
            raise ValueError(f"{out} was built from another {path}, which has changed since; {_rebuild(first)}")
        sources.append(source)
    return sources


def _rebuild(path: Path) -> str:
    return f"build it again with `lotlip index {path}`"


def _is_ours(path: Path) -> bool:
    try:
        _read_record(path)
    except ValueError:
        return False
    return True


def _read_record(out: Path) -> _Record:
    try:
        with out.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(end - 16)
            length, mark = int.from_bytes(file.read(8), "little"), file.read(8)
            if mark != _MARK:
                raise ValueError("it does not end as one")
            file.seek(end - 16 - length)
            record = _Record.model_validate_json(file.read(length))
    except (ValueError, OSError) as error:  # ValidationError is a ValueError
        raise ValueError(
            f"{out} is damaged or is not an index of `lotlip index` ({' '.join(str(error).split())}); "
            f"{_rebuild(out.with_suffix(''))} --force"
        ) from error
    if record.kind not in KINDS or not record.parts or record.size != end - 16 - length:
        raise ValueError(f"{out} is damaged: its record does not fit it; {_rebuild(out.with_suffix(''))}")
    return record
