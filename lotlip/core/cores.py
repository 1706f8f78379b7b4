"""The cores of this process."""

import os

CORES = "LOTLIP_CORES"  # set in the environment of a program that shares the machine with others: its share


def available_cores() -> int:
    """The number of cores that this process may use: under Slurm and in containers, often not all of the machine's."""
    if share := os.environ.get(CORES):
        return int(share)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
