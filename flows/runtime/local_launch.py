"""Several training processes on this machine: `python -m flows.runtime.local_launch NUMBER MODULE ARGUMENTS…`.

They meet through a file. torchrun would keep a store for them that listens on all of the machine's interfaces. The
first process that fails ends the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from flows.runtime.supervisor import ending_well, group
from lotlip.core.temporary import temporary_folder

STORE = "LOTLIP_STORE"  # the file, for `lotlip.pretrain.engine`
POLL_SECONDS = 0.1


def together(number: int, command: Sequence[str]) -> int:
    """Runs a module as so many processes; gives the status of the first that failed, or 0.

    Args:
        number: of processes.
        command: the module and its arguments.
    """
    with temporary_folder("store") as folder, ExitStack() as stack:
        processes = []
        for rank in range(number):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
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
                process.terminate()  # all at once: the end of the block waits for one after another
    return failed[0] if failed and failed[0] > 0 else 128 - failed[0] if failed else 0


if __name__ == "__main__":
    with ending_well():
        result = together(int(sys.argv[1]), sys.argv[2:])
    sys.exit(result)
