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


@pytest.mark.parametrize("given", ["x", "0", "-1", "1.5"])
def test_a_share_that_is_no_number_is_an_error_that_names_the_variable(monkeypatch, given):
    monkeypatch.setenv(CORES, given)
    with pytest.raises(ValueError, match=rf"^LOTLIP_CORES is '{given}' in the environment; set it to a number in 1 to"):
        available_cores()
