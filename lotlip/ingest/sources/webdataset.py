"""Tars of images with their captions, as img2dataset and others write them: on disk, on S3, wherever fsspec reaches."""

from __future__ import annotations

import bz2
import glob
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lotlip.core.files import not_a_file, sha256_json
from lotlip.core.listing import files_below, is_hidden
from lotlip.data.keys import is_key, key_of, leaves, prefix_of, printable
from lotlip.data.paths import file_state
from lotlip.data.records import Failure, ImageRecord, Unit
from lotlip.data.tars import DamagedTar, TarStream, archives
from lotlip.ingest.config import ImagesConfig, WebDatasetSourceConfig
from lotlip.ingest.record_validation import Intake
from lotlip.ingest.split import split_of

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_REMEDY = (
    "set ingest.source.path in params.yaml to a folder of tars, or to a text file with the path or address of tars in "
    "each line"
)
# "cc3m = s3://bucket/{00000..00331}.tar": what keys begin with, and where the tars are.
_LINE = re.compile(r"(?:(?P<prefix>[A-Za-z0-9_-]+) = )?(?P<address>.+)")
# A sample's name ends at the first dot of the file's name, as webdataset has it.
_MEMBER = re.compile(r"(?P<sample>(?:[^/.][^/]*/)*[^/.]+)\.(?P<ending>[^/]+)")
_CHUNK = 2**16  # bytes of a compressed file that are read at a time


