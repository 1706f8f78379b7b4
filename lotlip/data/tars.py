"""Random access to the samples of WebDataset tars: an index beside each tar gives their positions.

webdataset can read `train-000000.tar` as usual. `train-000000.index.arrow` has a row per sample and is mapped into
memory, so that a process loads only the rows it uses. A tar without an index is scanned when it is opened.
`train-000000.token-ids.arrow` has the token ids of its texts (`lotlip.data.token_ids`).
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from lotlip.core.files import atomic_write, remove
from lotlip.core.listing import is_hidden

INDEX = ".index.arrow"
IDS = ".token-ids.arrow"

# The parts of a sample that are used; "image" is its first file that is neither of the others.
MEMBERS = ("json", "npy", "image")

# Offset of the first byte in the tar and size, for each part; both are 0 if the sample lacks the part.
COLUMNS = pa.schema(
    [("key", pa.string()), *((f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "size"))]
)

# As in webdataset, a file's key ends at the first dot of its name, and names like __this__ are reserved.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_RESERVED = re.compile(r"__[^/]*__($|/)")
# A header that declares a longer name or a longer header extension is broken.
_LONGEST_NAME = 2**20

RawSample = dict[str, Any]  # "__key__", "__url__", and the bytes of the requested members


def index_path(tar: Path) -> Path:
    """The path of a tar's index, which may not exist."""
    return tar.with_suffix(INDEX)


class DamagedTar(ValueError):
    """The bytes are not a complete tar: not a tar at all, truncated, or followed by other data."""


class _Header(tarfile.TarInfo):
    """A member's header. tarfile takes a broken one for the end of the archive, and accepts names of any length."""

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
            raise DamagedTar(f"a header declares {size} bytes")
        return member


class TarStream:
    """The part of the file interface that tarfile needs, for reading forward only; a short read is an error.

    Args:
        file: uncompressed, at its beginning.
        seekable: whether `file.seek` can skip data; otherwise it is read and discarded.
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
            DamagedTar: the file ends before that.
        """
        data = self._up_to(size)
        if len(data) < size:
            raise DamagedTar("the file ends before the tar does")
        return data

    def seek(self, offset: int) -> int:
        """Skips to a later offset.

        Raises:
            DamagedTar: the file ends before that.
        """
        if offset < self._place:
            raise ValueError(f"cannot seek back to byte {offset}: the stream is at byte {self._place}")
        if self._seekable:
            self._file.seek(offset)
            self._next, self._place = b"", offset
        while self._place < offset:
            self.read(min(offset - self._place, 2**20))
        return offset

    def more(self) -> bool:
        """Whether anything but zeros follows; skips blocks of zeros."""
        while block := self._up_to(tarfile.BLOCKSIZE):
            if block.strip(b"\0"):
                self._next = block
                self._place -= len(block)
                return True
        return False

    def _up_to(self, size: int) -> bytes:
        """`size` bytes; fewer only at the end of the file."""
        parts, missing = [self._next[:size]], size - len(self._next)
        self._next = self._next[size:]
        while missing > 0 and (data := self._file.read(min(missing, 2**20))):
            parts.append(data)
            missing -= len(data)
        data = b"".join(parts)
        self._place += len(data)
        return data


def archives(stream: TarStream) -> Iterator[tarfile.TarFile]:
    """The archives of a file, one after another: `cat` joins tars, and many readers stop at the end of the first.

    Each must be read to its end before the next is requested. Names that are not UTF-8 keep their bytes as surrogates.

    Raises:
        DamagedTar: an archive is followed by data other than zeros or another archive.
        tarfile.TarError: as tarfile raises it.
    """
    first = True
    while first or stream.more():
        start = stream.tell()
        try:
            tar = tarfile.open(  # noqa: SIM115 (closed below)
                fileobj=stream,  # type: ignore[call-overload]  # it needs read, seek and tell
                mode="r:",
                tarinfo=_Header,
                encoding="utf-8",
                errors="surrogateescape",
            )
        except (DamagedTar, tarfile.TarError) as error:
            if first:
                raise
            raise DamagedTar(f"the archive is followed, at byte {start}, by other data ({error})") from error
        with tar:
            yield tar
        first = False


