"""Launches training processes on this machine: `python -m flows.runtime.local_launch NUMBER MODULE ARGUMENTS…`.

The ranks rendezvous through a file, because torchrun's store would listen on all of the machine's network interfaces.
If a process fails, the others are ended.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from flows.runtime.supervisor import exit_on_signals, group
from lotlip.core.temporary import temporary_folder

STORE = "LOTLIP_STORE"  # environment variable with the file's path, read by `lotlip.pretrain.engine`
POLL_SECONDS = 0.1


def run_ranks(number: int, command: Sequence[str]) -> int:
    """Runs a module in several processes, one for each rank.

    Args:
        number: number of processes.
        command: the module and its arguments.

    Returns:
        The exit status of the first process that failed, or 0. For a signal it is 128 plus the signal's number.
    """
    with temporary_folder("store") as folder, ExitStack() as stack:
        processes = []
        for rank in range(number):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            environment = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
            environment[STORE] = str(folder / "store")
            program = [sys.executable, "-m", "flows.runtime.run", *command]
            processes.append(stack.enter_context(group(program, env=environment)))
        while True:
            ended = [process.poll() for process in processes]
            failed = [status for status in ended if status]
            if failed or None not in ended:
                break
            time.sleep(POLL_SECONDS)
        for process in processes:
            if process.poll() is None:
                process.terminate()  # all at once, because the end of the block waits for each in turn
    return failed[0] if failed and failed[0] > 0 else 128 - failed[0] if failed else 0


if __name__ == "__main__":
    with exit_on_signals():
        result = run_ranks(int(sys.argv[1]), sys.argv[2:])
    sys.exit(result)