class WebDatasetSource:
    """Reads tars from their beginning to their end; a tar is a unit, and nothing of it touches the disk.

    Tars joined into one file, and compressed files joined into one, are read to the end of the last.

    Members that stand together and have one name up to its first dot are a sample. Its key is that name by `key_of`, or
    a field of its json, with the tar's folder below `path` (or the prefix in its line) before it. Hidden members, and
    those that are neither image nor caption nor json, are left alone.

    Failures are of the kinds of `Intake`, or "missing" (no image, no caption, or nothing to be called by), "duplicate"
    (the key came before in the tar), "too-large" (a member of more than `ingest.images.max_bytes`), "unsafe" (a name
    that leads out of the tar, a link, a device), "truncated" (the tar is cut off or followed by something else: what is
    before came in) and "unreadable-shard" (a tar that is not there, is not allowed, or is none).

    Raises:
        ValueError: `path` leads to no tars.
    """

    def __init__(self, settings: WebDatasetSourceConfig, images: ImagesConfig) -> None:
        self._settings = settings
        self._intake = Intake(images)
        self._max_bytes = images.max_bytes
        self._wanted = {*settings.images, settings.caption, "json"}
        self._tars = _find_tars(settings.path)

    def units(self, partition_size: int) -> list[Unit]:
        """One for each tar, however many samples it has."""
        return [Unit(None, index, (tar,)) for index, tar in enumerate(self._tars)]

    def split(self, key: str) -> str:
        """By chance, which depends on the key and the seed."""
        return split_of(key, self._settings)

    def state(self, unit: Unit) -> str | None:
        """Of the unit's tars, by size and times, or by what their store says of their version.

        Raises:
            OSError: the tar's store did not answer.
        """
        states = [_state(_parsed(tar)[1]) for tar in unit.items]
        return None if None in states else sha256_json([*unit.items, *states])

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """Each sample of the unit's tar.

        Raises:
            OSError: the tar's store did not answer, or stopped to.
        """
        for tar in unit.items:
            yield from self._read(tar)

    def _read(self, line: str) -> Iterator[ImageRecord | Failure]:
        prefix, address = _parsed(line)
        where, keys = printable(address), set[str]()
        begun, last = False, ""
        try:
            with closing(_Stored(_opened(address))) as file:
                for sample in self._samples(archives(TarStream(_uncompressed(file)))):
                    begun = True
                    if sample is None:
                        continue
                    if isinstance(sample, _Sample):
                        yield self._record(sample, prefix, where, keys)
                        last = sample.name
                    else:
                        name, reason, kind = sample
                        yield Failure(key_of(name, prefix), f"{where}: {printable(name)}", reason, kind)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            yield Failure(where, where, f"the tar cannot be read: {error}", "unreadable-shard")
        except (DamagedTar, tarfile.TarError) as error:
            if begun:
                place = f"after {printable(last)}, its last whole sample" if last else "before its first sample ends"
                key = key_of(last, prefix) if last else where
                yield Failure(key, where, f"the tar is damaged {place}: {error}", "truncated")
            else:
                yield Failure(where, where, f"the file is no tar: {error}", "unreadable-shard")

    def _samples(self, tars: Iterator[tarfile.TarFile]) -> Iterator[_Sample | tuple[str, str, str] | None]:
        """Samples, once the next one or the archive's end shows that they are whole; else a name, a reason, its kind.

        None comes first of each archive: its beginning could be read.
        """
        for tar in tars:
            yield None
            yield from self._archive(tar)

    def _archive(self, tar: tarfile.TarFile) -> Iterator[_Sample | tuple[str, str, str]]:
        sample: _Sample | None = None
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            name = member.name.removeprefix("./")
            if leaves(name):
                yield name, "its name leads out of the tar", "unsafe"
                continue
            if member.isdir() or is_hidden(name):
                continue
            if not member.isreg() or member.issparse():
                yield name, "it is a link, a device or no plain file", "unsafe"
                continue
            named = _MEMBER.fullmatch(name)
            if named is None:
                continue
            ending = named["ending"].lower()
            if sample is None or sample.name != named["sample"] or ending in sample.endings:
                if sample is not None:
                    yield sample
                sample = _Sample(named["sample"])
            sample.endings.append(ending)
            if ending in self._wanted:
                if member.size > self._max_bytes:
                    sample.too_large = sample.too_large or member.size
                else:
                    sample.members[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]  # a plain file
        if sample is not None:
            yield sample

    def _record(self, sample: _Sample, prefix: str, tar: str, keys: set[str]) -> ImageRecord | Failure:
        """What becomes of a sample; its key is added to `keys`."""
        settings = self._settings
        key, where = key_of(sample.name, prefix), f"{tar}: {printable(sample.name)}"
        try:
            info = json.loads(sample.members["json"]) if "json" in sample.members else {}
            if not isinstance(info, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            return Failure(key, where, f"its json cannot be read: {error}", "encoding")
        if settings.key is not None:
            name = info.get(settings.key)
            if not isinstance(name, str | int) or not is_key(key_of(str(name))):
                return Failure(key, where, f"its json has no field {settings.key} to be called by", "missing")
            key = key_of(str(name), prefix)
        if key in keys:
            reason = f"its key {key!r} came before in this tar; the members of a sample must stand together"
            return Failure(key, where, reason, "duplicate")
        keys.add(key)
        if sample.too_large:
            return self._intake.too_large(key, where, sample.too_large)
        ending = next((ending for ending in settings.images if ending in sample.members), None)
        if ending is None:
            reason = f"it has no {', '.join(settings.images)}, only {printable(', '.join(sample.endings))}"
            return Failure(key, where, reason, "missing")
        caption = self._caption(sample, info)
        if not isinstance(caption, str | bytes):
            return Failure(key, where, "there is no caption for the image", "missing")
        return self._intake(key, where, sample.members[ending], caption, ending)

    def _caption(self, sample: _Sample, info: dict[str, Any]) -> Any:
        """As it was found, or what stands in its place."""
        written = sample.members.get(self._settings.caption or "")
        if self._settings.caption_field in info and not (written or b"").strip():
            return info[self._settings.caption_field]  # null where img2dataset had none, beside an empty txt
        return written


@dataclass
class _Sample:
    """Members that belong together.

    Attributes:
        name: that they share.
        endings: of all of them, in lower case.
        members: the wanted ones' contents.
        too_large: bytes of one that was not read; 0 where all were.
    """

    name: str
    endings: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    too_large: int = 0


class _Stored:
    """A store's file. Whatever the store raises is an OSError, so that the unit is tried again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read."""
        while len(self._head) < size and (data := self._read(size)):
            self._head += data
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the file's end."""
        data, self._head = self._head[:size], self._head[size:]
        return data or self._read(size)

    def close(self) -> None:
        self._file.close()

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"the store stopped to answer: {error!r}") from error


class _Gzip:
    """zlib's decompressor with the methods that those of bz2 and lzma have."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


# How a compressed file begins → its decompressor.
_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\x00\x00\x80": lzma.LZMADecompressor,
}


class _Decompressed(io.RawIOBase):
    """The contents of a compressed file, of all its members: `cat` joins compressed files, too."""

    def __init__(self, file: _Stored, decompressor: Callable[[], Any]) -> None:
        self._file = file
        self._new = decompressor
        self._decompressor = decompressor()
        self._members = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of the buffer; 0 at the end of the last member.

        Raises:
            DamagedTar: the file is cut off or broken, or something else than zeros or another member follows.
        """
        while True:
            if self._decompressor.eof:
                data = self._decompressor.unused_data.lstrip(b"\0")
                while not data:
                    if not (data := self._file.read(_CHUNK)):
                        return 0
                    data = data.lstrip(b"\0")
                self._decompressor = self._new()
                self._members += 1
            else:
                data = self._file.read(_CHUNK) if self._decompressor.needs_input else b""
            starved = self._decompressor.needs_input and not data
            try:
                found = self._decompressor.decompress(data, len(buffer))
            except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                raise DamagedTar(f"{self._part} is broken ({error})") from error
            if found:
                buffer[: len(found)] = found
                return len(found)
            if starved and not self._decompressor.eof:
                raise DamagedTar(f"the file ends before {self._part} does")

    @property
    def _part(self) -> str:
        return "its compressed data" if self._members == 1 else "what follows its compressed data"


