"""The cores of this process."""

import os


def available_cores() -> int:
    """The number of cores that this process may use: under Slurm and in containers, often not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
