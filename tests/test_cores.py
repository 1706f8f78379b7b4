"""A process uses the cores that it may use, not all of the machine's."""

import os

import pytest

from lotlip.core.cores import CORES, available_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_a_process_bound_to_a_core_has_one(monkeypatch):
    monkeypatch.delenv(CORES, raising=False)
    before = os.sched_getaffinity(0)
    assert available_cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_program_with_a_share_of_the_cores_uses_no_more(monkeypatch):
    monkeypatch.setenv(CORES, "3")
    assert available_cores() == 3
