"""What all programs of the project have in common when they talk to a person: encodings, and errors of a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import TracebackType

INTERRUPTED = 128 + signal.SIGINT  # the status of a program that Ctrl-C ends
FULL = (errno.ENOSPC, errno.EDQUOT)
# Less than this is as good as full: a file of this size could not be written.
_NEARLY_FULL = 16 * 2**20


def print_anything() -> None:
    """Lets the standard streams show characters that the terminal's encoding lacks as escapes, not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends a program that Ctrl-C has interrupted by one line instead of a traceback; for `sys.excepthook`."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr)
    sys.exit(INTERRUPTED)


def explain(error: BaseException) -> str:
    """An error's message for a person; where a disk is full, it says which one."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in FULL
    if not full and os.strerror(errno.ENOSPC) not in text and os.strerror(errno.EDQUOT) not in text:
        return text
    named = getattr(error, "filename", None)
    places = [Path(os.fsdecode(named))] if isinstance(named, (str, bytes)) else []
    places += [Path.cwd(), Path(tempfile.gettempdir())]
    disks = {mount_of(place): place for place in reversed(places)}
    free = {mount: shutil.disk_usage(mount).free for mount in disks}
    short = [mount for mount in disks if free[mount] < _NEARLY_FULL]
    # a quota leaves space on the disk; then the disk of the file is the one
    shown = short or [mount_of(places[0])]
    said = "; ".join(f"{mount} (with {disks[mount]}) has {free[mount] / 2**20:,.0f} MB left" for mount in shown)
    in_temporary = places[0].is_relative_to(tempfile.gettempdir())
    other = ", or set TMPDIR to a folder with space," if in_temporary else ""
    return f"{text}: {said}. Free some space there{other} and run again"


def mount_of(path: Path) -> Path:
    """The mount point of the disk that a path is on, or would be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path
