"""Waits for the ends of processes."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil


def have_ended(processes: list[psutil.Process]) -> bool:
    """Whether all processes end by themselves. In a container, ended ones may remain zombies."""
    deadline = time.monotonic() + 60
    while alive := [process for process in processes if _is_alive(process)]:
        if time.monotonic() > deadline:
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return False
        time.sleep(0.05)
    return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it was reaped between the two calls
        return False
