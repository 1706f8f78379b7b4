"""Samples of WebDataset tars at any place: an index beside each tar says where they lie.

`train-000000.tar` stays what any user of webdataset reads; `train-000000.index.arrow` has a row for each of its samples
and is mapped into memory, so that a process pays for the rows it looks at. A tar without one is scanned when opened.
`train-000000.token-ids.arrow` has the token ids of its texts (`lotlip.data.token_ids`).
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from lotlip.core.files import atomic_write, remove
from lotlip.core.listing import is_hidden

INDEX = ".index.arrow"
IDS = ".token-ids.arrow"

# What of a sample is used; "image" is its first file that is neither of the others.
MEMBERS = ("json", "npy", "image")

# Where the first byte lies in the tar, and how many there are; both are 0 where a sample has no such file.
COLUMNS = pa.schema(
    [("key", pa.string()), *((f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "size"))]
)

# A file's key ends at the first dot of its name, as webdataset has it; names as __this__ are its own.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_RESERVED = re.compile(r"__[^/]*__($|/)")
# A header that claims a longer name or a longer extension of itself is broken.
_LONGEST_NAME = 2**20

RawSample = dict[str, Any]  # "__key__", "__url__", and the bytes of the members that were asked for


def index_path(tar: Path) -> Path:
    """Where a tar's index is, or would be."""
    return tar.with_suffix(INDEX)


class DamagedTar(ValueError):
    """The bytes are not a whole tar: no tar at all, cut off, or followed by something else."""


class _Header(tarfile.TarInfo):
    """A member's header. tarfile takes a broken one for the end of the archive, and reads names of any length."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the block of zeros that ends an archive
            raise
        except tarfile.HeaderError as error:
            raise DamagedTar(str(error)) from error
        size = member.size
        if size < 0 or (size > _LONGEST_NAME and not (member.isreg() or member.isdir())):
            raise DamagedTar(f"a header claims {size} bytes")
        return member


class TarStream:
    """What tarfile needs of a file, for reading forward only; a short read is an error.

    Args:
        file: uncompressed, at its beginning.
        seekable: whether `file.seek` skips what is not wanted; otherwise it is read and dropped.
    """

    def __init__(self, file: IO[bytes], seekable: bool = False) -> None:
        self._file = file
        self._seekable = seekable
        self._next = b""  # read ahead by `more`
        self._place = 0

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._place

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes.

        Raises:
            DamagedTar: the file ends before.
        """
        data = self._up_to(size)
        if len(data) < size:
            raise DamagedTar("the file ends before the tar does")
        return data

    def seek(self, offset: int) -> int:
        """Skips to a later offset.

        Raises:
            DamagedTar: the file ends before.
        """
        if offset < self._place:
            raise ValueError(f"byte {offset} has been passed: the stream is at {self._place}")
        if self._seekable:
            self._file.seek(offset)
            self._next, self._place = b"", offset
        while self._place < offset:
            self.read(min(offset - self._place, 2**20))
        return offset

    def more(self) -> bool:
        """Whether anything but zeros follows; skips the blocks of zeros."""
        while block := self._up_to(tarfile.BLOCKSIZE):
            if block.strip(b"\0"):
                self._next = block
                self._place -= len(block)
                return True
        return False

    def _up_to(self, size: int) -> bytes:
        """`size` bytes; fewer only where the file ends."""
        parts, missing = [self._next[:size]], size - len(self._next)
        self._next = self._next[size:]
        while missing > 0 and (data := self._file.read(min(missing, 2**20))):
            parts.append(data)
            missing -= len(data)
        found = b"".join(parts)
        self._place += len(found)
        return found


def archives(stream: TarStream) -> Iterator[tarfile.TarFile]:
    """The archives of a file, one after the other: `cat` joins tars, and many readers stop at the end of the first.

    Each must be read to its end before the next is asked for. Names that are not UTF-8 keep their bytes as surrogates.

    Raises:
        DamagedTar: something else than zeros or another archive follows an archive's end.
        tarfile.TarError: as tarfile raises it.
    """
    first = True
    while first or stream.more():
        start = stream.tell()
        try:
            tar = tarfile.open(  # noqa: SIM115 (closed below)
                fileobj=stream,  # type: ignore[call-overload]  # it asks for read, seek and tell
                mode="r:",
                tarinfo=_Header,
                encoding="utf-8",
                errors="surrogateescape",
            )
        except (DamagedTar, tarfile.TarError) as error:
            if first:
                raise
            raise DamagedTar(f"after the archive's end, at byte {start}, follows what is no tar ({error})") from error
        with tar:
            yield tar
        first = False


def scan_tar(tar: Path) -> pa.RecordBatch:
    """Finds the samples of a tar by reading the headers of its files: the index, with the columns of `COLUMNS`.

    Tars joined into one file are read to the end of the last.

    Raises:
        ValueError: it is not there, not an uncompressed tar or not a whole one, or a sample has no .json or has one
            twice.
    """
    rows: list[dict[str, Any]] = []
    try:
        with tar.open("rb") as file:
            for member in (member for archive in archives(TarStream(file, seekable=True)) for member in archive):
                name = None if is_hidden(member.name) else _NAME.fullmatch(member.name)
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
    except (DamagedTar, tarfile.TarError) as error:
        raise ValueError(f"{tar} is not a whole, uncompressed tar ({error}); write it again") from error
    incomplete = [row["key"] for row in rows if not row["json_offset"]]
    if incomplete:
        raise ValueError(f"{tar}: {len(incomplete)} samples have no .json ({', '.join(incomplete[:3])}); take them out")
    return pa.RecordBatch.from_pylist(rows, COLUMNS)


