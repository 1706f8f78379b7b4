"""Programs in process groups of their own, which end with the program that started them.

`python -m flows.runtime.supervisor COMMAND…` runs a command so, and ends with its status. A program that is killed by
SIGKILL cannot clean up. The supervisor runs between it and the command: the kernel signals the supervisor, which ends
all that the command has started.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from lotlip.core.lifetime import end_with_parent

GRACE_SECONDS = 10
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def guarded(command: Sequence[str]) -> list[str]:
    """The command that runs another one under a guard."""
    return [sys.executable, "-m", "flows.runtime.supervisor", *command]


def start_group(command: Sequence[str], sign: int = signal.SIGTERM, **options: Any) -> subprocess.Popen[Any]:
    """Starts a command in a process group of its own, which gets a signal when this process ends, even by SIGKILL.

    May be called from any thread.

    Args:
        command: and its arguments.
        sign: the signal.
        options: of subprocess.Popen.
    """
    tie = partial(_tie, os.getpid(), sign)
    start = partial(subprocess.Popen, command, start_new_session=True, preexec_fn=tie, **options)
    # The kernel signals a child when the thread that started it ends. The main thread lasts as long as the process.
    if threading.current_thread() is threading.main_thread():
        return start()
    return _starter(os.getpid())(start)


def _tie(parent: int, sign: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    end_with_parent(parent, sign)


@contextmanager
def group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Starts a command as `start_group` does, and ends what is left of its group with the block.

    A signal that arrives while the command starts is delivered when the block has begun, so that it cannot prevent the
    clean-up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process = start_group(command, **options)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield process
        finally:
            end_group(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _starter(_process: int) -> Callable[[Callable[[], subprocess.Popen[Any]]], subprocess.Popen[Any]]:
    """Runs functions in one thread that lasts as long as the process; a fork needs another, hence the argument."""
    waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            function, result = waiting.get()
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

    threading.Thread(target=work, name="starts processes", daemon=True).start()

    def run(function: Callable[[], subprocess.Popen[Any]]) -> subprocess.Popen[Any]:
        result: Future[Any] = Future()
        waiting.put((function, result))
        return result.result()

    return run


@contextmanager
def ending_well() -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the block by an exception, so that it can clean up.

    Only the first signal counts: a second one would interrupt the clean-up.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
        SystemExit: on SIGTERM and SIGHUP, with the status that a shell gives a program that they end.
    """
    ending = False

    def end(sign: int, _frame: Any) -> None:
        nonlocal ending
        if ending:
            return
        ending = True
        if sign == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + sign)

    before = {}
    for sign in ENDING:
        if signal.getsignal(sign) != signal.SIG_IGN:  # as under nohup
            before[sign] = signal.signal(sign, end)
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


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
    with ending_well(), group(sys.argv[1:]) as command:
        command.wait()
    sys.exit(command.returncode if command.returncode >= 0 else 128 - command.returncode)
