"""Runs units of work that another process or machine sends: `python -m flows.runtime.worker` for `processes`.

It reads pickled units from standard input, and writes what comes of them to standard output. Pickles pass only between
a flow and the workers that it has started. Nothing here imports Prefect, so a worker starts fast.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

from lotlip.data.records import NonRetryableError, UnitReport


class UnitWork:
    """The work of a unit, which runs in the current folder, also in another process or on another machine.

    It hides its contents from Prefect, which would search a task's arguments for futures.

    Args:
        work: processes the unit.
    """

    def __init__(self, work: Callable[[], list[UnitReport]]) -> None:
        self.work = work
        self.folder = Path.cwd()

    def call(self) -> list[UnitReport]:
        """Returns the unit's reports; an error that it raises can be sent to other processes."""
        if Path.cwd() != self.folder:  # a cluster's worker starts in another folder
            os.chdir(self.folder)
        try:
            return self.work()
        except Exception as error:
            raise picklable(error) from error


def picklable(error: Exception) -> Exception:
    """Returns an error that other processes can receive: a plain one where unpickling would fail, as openai's do."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - of this process
    except Exception:
        kind = NonRetryableError if isinstance(error, NonRetryableError) else RuntimeError
        return kind(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Runs units until standard input ends."""
    torch = sys.modules.get("torch")
    if torch and (threads := os.environ.get("OMP_NUM_THREADS")):  # a fork server's fork: torch has read another value
        torch.set_num_threads(int(threads))
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    while True:
        try:
            work: UnitWork = pickle.load(inbox)  # noqa: S301 - from the flow that started this process
        except EOFError:
            return
        answer: list[UnitReport] | Exception
        try:
            answer = work.call()
        except Exception as error:
            answer = error
        pickle.dump(answer, outbox)
        outbox.flush()


if __name__ == "__main__":
    main()
