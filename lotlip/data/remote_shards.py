"""Shards on S3 and other stores: training reads them through a cache of bounded size on the local disk.

A copy of the shard stage's folder is at a URL of fsspec. The processes of a machine share the cache, also those of
several runs. A shard is downloaded when its first sample is needed, or ahead by `ShardCache.prefetch`, and compared
with its hash in `index.json`. The shards that were used the longest ago make room for new ones.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lotlip.core.caches import Locked, lock
from lotlip.core.compute import RemoteShards
from lotlip.core.files import SCRATCH, atomic_write, remove, sha256_files, sha256_json
from lotlip.data.index import INDEX_FILE, ShardEntry, ShardIndex, read_index
from lotlip.data.tars import IDS, INDEX, TarSamples

_TAR, _LOCK = ".tar", ".lock"
_RESERVED = ".reserved"  # a sparse file of a shard's size, while the shard is downloaded
_SIDECARS = (INDEX, IDS)
_DOWNLOADS = 4  # shards that a process downloads ahead at the same time


class ShardCache:
    """The shards of a data set, from its copy at a URL.

    Args:
        settings: the URL, the folder and the size of the cache.
        entries: shards of the data set, from its `index.json`.
        held: number of tars that a process keeps open. A removed file takes space until it is closed.

    Attributes:
        folder: folder of the downloaded files.

    Raises:
        ValueError: the cache has no room for the tars that stay open.
    """

    def __init__(self, settings: RemoteShards, entries: Sequence[ShardEntry], held: int) -> None:
        needed = sum(sorted((entry.bytes for entry in entries), reverse=True)[:held])
        if needed > settings.max_bytes:
            raise ValueError(
                f"compute.training.remote_shards.max_bytes {settings.max_bytes:,} is less than the {needed:,} bytes of "
                f"the {min(held, len(entries))} shards that training mixes; raise it, or set shard.max_bytes lower"
            )
        self._settings = settings
        self._entries = {entry.name: entry for entry in entries}
        base = settings.cache / SCRATCH / "shards"
        # data sets whose shards have the same names are kept apart
        self.folder = base / sha256_json([[entry.name, entry.sha256] for entry in entries])[:16]
        self._base = base
        self._asked: list[str] = []
        self._ahead: deque[str] = deque()

    def open(self, tar: Path) -> TarSamples:
        """Opens a tar in `folder`, which is downloaded if it is not there.

        Raises:
            ValueError: the store lacks a file or does not answer, or the tar is not the one in `index.json`.
        """
        name = tar.name.removesuffix(_TAR)
        with lock(self.folder / f"{name}{_LOCK}", wait=True):  # not removed before it is open
            self._provide(name)
            return TarSamples(tar)

    def prefetch(self, names: Iterable[str]) -> None:
        """Starts to download shards in the background, in order; errors are left to `open`."""
        wanted = list(names)
        if wanted == self._asked:
            return
        self.close()
        self._asked, self._ahead = wanted, deque(wanted)
        for _ in range(_DOWNLOADS):  # daemons: a process that ends does not wait for them
            threading.Thread(target=self._download_ahead, args=(self._ahead,), daemon=True).start()

    def close(self) -> None:
        """Drops downloads that have not begun."""
        self._ahead.clear()
        self._asked = []

    def _download_ahead(self, names: deque[str]) -> None:
        while True:
            try:
                name = names.popleft()
            except IndexError:
                return
            with suppress(Locked, ValueError, OSError), lock(self.folder / f"{name}{_LOCK}"):
                self._provide(name)

    def _provide(self, name: str) -> None:
        """Downloads a shard unless it is there. The caller holds its lock."""
        tar, entry = self.folder / f"{name}{_TAR}", self._entries[name]
        if tar.is_file() and tar.stat().st_size == entry.bytes:
            os.utime(tar)  # the most recently used
            return
        with self._room(name, entry.bytes), _store(self._settings.url) as (system, root):
            for ending in _SIDECARS:
                if system.exists(f"{root}/{name}{ending}"):  # a listing would be of all shards
                    with atomic_write(self.folder / f"{name}{ending}") as partial:
                        system.get_file(f"{root}/{name}{ending}", str(partial))
            with atomic_write(tar) as partial:  # last: a tar that is there is complete
                system.get_file(f"{root}/{tar.name}", str(partial))
                if sha256_files([partial]) != entry.sha256:
                    raise ValueError(
                        f"{self._settings.url}/{tar.name} is not the shard that {INDEX_FILE} lists; {_upload_again()}"
                    )

    @contextmanager
    def _room(self, name: str, size: int) -> Iterator[None]:
        """Reserves `size` bytes for a shard. The caller holds its lock.

        Removes the shards that were used the longest ago, of all data sets, until the shard fits.
        """
        reserved = self.folder / f"{name}{_RESERVED}"
        with lock(self._base / "room.lock", wait=True):
            paths = [path for ending in (_TAR, _RESERVED) for path in self._base.glob(f"*/*{ending}")]
            files = [(path, status) for path in paths if (status := _status(path))]
            used = size + sum(status.st_size for _, status in files)
            for path, status in sorted(files, key=lambda found: found[1].st_mtime_ns):
                if used <= self._settings.max_bytes:
                    break
                with suppress(Locked), lock(path.with_suffix(_LOCK)):  # free for a download that was killed
                    for ending in (_TAR, _RESERVED, *_SIDECARS):
                        remove(path.with_suffix(ending))
                    used -= status.st_size
            with reserved.open("wb") as file:
                file.truncate(size)
        try:
            yield
        finally:
            remove(reserved)


def open_index(shards: Path, remote: RemoteShards | None) -> ShardIndex:
    """Reads `index.json` of the shards that training reads: in the folder, or at the URL of their copy."""
    return _remote_index(remote.url) if remote else read_index(shards, ShardIndex)


def _remote_index(url: str) -> ShardIndex:
    """Reads `index.json` of a data set at a URL.

    Raises:
        ValueError: it does not exist, cannot be read, or is of another kind.
    """
    with _store(url) as (system, root):
        data = system.cat_file(f"{root}/{INDEX_FILE}")
    try:
        return ShardIndex.model_validate_json(data)
    except ValueError as error:
        raise ValueError(f"{url}/{INDEX_FILE} is damaged ({error}); {_upload_again()}") from error


def check_same(url: str, shards: Path) -> None:
    """Checks that a URL has the data set of a folder.

    Raises:
        ValueError: it has another one, or none.
    """
    if _remote_index(url) != read_index(shards, ShardIndex):
        raise ValueError(f"{url} has other shards than {shards}; {_upload_again()}")


def upload(shards: Path, url: str, on_file: Callable[[int, int, str], None] = lambda done, total, name: None) -> int:
    """Copies the tars of a folder with their indexes to a URL; `index.json` is last, so it lists only what is there.

    Files that are there are not copied again: those of shards that the `index.json` at the URL lists with the same
    hash, if they have the same size.

    Args:
        shards: folder of the shard stage.
        url: of fsspec, such as s3://bucket/shards.
        on_file: called after each file with the number of files done, their total and the name.

    Returns:
        The number of files that were copied.

    Raises:
        ValueError: a file is missing, or the store refuses.
    """
    index = read_index(shards, ShardIndex)
    names = [f"{entry.name}{end}" for entry in index.shards for end in (*_SIDECARS, _TAR)]
    files = [shards / name for name in names if name.endswith(_TAR) or (shards / name).is_file()]
    copied = 0
    with _store(url) as (system, root):
        there = {Path(name).name: about["size"] for name, about in system.glob(f"{root}/*", detail=True).items()}
        same = set[str]()
        if INDEX_FILE in there:
            with suppress(ValueError):
                listed = {entry.name: entry.sha256 for entry in _remote_index(url).shards}
                same = {entry.name for entry in index.shards if listed.get(entry.name) == entry.sha256}
        system.makedirs(root, exist_ok=True)
        for done, file in enumerate([*files, shards / INDEX_FILE], 1):
            known = file.name.partition(".")[0] in same and there.get(file.name) == file.stat().st_size
            if not known or file.name == INDEX_FILE:
                system.put_file(str(file), f"{root}/{file.name}")
                copied += 1
            on_file(done, len(files) + 1, file.name)
    return copied


def _upload_again() -> str:
    return "upload the shards again (python -m flows.upload_shards)"


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # another process has removed it
        return None


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Yields the file system of a URL and the path on it; turns errors of the store into a ValueError with the URL."""
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(url)
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error
    except ImportError as error:
        raise ValueError(
            f"{url} cannot be opened: {error}; install the package, for s3:// with: pip install 'lotlip[s3]'"
        ) from error
    try:
        system.invalidate_cache()  # it caches listings
        yield system, root.rstrip("/")
    except FileNotFoundError as error:
        raise ValueError(f"{url} lacks {Path(str(error)).name or error}; {_upload_again()}") from error
    except (ValueError, Locked):
        raise
    except Exception as error:  # stores raise their own types
        raise ValueError(f"{url} cannot be used: {error!r}") from error
