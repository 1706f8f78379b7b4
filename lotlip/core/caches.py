"""The current user's cache folder, and lock files that keep two programs apart."""

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
    """The folder for rebuildable files: LOTLIP_CACHE, else the user's cache, else the project's `.lotlip/cache`.

    The last one serves users without a writable home, as in containers.

    Raises:
        OSError: LOTLIP_CACHE is set and cannot be written to.
    """
    if configured := os.environ.get(CACHE):
        folder = Path(configured).expanduser()
        try:
            return private_folder(folder)
        except OSError as error:
            raise OSError(f"{CACHE} is {folder}, which cannot be used: {error}; name a folder of yours") from error
    return default_cache_folder()


def default_cache_folder() -> Path:
    """The cache folder without LOTLIP_CACHE."""
    for place in (_user_cache, lambda: Path(tempfile.gettempdir(), f"lotlip-{os.getuid()}")):
        try:
            return private_folder(place())  # RuntimeError for a user with neither a home nor a name
        except (OSError, RuntimeError):
            continue
    return private_folder(Path(".lotlip/cache").resolve())


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "lotlip"


def private_folder(folder: Path) -> Path:
    """Creates a folder that only this user can write to, and returns it.

    Raises:
        OSError: it cannot be created or written to, is a link, or belongs to another user.
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
        path: the lock file. It is created and never removed: removing it would let two processes hold the lock.
        what: names the locked thing in the error.
        wait: wait until the lock is free, without a limit.

    Raises:
        Locked: another process holds it, and `wait` is false. The message gives that process's id if the file has it.
        OSError: `path` is a link or cannot be created.
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
