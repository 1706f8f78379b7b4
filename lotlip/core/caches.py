"""Folders and lock files of the current user: where caches live, and how two programs keep out of each other's way."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = "LOTLIP_CACHE"


class Locked(OSError):
    """Another process holds the lock."""


def cache_folder() -> Path:
    """The folder for what can be made again: LOTLIP_CACHE, else the user's cache, else `.lotlip/cache` of the project.

    The last one is for users without a home, or with one that they cannot write to, as in containers.

    Raises:
        OSError: LOTLIP_CACHE is set and cannot be written to.
    """
    if named := os.environ.get(CACHE):
        folder = Path(named).expanduser()
        try:
            return private_folder(folder)
        except OSError as error:
            raise OSError(f"{CACHE} is {folder}, which cannot be used: {error}; name a folder of your own") from error
    for place in (_user_cache, lambda: Path(tempfile.gettempdir(), f"lotlip-{os.getuid()}")):
        try:
            return private_folder(place())  # a user without a home and a name has no such place: RuntimeError
        except (OSError, RuntimeError):
            continue
    return private_folder(Path(".lotlip/cache").resolve())


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "lotlip"


def private_folder(folder: Path) -> Path:
    """Makes a folder that only this user can write to, and returns it.

    Raises:
        OSError: it cannot be made or written to, is a link, or belongs to another user.
    """
    if not folder.is_absolute():
        raise OSError(f"{folder} is not an absolute path")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{folder} is a link or belongs to another user")
    if status.st_mode & 0o022:
        folder.chmod(0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


@contextmanager
def lock(path: Path, what: str = "", wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on a file for the block; the kernel frees it when the process ends, however it ends.

    Args:
        path: of the lock file. It is made, never removed: removing it would let two processes hold the lock.
        what: is locked, for the error.
        wait: until the lock is free, however long that takes.

    Raises:
        Locked: another process holds it, and `wait` is false. The message names that process if it has written its
            number.
        OSError: `path` is a link or cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            by = f" by process {holder}" if holder.isdigit() else ""
            raise Locked(f"{what or path} is in use{by}; wait for it to end, or stop it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
