"""Runs the stages of a reproduction, several at the same time.

DVC runs one stage after another, but several `dvc repro` may run in a project, as long as no stage reads or writes what
another one writes. Each lane is such a process. It runs the stages that it is given, one after another.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import sqlite3
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from flows.runtime.dvc import (
    RUN_CACHE,
    STOPPING,
    cache_trainings,
    clean_up,
    handle_signals,
    prepare,
    project_root,
    running,
    stop,
)
from flows.runtime.supervisor import group
from lotlip.core.console import FULL, explain

_PULL = "pull"
_DONE, _FAILED = "done", "failed"


def run_stages(
    waits_for: Mapping[str, Iterable[str]], lanes: int, environment: Mapping[str, str], pull: bool = False
) -> int:
    """Runs stages that are stale, each after those that it waits for.

    After a failure no further stage starts, and those that run are finished. If this program is interrupted, they are
    ended.

    Args:
        waits_for: name of a stage → names of the stages that it waits for.
        lanes: how many stages run at the same time.
        environment: environment variables of DVC and the stages.
        pull: whether missing outputs are pulled from DVC's default remote.

    Returns:
        0 if all succeeded, otherwise 1.
    """
    prepare()
    order = TopologicalSorter(waits_for)
    order.prepare()
    ready: deque[str] = deque()
    running: dict[str, _Lane] = {}
    failed = False
    with ExitStack() as stack:
        idle = [stack.enter_context(_lane(environment, pull)) for _ in range(min(lanes, len(waits_for)))]
        stack.callback(_end, list(idle))
        events = stack.enter_context(selectors.DefaultSelector())
        for lane in idle:
            events.register(lane.connection, selectors.EVENT_READ, lane)
        while order.is_active():
            ready.extend(order.get_ready())
            while ready and idle and not failed:
                lane = idle.pop()
                lane.start(ready.popleft())
                running[lane.stage] = lane
            if not running:
                break
            for key, _ in events.select():
                lane = key.data
                del running[lane.stage]
                if lane.succeeded():
                    order.done(lane.stage)
                    idle.append(lane)
                    continue
                events.unregister(lane.connection)
                failed = True
                if running:
                    print(f"{lane.stage} has failed. Still running, and then no more: {', '.join(running)}", flush=True)
    return int(failed)


class _Lane:
    """A process that runs stages.

    Attributes:
        connection: to the process.
        process: in a group of its own.
        stage: that runs, or ran last.
    """

    def __init__(self, connection: socket.socket, process: subprocess.Popen[Any]) -> None:
        self.connection, self.process, self.stage = connection, process, ""
        self._answers = connection.makefile()

    def start(self, stage: str) -> None:
        """Starts a stage."""
        self.stage = stage
        with suppress(OSError):  # the process has ended, which `succeeded` reports
            self.connection.sendall(f"{stage}\n".encode())

    def succeeded(self) -> bool:
        """Waits for the end of the stage or of the process, and returns whether the stage succeeded."""
        answer = ""
        with suppress(OSError):
            answer = self._answers.readline().strip()
        if not answer:
            print(f"error: the process of DVC that ran {self.stage} ended unexpectedly", file=sys.stderr, flush=True)
        return answer == _DONE


@contextmanager
def _lane(environment: Mapping[str, str], pull: bool) -> Iterator[_Lane]:
    """Starts the process of a lane, which ends with the block."""
    here, there = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(here)
        with there:
            number = there.fileno()
            command = [sys.executable, "-m", "flows.runtime.lanes", str(number), *([_PULL] if pull else [])]
            process = stack.enter_context(group(command, env=dict(environment), pass_fds=[number]))
        yield _Lane(here, process)


def _end(lanes: Iterable[_Lane]) -> None:
    """Ends the processes of lanes: idle ones by closing their connections, others by signals."""
    for lane in lanes:
        with suppress(OSError):
            lane.connection.shutdown(socket.SHUT_RDWR)
    stop(*(lane.process for lane in lanes))


def _serve(connection: socket.socket, pull: bool) -> None:
    """Runs the stages whose names arrive, until the connection is closed."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # It tells after each stage how to add dvc.lock to git.
    logging.getLogger("dvc.repo.scm_context").setLevel(logging.WARNING)
    if RUN_CACHE in os.environ:
        cache_trainings()
    for line in connection.makefile():
        if STOPPING in os.environ:
            return
        answer = _DONE
        try:
            with Repo(_wait_for_lock=True) as repo:
                repo.reproduce(line.strip(), single_item=True, pull=pull)
        except (DvcException, OSError, ValueError, sqlite3.Error) as error:
            if STOPPING not in os.environ:  # an interrupted stage is no error
                print(f"error: {_reason(error)}", file=sys.stderr, flush=True)
            answer = _FAILED
        with suppress(OSError):  # this program's owner has ended
            connection.sendall(f"{answer}\n".encode())


def _reason(error: BaseException) -> str:
    """The messages of an error, its cause, and the full disk that led to it, if one did: DVC does not mention that."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    cause = [error.__cause__] if error.__cause__ else []
    full = [one for one in chain if isinstance(one, OSError) and one.errno in FULL][:1]
    return ": ".join(explain(one) for one in dict.fromkeys([error, *cause, *full]))


if __name__ == "__main__":
    handle_signals()
    with running(project_root(Path.cwd())), socket.socket(fileno=int(sys.argv[1])) as connection:
        _serve(connection, _PULL in sys.argv[2:])
    clean_up()
