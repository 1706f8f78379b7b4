"""Samples of WebDataset tars at any place: an index beside each tar says where they lie.

`train-000000.tar` stays what any user of webdataset reads; `train-000000.index.arrow` has a row for each of its samples
and is mapped into memory, so that a process pays for the rows it looks at. A tar without one is scanned when opened.
"""

from __future__ import annotations

import os
import re
import tarfile
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from lotlip.files import whole

INDEX = ".index.arrow"

# What of a sample is used; "image" is its first file that is neither of the others.
MEMBERS = ("json", "npy", "image")

# Where the first byte lies in the tar, and how many there are; both are 0 where a sample has no such file.
COLUMNS = pa.schema(
    [("key", pa.string()), *((f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "size"))]
)

# A file's key ends at the first dot of its name, as webdataset has it; names as __this__ are its own.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_RESERVED = re.compile(r"__[^/]*__($|/)")

RawSample = dict[str, Any]  # "__key__", "__url__", and the bytes of the members that were asked for


def index_path(tar: Path) -> Path:
    """Where a tar's index is, or would be."""
    return tar.with_suffix(INDEX)


def scan_tar(tar: Path) -> pa.RecordBatch:
    """Finds the samples of a tar by reading the headers of its files: the index, with the columns of `COLUMNS`.

    Raises:
        ValueError: it is not there or not an uncompressed tar, or a sample has no .json or has one twice.
    """
    rows: list[dict[str, Any]] = []
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                name = _NAME.fullmatch(member.name)
                if not member.isreg() or name is None or _RESERVED.match(member.name):
                    continue
                key, ending = name.groups()
                if not rows or rows[-1]["key"] != key:
                    rows.append({**dict.fromkeys(COLUMNS.names, 0), "key": key})
                kind = ending.lower() if ending.lower() in MEMBERS[:2] else "image"
                if kind == "image" and rows[-1]["image_offset"]:
                    continue
                if rows[-1][f"{kind}_offset"]:
                    raise ValueError(
                        f"{tar}: sample {key} has two files .{kind}; its key must be another sample's, too"
                    )
                rows[-1] |= {f"{kind}_offset": member.offset_data, f"{kind}_size": member.size}
    except FileNotFoundError as error:
        raise ValueError(f"{tar} is not there, but index.json lists it; write the shards again") from error
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is not an uncompressed tar ({error}); write it again") from error
    incomplete = [row["key"] for row in rows if not row["json_offset"]]
    if incomplete:
        raise ValueError(f"{tar}: {len(incomplete)} samples have no .json ({', '.join(incomplete[:3])}); take them out")
    return pa.RecordBatch.from_pylist(rows, COLUMNS)


def write_index(tar: Path) -> Path:
    """Scans a tar and writes its index beside it, with the tar's size, by which a stale one is known."""
    index = scan_tar(tar).replace_schema_metadata({"bytes": str(tar.stat().st_size)})
    with whole(index_path(tar)) as partial, pa.ipc.new_file(str(partial), index.schema) as file:
        file.write_batch(index)
    return index_path(tar)


def _read_index(tar: Path, size: int) -> pa.RecordBatch:
    path = index_path(tar)
    try:
        index = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        columns, indexed = index.schema.remove_metadata(), int(index.schema.metadata[b"bytes"])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of a tar ({error}); remove it") from error
    if columns != COLUMNS or indexed != size:
        raise ValueError(
            f"{path} is stale: it is of a tar of {indexed} bytes, and {tar.name} has {size}; "
            "remove it, or write the shard again"
        )
    return index


class TarSamples:
    """An open tar whose samples are read by their number in it.

    Attributes:
        path: of the tar.
        keys: of its samples, in order: an Arrow array of strings.

    Raises:
        ValueError: the tar is missing or broken, or its index is of another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is not there, but index.json lists it; write the shards again") from error
        weakref.finalize(self, os.close, self._file)
        indexed = index_path(path).is_file()
        index = _read_index(path, os.fstat(self._file).st_size) if indexed else scan_tar(path)
        self.keys = index.column("key")
        self._places = {
            member: (index.column(f"{member}_offset").to_numpy(), index.column(f"{member}_size").to_numpy())
            for member in MEMBERS
        }

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int, members: Iterable[str]) -> RawSample:
        """One read of the file, from the first of `members` to the last; a member that the sample lacks is left out.

        Raises:
            ValueError: the tar ends before the sample does.
        """
        spans = {}
        for member in members:
            offsets, sizes = self._places[member]
            if offsets[row]:
                spans[member] = (int(offsets[row]), int(offsets[row] + sizes[row]))
        start, end = min(start for start, _ in spans.values()), max(end for _, end in spans.values())
        data = os.pread(self._file, end - start, start)
        key = self.keys[row].as_py()
        if len(data) < end - start:
            raise ValueError(f"{self.path} ends inside sample {key}: it was cut off; write the shard again")
        parts = {member: data[first - start : last - start] for member, (first, last) in spans.items()}
        return {"__key__": key, "__url__": str(self.path), **parts}


class Shards:
    """The tars of a data set; those last used stay open.

    Args:
        paths: of the tars.
        counts: how many samples each has.
        opened: how many stay open.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], opened: int) -> None:
        self.counts = counts
        self._paths = paths
        self._opened = lru_cache(maxsize=opened)(self._open)

    def __getitem__(self, number: int) -> TarSamples:
        """The tar of a number.

        Raises:
            ValueError: as `TarSamples`, or it has another number of samples than `counts` says.
        """
        return self._opened(number)

    def _open(self, number: int) -> TarSamples:
        samples = TarSamples(self._paths[number])
        if len(samples) != self.counts[number]:
            raise ValueError(
                f"{samples.path} has {len(samples)} samples, and index.json says {self.counts[number]}; "
                "write the shards again"
            )
        return samples
