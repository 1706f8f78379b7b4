"""Runs programs in process groups of their own, which end with the program that started them.

`python -m flows.runtime.supervisor COMMAND…` runs a command and exits with its status. A program that is killed by
SIGKILL cannot clean up, so the supervisor runs between the program and the command. The kernel signals the supervisor,
which ends all processes that the command has started.
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
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervised(command: Sequence[str]) -> list[str]:
    """Returns the command that runs a command under a supervisor."""
    return [sys.executable, "-m", "flows.runtime.supervisor", *command]


def start_group(command: Sequence[str], sign: int = signal.SIGTERM, **options: Any) -> subprocess.Popen[Any]:
    """Starts a command in a process group of its own. It gets a signal when this process ends, even by SIGKILL.

    May be called from any thread.

    Args:
        command: the program and its arguments.
        sign: the signal.
        options: options of subprocess.Popen.
    """
    bind = partial(_bind_to_parent, os.getpid(), sign)
    start = partial(subprocess.Popen, command, start_new_session=True, preexec_fn=bind, **options)
    # The kernel signals a child when the thread that started it ends. The main thread lives as long as the process.
    if threading.current_thread() is threading.main_thread():
        return start()
    return _starter_thread(os.getpid())(start)


def _bind_to_parent(parent: int, sign: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
    end_with_parent(parent, sign)


@contextmanager
def group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Starts a command as `start_group` does, and ends its process group with the block.

    Signals are blocked until the command has started and the block has begun, so that they cannot prevent the clean-up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
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
def _starter_thread(_process: int) -> Callable[[Callable[[], subprocess.Popen[Any]]], subprocess.Popen[Any]]:
    """Returns a function that runs its argument in one thread, which lives as long as the process.

    A fork needs a new thread, so the cache's key is the process id.
    """
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
def exit_on_signals() -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and SIGHUP (a closed terminal) raise an exception in the block, so that it can clean up.

    Only the first signal has an effect: a second one would interrupt the clean-up.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
        SystemExit: on SIGTERM and SIGHUP, with status 128 plus the signal's number, as in a shell.
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
    for sign in END_SIGNALS:
        if signal.getsignal(sign) != signal.SIG_IGN:  # ignored under nohup
            before[sign] = signal.signal(sign, end)
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends the remaining processes of a group: by SIGTERM first, then by SIGKILL."""
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
    with exit_on_signals(), group(sys.argv[1:]) as command:
        command.wait()
    sys.exit(command.returncode if command.returncode >= 0 else 128 - command.returncode)
