"""The cores of this process."""

import os

from lotlip.core.environment import number_of

CORES = "LOTLIP_CORES"  # set in the environment of a program that shares the machine with others: its share


def available_cores() -> int:
    """The number of cores that this process may use: under Slurm and in containers, often not all of the machine's.

    Raises:
        ValueError: LOTLIP_CORES is not a number.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return number_of(CORES, available, 2**16)
