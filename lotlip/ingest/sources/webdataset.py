"""Tars of images with captions, as img2dataset and others write them: on disk, on S3, and wherever fsspec reaches."""

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
from lotlip.core.listing import files_with_endings, is_hidden
from lotlip.data.fields import listed
from lotlip.data.keys import escapes_folder, is_key, key_of, prefix_of, printable
from lotlip.data.paths import file_state
from lotlip.data.records import Failure, ImageRecord, Unit
from lotlip.data.tars import DamagedTar, TarStream, archives
from lotlip.ingest.config import ImagesConfig, WebDatasetSourceConfig
from lotlip.ingest.record_validation import RecordValidator
from lotlip.ingest.split import split_of

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_REMEDY = (
    "set ingest.source.path in params.yaml to a folder of tars, or to a text file with the path or URL of tars on "
    "each line"
)
# "cc3m = s3://bucket/{00000..00331}.tar": the prefix of keys, and the location of the tars.
_LINE = re.compile(r"(?:(?P<prefix>[A-Za-z0-9_-]+) = )?(?P<address>.+)")
# As in webdataset, a sample's name ends at the first dot of the file's name.
_MEMBER = re.compile(r"(?P<sample>(?:[^/.][^/]*/)*[^/.]+)\.(?P<ending>[^/]+)")
_CHUNK = 2**16  # bytes of a compressed file read at once


