"""Why a program of a sweep failed, from its output."""

from __future__ import annotations

import re
import signal

# Patterns of lines that name an error, most specific first: a stage's message, the last line of a traceback, a log
# record, DVC's summary.
_ERRORS = (
    r"error in ",
    r"error: ",
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failed|Stopped)(?::|$)",
    r"[\d:. -]+\| (?:ERROR|CRITICAL) ",
    r"ERROR: ",
)


def failure_reason(log: str, status: int) -> str:
    """Finds the line of a log that names the error; without one, describes how the program ended.

    Args:
        log: the program's output.
        status: exit status; after a signal N it is -N, or 128 + N from the supervisor.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in _ERRORS:
        if matching := [line for line in lines if re.match(pattern, line)]:
            return matching[0]
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        out_of_memory = "; the machine may be out of memory" if number == signal.SIGKILL else ""
        return f"it was killed by {signal.Signals(number).name}{out_of_memory}"
    return f"it exited with status {status} without an error message"
