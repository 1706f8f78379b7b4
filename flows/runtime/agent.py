"""Joins trainings from another machine: `python -m flows.runtime.agent`, in the project's shared folder.

The machine that runs the stages announces each training in a file there. An agent starts its share of the processes,
ends them when the announcement is removed, and waits for the next one until it is stopped. With `--heartbeat FILE` it
touches a file while it does so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.runtime.processes import STORE_CLIENT, STORE_HOST
from flows.runtime.scratch import SCRATCH
from flows.runtime.supervisor import end_group, exit_on_signals, start_group
from lotlip.core.caches import Locked, lock
from lotlip.core.compute import Launch, LocalLaunch, RendezvousLaunch
from lotlip.core.console import INTERRUPTED
from lotlip.core.files import read_json, remove, write_json

ANNOUNCED = SCRATCH / "announced.json"
POLL_SECONDS = 2


@contextmanager
def announced(command: Sequence[str], settings: Launch) -> Iterator[None]:
    """Announces a training to the agents for the duration of the block, if the launch is a rendezvous.

    Stages that run side by side (`compute.parallel_stages`) take turns if they train on several machines: each training
    needs all of them and the same port.

    Args:
        command: this machine's command, from `flows.runtime.processes.launch`.
        settings: `compute.training.launch`.
    """
    if isinstance(settings, LocalLaunch):
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(SCRATCH / "machines.lock"))
        except Locked:
            print("waiting for the end of another training on these machines", flush=True)
            stack.enter_context(lock(SCRATCH / "machines.lock", wait=True))
        if not isinstance(settings, RendezvousLaunch):
            yield
            return
        write_json(ANNOUNCED, [STORE_CLIENT if word == STORE_HOST else word for word in command[1:]])
        try:
            yield
        finally:
            remove(ANNOUNCED)


def join(heartbeat: Path | None = None) -> None:
    """Joins every announced training, until a signal ends it. If a training fails here, waits for the next one.

    Args:
        heartbeat: file that is touched at each look for an announcement.
    """
    joined, process = None, None
    try:
        while True:
            command = _announcement()
            if heartbeat:
                heartbeat.touch()
            if command != joined:
                if process:
                    end_group(process)
                process = start_group([sys.executable, *command]) if command else None
                joined = command
                print(f"joining {' '.join(command)}" if command else "waiting for the next training", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        if process:
            end_group(process)


def _announcement() -> list[str] | None:
    try:
        return read_json(ANNOUNCED)
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.runtime.agent", description="Joins announced trainings.")
    parser.add_argument("--heartbeat", type=Path, help="file that is touched every few seconds", metavar="FILE")
    arguments = parser.parse_args()
    with exit_on_signals():
        try:
            join(arguments.heartbeat)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(INTERRUPTED)