def _uncompressed(file: _Stored) -> IO[bytes]:
    head = file.peek(max(map(len, _DECOMPRESSORS)))
    found = next((new for magic, new in _DECOMPRESSORS.items() if head.startswith(magic)), None)
    return file if found is None else io.BufferedReader(_Decompressed(file, found), _CHUNK)  # type: ignore[return-value]


# What stores say of an object's version, the surest first.
_VERSION = (
    "ETag", "etag", "e_tag", "generation", "md5Hash", "content_md5", "Content-MD5", "Digest", "VersionId",
    "LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created",
)  # fmt: skip


def _state(address: str) -> list[Any] | str | None:
    """What changes when a tar is replaced; None where its store has no such thing."""
    if "://" not in address:
        return file_state(Path(address))
    from fsspec.core import url_to_fs

    try:
        system, path_there = url_to_fs(address)
        system.invalidate_cache()  # it keeps what it once listed
        about = system.info(path_there)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return type(error).__name__
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{address} cannot be opened: {error!r}") from error
    version = next((about[name] for name in _VERSION if about.get(name)), None)
    return None if version is None else [about.get("size"), str(version)]


def _opened(address: str) -> IO[bytes]:
    if "://" not in address:
        path = Path(address)
        if path.exists() and not path.is_file():
            raise IsADirectoryError(f"{address} is no file")
        return path.open("rb")
    from fsspec.core import url_to_fs

    try:
        system, path_there = url_to_fs(address)
        return system.open(path_there, "rb")
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{address} cannot be opened: {error!r}") from error


# --- where the tars are -------------------------------------------------------------------------------------------


def _find_tars(path: Path) -> list[str]:
    """Lines as in the text file, one for each tar, in order."""
    if path.is_dir():
        tars = _tars_below(path)
    elif path.name.lower().endswith(TARS) and path.is_file():
        tars = [str(path)]
    elif path.is_file():
        tars = list(_listed(path))
    else:
        raise ValueError(f"{path} {not_a_file(path)}; {_REMEDY}")
    if not tars:
        raise ValueError(f"{path} has no tar; {_REMEDY}")
    return tars


def _tars_below(root: Path) -> list[str]:
    found = (file for file in files_below(root) if file.name.lower().endswith(TARS))
    prefixes = {tar: prefix_of(tar, root) for tar in sorted(found)}
    return [f"{prefix} = {tar}" if prefix else str(tar) for tar, prefix in prefixes.items()]


def _listed(path: Path) -> Iterator[str]:
    """What the lines of a text file lead to: ranges and patterns are written out."""
    from braceexpand import braceexpand

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither a tar nor a text file ({error.reason}); {_REMEDY}") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        prefix, pattern = _parsed(line.strip())
        try:
            tars = [tar for address in braceexpand(pattern) for tar in _matches(address)]
        except Exception as error:  # fsspec's, of unknown kinds of addresses and missing packages; the stores' own
            remedy = "; install this project with its extra s3" if pattern.startswith("s3:") else ""
            raise ValueError(f"{path}, line {number}: {pattern} cannot be used: {error}{remedy}") from error
        if not tars:
            raise ValueError(f"{path}, line {number}: nothing matches {pattern}; mend the line or remove it")
        for tar in tars:
            if seen.setdefault(tar, number) != number:
                raise ValueError(f"{path}, line {number}: {tar} is in line {seen[tar]}, too; remove one of them")
            yield f"{prefix} = {tar}" if prefix else tar


def _matches(address: str) -> list[str]:
    if "://" not in address:
        return sorted(glob.glob(address, recursive=True)) if glob.has_magic(address) else [address]  # noqa: PTH207
    from fsspec.core import url_to_fs

    system, path = url_to_fs(address)
    if "*" not in path and "[" not in path:
        return [address]
    return [system.unstrip_protocol(found) for found in sorted(system.glob(path))]


def _parsed(line: str) -> tuple[str, str]:
    """Prefix and address of a line."""
    found = _LINE.fullmatch(line)
    assert found is not None  # a line that is not blank
    return found["prefix"] or "", found["address"].strip()
