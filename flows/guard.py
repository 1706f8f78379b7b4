"""Programs in groups of their own, which end with who started them.

`python -m flows.guard COMMAND…` runs a command so, and ends with its status. A program that is killed by SIGKILL can
end nothing itself: the guard between it and the command is told of its end, and ends all that the command has started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

GRACE_SECONDS = 10


def guarded(command: Sequence[str]) -> list[str]:
    """The command that runs another one under a guard."""
    return [sys.executable, "-m", "flows.guard", *command]


def start_group(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a command in a group of its own, which is told to end when this process does, even by SIGKILL.

    Args:
        command: and its arguments.
        options: of subprocess.Popen.
    """
    return subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent, **options)


# Looked up here, so that the fork of a threaded process does nothing but call it.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    if _PRCTL is not None:  # Linux
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def ending_well() -> Iterator[None]:
    """Makes a SIGTERM an ordinary end of the program in the block, so that what it started is ended with it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends what is left of a process's group: asks first, then kills."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    with ending_well():
        command = start_group(sys.argv[1:])
        try:
            command.wait()
        finally:
            end_group(command)
    sys.exit(command.returncode if command.returncode >= 0 else 128 - command.returncode)
