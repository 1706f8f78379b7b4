"""Temporary folders that are removed even after a kill: the next program clears those of ended processes."""

from __future__ import annotations

import multiprocessing
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lotlip.core.caches import Locked, lock
from lotlip.core.files import ASIDE, remove

PREFIX = "lotlip-"
OWNER = "owner.lock"
# The kernel allows 107 bytes for the path of a socket. Ray appends up to 65, and the folder's own name takes 22.
SOCKET_BASE_BYTES = 20


@contextmanager
def temporary_folder(name: str, for_sockets: bool = False) -> Iterator[Path]:
    """Creates a folder in TMPDIR for the block, and removes it afterwards.

    The process holds a lock on a file in the folder, which the kernel frees however the process ends. A folder whose
    lock is free is abandoned and is removed. A folder in use is therefore safe, also from programs of other containers.

    Args:
        name: becomes part of the folder's name.
        for_sockets: whether paths in the folder must be short; if TMPDIR is too long, another base folder is used.

    Raises:
        OSError: the folder cannot be created. The message names the base folder and TMPDIR.
    """
    base = _short_base() if for_sockets else Path(tempfile.gettempdir())
    _clear_abandoned(base)
    try:
        # created and locked under another name, so that no program takes it for an abandoned one
        folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{name}-", dir=base))
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {base} ({error.strerror}); {_remedy()}") from error
    try:
        with _locked(folder):
            folder = folder.rename(base / folder.name.removeprefix("."))
            yield folder
    finally:
        _remove(folder)


def _remedy() -> str:
    return f"free space there, or set TMPDIR (now {os.environ.get('TMPDIR', 'not set')}) to a folder with space"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with lock(folder / OWNER, str(folder)):
        yield


def _short_base() -> Path:
    """The temporary folder if its path is short enough, else a standard one.

    Raises:
        OSError: no short folder is writable.
    """
    bases = [Path(tempfile.gettempdir()), *map(Path, ("/tmp", "/var/tmp", "/dev/shm"))]  # noqa: S108
    for base in bases:
        if len(os.fsencode(base)) <= SOCKET_BASE_BYTES and os.access(base, os.W_OK | os.X_OK):
            return base
    others = ", ".join(map(str, bases[1:]))
    raise OSError(
        f"no folder for sockets: TMPDIR {bases[0]} has more than {SOCKET_BASE_BYTES} characters, and none of {others} "
        "is writable; set TMPDIR to a shorter path"
    )


def _clear_abandoned(base: Path) -> None:
    """Removes this user's folders whose owner has ended."""
    for folder in base.glob(f"{PREFIX}*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            if folder.name.endswith(ASIDE):
                remove(folder)
                continue
            if not (folder / OWNER).is_file():
                continue
            with _locked(folder):
                _remove(folder)
        except (Locked, OSError):
            continue


def _remove(folder: Path) -> None:
    """Removes a folder under a name that marks it as the project's; files still being written to it may remain."""
    aside = folder.with_name(folder.name + ASIDE)
    with suppress(FileNotFoundError):  # its lock was free for a moment, and another program is removing it
        folder.rename(aside)
    with suppress(OSError):
        remove(aside)


@contextmanager
def multiprocessing_folder() -> Iterator[None]:
    """Gives Python's multiprocessing a temporary folder for its sockets in the block; worker processes inherit it.

    The folder that multiprocessing creates itself remains in TMPDIR after a kill, and its path may be too long for a
    socket.
    """
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    with temporary_folder("mp", for_sockets=True) as folder:
        before = settings.get("tempdir")
        settings["tempdir"] = str(folder)
        try:
            yield
        finally:
            settings["tempdir"] = before