def write_index(tar: Path, index: pa.RecordBatch | None = None) -> Path:
    """Writes a tar's index beside it, with the tar's size, by which a stale one is known; scans it for want of one."""
    return write_sidecar(index_path(tar), tar, scan_tar(tar) if index is None else index)


def write_sidecar(path: Path, tar: Path, batch: pa.RecordBatch, **more: str) -> Path:
    """Writes an Arrow file that belongs to a tar, with the tar's size and `more` as metadata."""
    batch = batch.replace_schema_metadata({**more, "bytes": str(tar.stat().st_size)})
    with atomic_write(path) as partial, pa.ipc.new_file(str(partial), batch.schema) as file:
        file.write_batch(batch)
    return path


def read_sidecar(path: Path, tar: Path, size: int, what: str) -> pa.RecordBatch:
    """What `write_sidecar` wrote, mapped into memory.

    Args:
        path: of the Arrow file.
        tar: that it belongs to.
        size: of the tar.
        what: the file holds, for the error message.

    Raises:
        ValueError: it is not such a file, or it belongs to a tar of another size.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        written_for = int(batch.schema.metadata[b"bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {what} of a tar ({error}); remove it") from error
    if written_for != size:
        raise ValueError(
            f"{path} is stale: it is of a tar of {written_for} bytes, and {tar.name} has {size}; "
            "remove it, or write the shard again"
        )
    return batch


def is_sidecar(path: Path) -> bool:
    """Whether a file is one that `write_sidecar` wrote."""
    try:
        with pa.memory_map(str(path)) as file:
            return b"bytes" in (pa.ipc.open_file(file).schema.metadata or {})
    except (OSError, ValueError):
        return False


class TarWriter:
    """A tar whose bytes depend on nothing but names, contents and their order.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # the end of a tar, as tarfile and GNU tar have it
            end = self.bytes + 2 * tarfile.BLOCKSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its first byte in the file."""
        member = tarfile.TarInfo(name)  # its time, owner and mode are constants
        member.size = len(data)
        self._write(member.tobuf(tarfile.GNU_FORMAT))
        offset = self.bytes
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    @property
    def sha256(self) -> str:
        """Of what was written, as `lotlip.core.files.sha256_files` has it."""
        return hashlib.sha256(self._digest.digest()).hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class SampleWriter:
    """Appends samples to a tar and keeps where they lie."""

    def __init__(self, tar: TarWriter) -> None:
        self._tar = tar
        self._rows: list[dict[str, Any]] = []

    def add(self, key: str, json: bytes, npy: bytes | None, image: bytes, extension: str) -> None:
        """A sample's files; `npy` is left out where it is None."""
        row: dict[str, Any] = {**dict.fromkeys(COLUMNS.names, 0), "key": key}
        for member, ending, data in (("json", "json", json), ("npy", "npy", npy), ("image", extension, image)):
            if data is not None:
                row[f"{member}_offset"] = self._tar.add(f"{key}.{ending}", data)
                row[f"{member}_size"] = len(data)
        self._rows.append(row)

    @property
    def index(self) -> pa.RecordBatch:
        """As `scan_tar` would find it."""
        return pa.RecordBatch.from_pylist(self._rows, COLUMNS)

    @property
    def sha256(self) -> str:
        """Of the tar, as `lotlip.core.files.sha256_files` has it."""
        return self._tar.sha256


@contextmanager
def write_samples(path: Path) -> Iterator[SampleWriter]:
    """Writes a tar of samples and its index; both are there, atomic_write, when the block ends well."""
    for ending in (INDEX, IDS):  # those of an older tar would be stale
        remove(path.with_suffix(ending), ours=is_sidecar)
    with atomic_write(path) as partial, partial.open("wb") as file, TarWriter(file) as tar:
        samples = SampleWriter(tar)
        yield samples
    write_index(path, samples.index)


def read_index(tar: Path, size: int) -> pa.RecordBatch:
    """A tar's index, with the columns of `COLUMNS`, mapped into memory.

    Args:
        tar: whose index it is.
        size: of the tar.

    Raises:
        ValueError: it is not such an index, or one of a tar of another size.
    """
    path = index_path(tar)
    index = read_sidecar(path, tar, size, "an index")
    if index.schema.remove_metadata() != COLUMNS:
        raise ValueError(f"{path} is not an index of a tar: its columns are {index.schema.names}; remove it")
    return index


class TarSamples:
    """An open tar whose samples are read by their number in it.

    Attributes:
        path: of the tar.
        size: of the tar when it was opened, in bytes.
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
        self.size = os.fstat(self._file).st_size
        index = read_index(path, self.size) if index_path(path).is_file() else scan_tar(path)
        self.keys = index.column("key")
        self._places = {
            member: (index.column(f"{member}_offset").to_numpy(), index.column(f"{member}_size").to_numpy())
            for member in MEMBERS
        }

    def __len__(self) -> int:
        return len(self.keys)

    def layout(self) -> str:
        """A hash of the samples' keys and of where they lie, by which a tar of the same size is known from another."""
        digest = hashlib.sha256("\0".join(self.keys.to_pylist()).encode())
        for places in self._places.values():
            for column in places:
                digest.update(column.tobytes())
        return digest.hexdigest()

    def read(self, row: int, members: Iterable[str]) -> RawSample:
        """At most one read, from the first of `members` to the last; a member that the sample lacks is left out.

        Raises:
            ValueError: the tar ends before the sample does.
        """
        spans = {}
        for member in members:
            offsets, sizes = self._places[member]
            if offsets[row]:
                spans[member] = (int(offsets[row]), int(offsets[row] + sizes[row]))
        key = self.keys[row].as_py()
        if not spans:
            return {"__key__": key, "__url__": str(self.path)}
        start, end = min(start for start, _ in spans.values()), max(end for _, end in spans.values())
        data = os.pread(self._file, end - start, start)
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
