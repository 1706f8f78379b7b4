"""Takes part in training on another machine: `python -m flows.runtime.agent`, in the project's shared folder.

The machine that runs the stages announces each training there. Those that join run their share of it, end it when it is
announced no longer, and wait for the next, until they are ended themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flows.runtime.processes import GUEST, HOST
from flows.runtime.scratch import SCRATCH
from flows.runtime.supervisor import end_group, ending_well, start_group
from lotlip.core.compute import Launch, RendezvousLaunch
from lotlip.core.console import INTERRUPTED
from lotlip.core.files import read_json, remove, write_json

ANNOUNCED = SCRATCH / "announced.json"
POLL_SECONDS = 2


@contextmanager
def announced(command: Sequence[str], how: Launch) -> Iterator[None]:
    """Calls the other machines to a training for as long as the block runs, where they come by rendezvous.

    Args:
        command: this machine's, of `flows.runtime.processes.launch`.
        how: `compute.training.launch`.
    """
    if not isinstance(how, RendezvousLaunch):
        yield
        return
    write_json(ANNOUNCED, [GUEST if word == HOST else word for word in command[1:]])
    try:
        yield
    finally:
        remove(ANNOUNCED)


def join() -> None:
    """Takes part in every training that is announced; a try that failed here waits for the next announcement."""
    joined, process = None, None
    try:
        while True:
            wanted = _announcement()
            if wanted != joined:
                if process:
                    end_group(process)
                process = start_group([sys.executable, *wanted]) if wanted else None
                joined = wanted
                print(f"joins {' '.join(wanted)}" if wanted else "waits for the next training", flush=True)
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
    with ending_well():
        try:
            join()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(INTERRUPTED)
