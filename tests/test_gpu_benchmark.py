"""The GPU's benchmark runs on any machine with small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.system
def test_every_part_gives_its_figures() -> None:
    from benchmarks.gpu import PARTS, measure

    parts = [part for part in PARTS if part != "images"]  # torch.compile takes a minute on a CPU
    found = measure("cpu", small=True, parts=parts)
    assert list(found) == parts
    assert not [figures["error"] for figures in found.values() if "error" in figures]
    assert found["equal"]["equal"]
    assert found["resume"] | {"seconds": 0} == {"killed": True, "bit_for_bit": True, "seconds": 0}
    assert found["fork"]["works"]
    for part in ("bert", "clip"):
        assert found[part]["samples_per_second"] > 0
        assert 0 < found[part]["share_of_peak"] < 2


@pytest.mark.integration
def test_a_part_that_dies_is_reported_at_once(monkeypatch) -> None:
    from benchmarks import gpu

    monkeypatch.setitem(gpu.PARTS, "dies", lambda device, scale: os._exit(3))
    assert gpu.measure("cpu", small=True, parts=["dies"]) == {"dies": {"error": "the process ended with 3"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.integration
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no GPU" in run.stdout
    with pytest.raises(json.JSONDecodeError):
        json.loads(run.stdout)
