"""Ties a process's life to its parent's, however the parent ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# Looked up at import, so that the fork of a threaded process only has to call it.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None, sign: int = signal.SIGKILL) -> None:
    """Asks the kernel to signal this process when its parent ends. Does nothing on systems other than Linux.

    The kernel watches the thread that started this process, not the parent process: start such processes from a thread
    that lives as long as the parent, as `flows.runtime.supervisor.start_group` does.

    Args:
        parent: expected id of the parent; this process ends at once if its parent is another. Without it, a parent
            that ended before this call goes unnoticed.
        sign: the signal to receive.
    """
    if _PRCTL is None:
        return
    _PRCTL(_PR_SET_PDEATHSIG, int(sign))
    if parent is not None and os.getppid() != parent:
        os._exit(128 + sign)