class WebDatasetSource:
    """Streams tars from beginning to end without writing them to disk; each tar is a unit.

    If several tars, or several compressed files, were joined into one file, all of them are read.

    Consecutive members whose names agree up to the first dot are a sample. Its key is made by `key_of` from that name,
    or from a field of its json, and prefixed with the tar's folder below `path` (or the prefix on its line). Hidden
    members, and those that are neither image nor caption nor json, are ignored.

    Failures have a kind of `RecordValidator`, "missing" (no image, no caption or no name), "duplicate" (the key
    occurred earlier in the tar), "too-large" (a member of more than `ingest.images.max_bytes`), "unsafe" (a name that
    leads out of the tar, a link, a device), "truncated" (the tar is cut off or followed by other data; earlier samples
    are kept) or "unreadable-shard" (a tar that does not exist, may not be read, or is not a tar).

    Raises:
        ValueError: `path` leads to no tars, or to some with a compression that is not supported.
    """

    def __init__(self, settings: WebDatasetSourceConfig, images: ImagesConfig) -> None:
        self._settings = settings
        self._validator = RecordValidator(images)
        self._max_bytes = images.max_bytes
        self._endings = {*settings.images, settings.caption, "json"}
        self._tars = _find_tars(settings.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tars": []}  # `read` does not use them

    def units(self, partition_size: int) -> list[Unit]:
        """One unit per tar, however many samples it has."""
        return [Unit(None, index, (tar,)) for index, tar in enumerate(self._tars)]

    def split(self, key: str) -> str:
        """A random split that depends only on the key and the seed."""
        return split_of(key, self._settings)

    def state(self, unit: Unit) -> str | None:
        """A hash of the state of the unit's tars: sizes and times, or the versions that their store reports.

        Raises:
            OSError: the tar's store did not respond.
        """
        states = [_state(_parse_line(tar)[1]) for tar in unit.items]
        return None if None in states else sha256_json([*unit.items, *states])

    def files(self, unit: Unit) -> list[Path]:
        """The unit's tars, without those in a store."""
        return [Path(address) for _, address in map(_parse_line, unit.items) if "://" not in address]

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """Each sample of the unit's tar.

        Raises:
            OSError: the tar's store did not respond, or stopped responding.
        """
        for tar in unit.items:
            yield from self._read(tar)

    def _read(self, line: str) -> Iterator[ImageRecord | Failure]:
        prefix, address = _parse_line(line)
        where, keys = printable(address), set[str]()
        started, last = False, ""
        try:
            with closing(_RemoteFile(_open(address))) as file:
                for sample in self._samples(archives(TarStream(_decompress(file)))):
                    started = True
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
            if started:
                place = f"after {printable(last)}, its last complete sample" if last else "in its first sample"
                key = key_of(last, prefix) if last else where
                yield Failure(key, where, f"the tar is damaged {place}: {error}", "truncated")
            else:
                yield Failure(where, where, f"the file is not a tar: {error}", "unreadable-shard")

    def _samples(self, tars: Iterator[tarfile.TarFile]) -> Iterator[_Sample | tuple[str, str, str] | None]:
        """Samples, or name, reason and kind of a failure. A sample is yielded once the next one or the end follows it.

        None comes first for each archive, to show that its beginning could be read.
        """
        for tar in tars:
            yield None
            yield from self._archive(tar)

    def _archive(self, tar: tarfile.TarFile) -> Iterator[_Sample | tuple[str, str, str]]:
        sample: _Sample | None = None
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them in memory
            name = member.name.removeprefix("./")
            if escapes_folder(name):
                yield name, "its name leads out of the tar", "unsafe"
                continue
            if member.isdir() or is_hidden(name):
                continue
            if not member.isreg() or member.issparse():
                yield name, "it is not a regular file, but a link or a device", "unsafe"
                continue
            match = _MEMBER.fullmatch(name)
            if match is None:
                continue
            ending = match["ending"].lower()
            if sample is None or sample.name != match["sample"] or ending in sample.endings:
                if sample is not None:
                    yield sample
                sample = _Sample(match["sample"])
            sample.endings.append(ending)
            if ending in self._endings:
                if member.size > self._max_bytes:
                    sample.too_large = sample.too_large or member.size
                else:
                    sample.members[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file
        if sample is not None:
            yield sample

    def _record(self, sample: _Sample, prefix: str, tar: str, keys: set[str]) -> ImageRecord | Failure:
        """Turns a sample into a record or failure; adds its key to `keys`."""
        settings = self._settings
        key, where = key_of(sample.name, prefix), f"{tar}: {printable(sample.name)}"
        try:
            info = json.loads(sample.members["json"]) if "json" in sample.members else {}
            if not isinstance(info, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            return Failure(key, where, f"its json cannot be read: {error}", "encoding")
        if settings.key is not None:
            name = info.get(settings.key)
            if not isinstance(name, str | int) or not is_key(key_of(str(name))):
                return Failure(key, where, f"its json has no valid name in field {settings.key}", "missing")
            key = key_of(str(name), prefix)
        if key in keys:
            reason = f"its key {key!r} occurred earlier in this tar; the members of a sample must be consecutive"
            return Failure(key, where, reason, "duplicate")
        keys.add(key)
        if sample.too_large:
            return self._validator.too_large(key, where, sample.too_large)
        ending = next((ending for ending in settings.images if ending in sample.members), None)
        if ending is None:
            reason = f"it has no {', '.join(settings.images)}, only {printable(', '.join(sample.endings))}"
            return Failure(key, where, reason, "missing")
        caption = self._caption(sample, info)
        if not isinstance(caption, str | bytes):
            fields = f", and in its json {listed(list(info))}" if info else ""
            reason = f"there is no caption for the image: it has {listed(sample.endings)}{fields}"
            remedy = "set ingest.source.caption or caption_field if one of these has it"
            return Failure(key, where, printable(f"{reason}; {remedy}"), "missing")
        return self._validator(key, where, sample.members[ending], caption, ending)

    def _caption(self, sample: _Sample, info: dict[str, Any]) -> Any:
        """The caption member, or the field of the json if the member is empty or missing."""
        text = sample.members.get(self._settings.caption or "")
        if self._settings.caption_field in info and not (text or b"").strip():
            return info[self._settings.caption_field]  # null if img2dataset had none, beside an empty txt
        return text


@dataclass
class _Sample:
    """Members that belong together.

    Attributes:
        name: that they share.
        endings: of all members, in lower case.
        members: contents of the members that are read.
        too_large: bytes of a member that was not read because it is too large; 0 if there is none.
    """

    name: str
    endings: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    too_large: int = 0


class _RemoteFile:
    """A store's file. Any exception of the store becomes an OSError, so that the unit is retried."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The next bytes, without consuming them."""
        while len(self._head) < size and (data := self._read(size)):
            self._head += data
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end of the file."""
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
            raise OSError(f"the store stopped responding: {error!r}") from error


class _Gzip:
    """zlib's decompressor with the interface of those of bz2 and lzma."""

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


# Magic bytes of a compressed file → its decompressor.
_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\x00\x00\x80": lzma.LZMADecompressor,
}


class _Decompressed(io.RawIOBase):
    """The contents of a compressed file, including all members of files joined by `cat`."""

    def __init__(self, file: _RemoteFile, decompressor: Callable[[], Any]) -> None:
        self._file = file
        self._new = decompressor
        self._decompressor = decompressor()
        self._members = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of the buffer; returns 0 at the end of the last member.

        Raises:
            DamagedTar: the file is truncated or broken, or is followed by data other than zeros or another member.
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
                block = self._decompressor.decompress(data, len(buffer))
            except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                raise DamagedTar(f"{self._part} is broken ({error})") from error
            if block:
                buffer[: len(block)] = block
                return len(block)
            if starved and not self._decompressor.eof:
                raise DamagedTar(f"the file ends before {self._part} does")

    @property
    def _part(self) -> str:
        return "its compressed data" if self._members == 1 else "the data after its compressed data"


def _decompress(file: _RemoteFile) -> IO[bytes]:
    head = file.peek(max(map(len, _DECOMPRESSORS)))
    decompressor = next((new for magic, new in _DECOMPRESSORS.items() if head.startswith(magic)), None)
    if decompressor is None:
        return file  # type: ignore[return-value]
    return io.BufferedReader(_Decompressed(file, decompressor), _CHUNK)


# Fields in which stores report an object's version, the most reliable ones first.
_VERSION = (
    "ETag", "etag", "e_tag", "generation", "md5Hash", "content_md5", "Content-MD5", "Digest", "VersionId",
    "LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created",
)  # fmt: skip


def _state(address: str) -> list[Any] | str | None:
    """A value that changes when a tar is replaced; None if its store has none."""
    if "://" not in address:
        return file_state(Path(address))
    from fsspec.core import url_to_fs

    try:
        system, path_there = url_to_fs(address)
        system.invalidate_cache()  # it caches listings
        about = system.info(path_there)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return type(error).__name__
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{address} cannot be opened: {error!r}") from error
    version = next((about[name] for name in _VERSION if about.get(name)), None)
    return None if version is None else [about.get("size"), str(version)]


def _open(address: str) -> IO[bytes]:
    if "://" not in address:
        path = Path(address)
        if path.exists() and not path.is_file():
            raise IsADirectoryError(f"{address} is not a file")
        return path.open("rb")
    from fsspec.core import url_to_fs

    try:
        system, path_there = url_to_fs(address)
        return system.open(path_there, "rb")
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{address} cannot be opened: {error!r}") from error


# --- finding tars -------------------------------------------------------------------------------------------------


def _find_tars(path: Path) -> list[str]:
    """Lines as in the text file, one per tar, in order."""
    if path.is_dir():
        tars = _tars_below(path)
    elif path.name.lower().endswith(TARS) and path.is_file():
        tars = [str(path)]
    elif path.is_file():
        tars = list(_tars_listed_in(path))
    else:
        raise ValueError(f"{path} {not_a_file(path)}; {_REMEDY}")
    if not tars:
        raise ValueError(f"{path} has no tar; {_REMEDY}")
    return tars


def _tars_below(root: Path) -> list[str]:
    prefixes = {tar: prefix_of(tar, root) for tar in files_with_endings(root, TARS)}
    return [f"{prefix} = {tar}" if prefix else str(tar) for tar, prefix in prefixes.items()]


def _tars_listed_in(path: Path) -> Iterator[str]:
    """The lines of a text file, with ranges and patterns expanded."""
    from braceexpand import braceexpand

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither a tar nor a text file ({error.reason}); {_REMEDY}") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        prefix, pattern = _parse_line(line.strip())
        try:
            tars = [tar for address in braceexpand(pattern) for tar in _expand(address)]
        except Exception as error:  # fsspec's for unknown URLs and missing packages, and the stores' own
            remedy = "; install this project with its extra s3" if pattern.startswith("s3:") else ""
            raise ValueError(f"{path}, line {number}: {pattern} cannot be used: {error}{remedy}") from error
        if not tars:
            raise ValueError(f"{path}, line {number}: nothing matches {pattern}; correct the line or remove it")
        for tar in tars:
            if seen.setdefault(tar, number) != number:
                raise ValueError(f"{path}, line {number}: {tar} is already on line {seen[tar]}; remove one of them")
            yield f"{prefix} = {tar}" if prefix else tar


def _expand(address: str) -> list[str]:
    if "://" not in address:
        return sorted(glob.glob(address, recursive=True)) if glob.has_magic(address) else [address]  # noqa: PTH207
    from fsspec.core import url_to_fs

    system, path = url_to_fs(address)
    if "*" not in path and "[" not in path:
        return [address]
    return [system.unstrip_protocol(match) for match in sorted(system.glob(path))]


def _parse_line(line: str) -> tuple[str, str]:
    """Prefix and address of a line."""
    match = _LINE.fullmatch(line)
    assert match is not None  # the line is not blank
    return match["prefix"] or "", match["address"].strip()
