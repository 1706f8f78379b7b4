"""The GPU benchmark, with small models on a CPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch


@pytest.mark.system
def test_every_part_returns_its_figures() -> None:
    from benchmarks.gpu import PARTS, measure

    torch.ones(1 << 20).exp().sum()  # starts threads, which a fork lacks
    parts = [part for part in PARTS if part != "images"]  # torch.compile takes a minute on a CPU
    results = measure("cpu", small=True, parts=parts)
    assert list(results) == parts
    assert not [figures["error"] for figures in results.values() if "error" in figures]
    assert results["equal"]["equal"]
    assert results["resume"] | {"seconds": 0} == {"killed": True, "bit_for_bit": True, "seconds": 0}
    assert results["fork"]["works"]
    for part in ("bert", "clip"):
        assert results[part]["samples_per_second"] > 0
        assert 0 < results[part]["share_of_peak"] < 2
    assert results["captions"]["captions_per_second"] > 0
    assert results["captions"]["failed"] == 0


def die(*_: object) -> None:
    os._exit(3)


@pytest.mark.integration
def test_a_part_that_crashes_is_reported(monkeypatch) -> None:
    from benchmarks import gpu

    monkeypatch.setitem(gpu.PARTS, "dies", die)
    assert gpu.measure("cpu", small=True, parts=["dies"]) == {"dies": {"error": "the process ended with 3"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.integration
def test_a_missing_gpu_is_an_error(monkeypatch, capsys) -> None:
    from benchmarks import gpu

    monkeypatch.setattr(sys, "argv", ["gpu", "--json"])
    gpu.main()
    assert "no GPU" in capsys.readouterr().out
