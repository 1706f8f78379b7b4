"""Terminal output shared by all programs: encodings, interrupts, and messages about full disks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import TracebackType

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C
FULL = (errno.ENOSPC, errno.EDQUOT)
# A disk with less free space than this counts as full.
_NEARLY_FULL = 16 * 2**20


def escape_unprintable() -> None:
    """Makes the standard streams escape characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def answer_help(doc: str | None) -> None:
    """Prints a program's docstring and ends the program if its arguments ask for help."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(doc)
        sys.exit()


def exit_on_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends a program after Ctrl-C with one line instead of a traceback; for `sys.excepthook`."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr)
    sys.exit(INTERRUPTED)


def explain(error: BaseException) -> str:
    """An error's message for a person; if a disk is full, the message says which one."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in FULL
    if not full and os.strerror(errno.ENOSPC) not in text and os.strerror(errno.EDQUOT) not in text:
        return text
    filename = getattr(error, "filename", None)
    paths = [Path(os.fsdecode(filename))] if isinstance(filename, (str, bytes)) else []
    paths += [Path.cwd(), Path(tempfile.gettempdir())]
    disks = {mount_of(path): path for path in reversed(paths)}
    free = {mount: shutil.disk_usage(mount).free for mount in disks}
    full_disks = [mount for mount in disks if free[mount] < _NEARLY_FULL]
    # with a quota no disk looks full; then it is the one of the first path
    shown = full_disks or [mount_of(paths[0])]
    space = "; ".join(f"{mount} (with {disks[mount]}) has {free[mount] / 2**20:,.0f} MB left" for mount in shown)
    in_temporary = paths[0].is_relative_to(tempfile.gettempdir())
    other = ", or set TMPDIR to a folder with space," if in_temporary else ""
    return f"{text}: {space}. Free some space there{other} and run again"


def mount_of(path: Path) -> Path:
    """The mount point of the disk that a path is on, or would be created on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path
