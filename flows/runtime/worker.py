"""Runs units of work that another process or machine sends: `python -m flows.runtime.worker` for `processes`.

It reads pickled units from standard input, and writes what comes of them to standard output. Pickles pass only between
a flow and the workers that it has started.
"""

from __future__ import annotations

import os
import pickle
import sys

from flows.runtime.unit_work import answer


def main() -> None:
    """Runs units until standard input ends."""
    torch = sys.modules.get("torch")
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list has a number for each nested level
    if torch and threads.isdecimal() and int(threads):  # a fork server's fork: torch has read another value
        torch.set_num_threads(int(threads))
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    while True:
        try:
            request: bytes = pickle.load(inbox)  # noqa: S301 - from the flow that started this process
        except EOFError:
            return
        pickle.dump(answer(request), outbox)  # pickled twice: if its work cannot be loaded, the stream continues
        outbox.flush()


if __name__ == "__main__":
    main()