def scan_tar(tar: Path) -> pa.RecordBatch:
    """Indexes the samples of a tar by reading its headers; returns the columns of `COLUMNS`.

    Tars that were joined into one file are all read.

    Raises:
        ValueError: the file does not exist or is not a complete, uncompressed tar; or a sample has no .json, or two
            files of one kind.
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
                        f"{tar}: sample {key} has two .{kind} files; another sample must have the same key"
                    )
                rows[-1] |= {f"{kind}_offset": member.offset_data, f"{kind}_size": member.size}
    except FileNotFoundError as error:
        raise ValueError(f"{tar} does not exist, but index.json lists it; rerun the shard stage") from error
    except (DamagedTar, tarfile.TarError) as error:
        raise ValueError(f"{tar} is not a complete, uncompressed tar ({error}); write it again") from error
    incomplete = [row["key"] for row in rows if not row["json_offset"]]
    if incomplete:
        raise ValueError(f"{tar}: {len(incomplete)} samples have no .json ({', '.join(incomplete[:3])}); remove them")
    return pa.RecordBatch.from_pylist(rows, COLUMNS)


def write_index(tar: Path, index: pa.RecordBatch | None = None) -> Path:
    """Writes a tar's index beside it; scans the tar if `index` is None. The stored tar size reveals a stale index."""
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
        raise ValueError(f"{path} is not {what} ({error}); remove it") from error
    if written_for != size:
        raise ValueError(
            f"{path} is stale: it describes a tar of {written_for} bytes, but {tar.name} has {size}; "
            "remove it, or rerun the shard stage"
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
    """Writes a tar whose bytes depend only on names, contents and their order.

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
        if kind is None:  # end-of-archive blocks, as tarfile and GNU tar write them
            end = self.bytes + 2 * tarfile.BLOCKSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its first byte in the file."""
        member = tarfile.TarInfo(name)  # time, owner and mode keep constant defaults
        member.size = len(data)
        self._write(member.tobuf(tarfile.GNU_FORMAT))
        offset = self.bytes
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    @property
    def sha256(self) -> str:
        """Hash of the bytes written so far, as by `lotlip.core.files.sha256_files`."""
        return hashlib.sha256(self._digest.digest()).hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class SampleWriter:
    """Appends samples to a tar and records their positions."""

    def __init__(self, tar: TarWriter) -> None:
        self._tar = tar
        self._rows: list[dict[str, Any]] = []

    def add(self, key: str, json: bytes, npy: bytes | None, image: bytes, extension: str) -> None:
        """Appends a sample's files; `npy` is omitted if None."""
        row: dict[str, Any] = {**dict.fromkeys(COLUMNS.names, 0), "key": key}
        for member, ending, data in (("json", "json", json), ("npy", "npy", npy), ("image", extension, image)):
            if data is not None:
                row[f"{member}_offset"] = self._tar.add(f"{key}.{ending}", data)
                row[f"{member}_size"] = len(data)
        self._rows.append(row)

    @property
    def index(self) -> pa.RecordBatch:
        """The index, equal to that of `scan_tar`."""
        return pa.RecordBatch.from_pylist(self._rows, COLUMNS)

    @property
    def sha256(self) -> str:
        """Hash of the tar, as by `lotlip.core.files.sha256_files`."""
        return self._tar.sha256


@contextmanager
def write_samples(path: Path) -> Iterator[SampleWriter]:
    """Writes a tar of samples and its index atomically: both exist when the block ends without an error."""
    for ending in (INDEX, IDS):  # those of an older tar would be stale
        remove(path.with_suffix(ending), ours=is_sidecar)
    with atomic_write(path) as partial, partial.open("wb") as file, TarWriter(file) as tar:
        samples = SampleWriter(tar)
        yield samples
    write_index(path, samples.index)


def read_index(tar: Path, size: int) -> pa.RecordBatch:
    """A tar's index, with the columns of `COLUMNS`, mapped into memory.

    Args:
        tar: that the index describes.
        size: of the tar in bytes.

    Raises:
        ValueError: the file is not an index, or the index of a tar of another size.
    """
    path = index_path(tar)
    index = read_sidecar(path, tar, size, "a tar's index")
    if index.schema.remove_metadata() != COLUMNS:
        raise ValueError(f"{path} is not a tar's index: its columns are {index.schema.names}; remove it")
    return index


class TarSamples:
    """An open tar; samples are read by their number.

    Attributes:
        path: of the tar.
        size: of the tar when it was opened, in bytes.
        keys: of its samples, in order: an Arrow array of strings.

    Raises:
        ValueError: the tar is missing or broken, or its index describes another tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist, but index.json lists it; rerun the shard stage") from error
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
        """Reads members of a sample with at most one system call; a member that the sample lacks is omitted.

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
            raise ValueError(f"{self.path} ends inside sample {key}: it is truncated; rerun the shard stage")
        parts = {member: data[first - start : last - start] for member, (first, last) in spans.items()}
        return {"__key__": key, "__url__": str(self.path), **parts}


class Shards:
    """The tars of a data set; the most recently used ones stay open.

    Args:
        paths: of the tars.
        counts: number of samples in each.
        opened: how many tars stay open.
        open_tar: opens one.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        counts: Sequence[int],
        opened: int,
        open_tar: Callable[[Path], TarSamples] = TarSamples,
    ) -> None:
        self.counts = counts
        self._paths, self._open_tar = paths, open_tar
        self._opened = lru_cache(maxsize=opened)(self._open)

    def __getitem__(self, number: int) -> TarSamples:
        """The tar with a number.

        Raises:
            ValueError: as `TarSamples`, or its number of samples differs from `counts`.
        """
        return self._opened(number)

    def _open(self, number: int) -> TarSamples:
        samples = self._open_tar(self._paths[number])
        if len(samples) != self.counts[number]:
            raise ValueError(
                f"{samples.path} has {len(samples)} samples, but index.json says {self.counts[number]}; "
                "rerun the shard stage"
            )
        return samples
