"""Training processes: one group of their own, so that none outlives the flow that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.stage import StageFailed

GRACE_SECONDS = 10


def launch(module: str, arguments: Sequence[str], processes: int) -> list[str]:
    """The command that runs a module as one process (a warm one's, if there is one), or as N under torch's launcher."""
    if processes == 1:
        return [sys.executable, "-m", "flows.run", module, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", module, *arguments]


def run_group(command: Sequence[str], on_line: Callable[[str], None], log: Path) -> None:
    """Runs a command in a process group of its own and hands its lines on; ends the whole group when this flow ends.

    Args:
        command: and its arguments.
        on_line: takes each line of standard output.
        log: file that keeps standard error.

    Raises:
        StageFailed: the command failed; the message has the last lines it wrote.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    with log.open("w") as errors:
        process = start_group(command, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    last = line.rstrip()
                    on_line(last)
            process.wait()
        finally:
            end_group(process)
    if process.returncode:
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-5:]
        reasons = [line for line in tail if line.startswith("error: ")] or tail or [last]
        raise StageFailed(f"{reasons[-1].removeprefix('error: ')} (status {process.returncode}; all it wrote: {log})")


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
