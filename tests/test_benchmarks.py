"""One command runs all benchmarks and stores their results."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as all_benchmarks
from benchmarks import packing
from lotlip.core.files import read_json
from tests.tiny_pipeline import ROOT


@pytest.fixture
def commands_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Replaces the benchmarks: the loader fails the first time, and the others have results."""
    calls: list[list[str]] = []

    def run(command: list[str]) -> dict[str, Any]:
        calls.append(command)
        if command[0] == "loader" and calls.count(command) == 1:
            return {"error": "Traceback\nno such folder", "status": 1}
        return {"result": {"seconds": 1.0}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(all_benchmarks, "run", run)
    return calls


def run_benchmarks(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    all_benchmarks.main()


def test_results_are_stored_and_failed_benchmarks_repeated(commands_run, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1 of 17 benchmarks failed: loader"):
        run_benchmarks(monkeypatch)
    assert "no such folder" in capsys.readouterr().err
    stored = read_json(Path("benchmarks.json"))
    assert stored["results"].keys() == all_benchmarks.COMMANDS.keys()
    assert stored["machine"]["cpu"] and stored["machine"]["memory_bytes"] > 0
    called_before = len(commands_run)
    run_benchmarks(monkeypatch, "--continue")
    assert commands_run[called_before:] == [all_benchmarks.COMMANDS["loader"]]
    assert all("result" in entry for entry in read_json(Path("benchmarks.json"))["results"].values())


def test_results_are_not_replaced_and_names_are_checked(commands_run, monkeypatch, capsys):
    run_benchmarks(monkeypatch, "step")
    with pytest.raises(SystemExit):
        run_benchmarks(monkeypatch, "step")
    assert "benchmarks.json exists; add --continue" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_benchmarks(monkeypatch, "--out", "other.json", "stap")
    assert "unknown: stap; choose from" in capsys.readouterr().err
    assert commands_run == [all_benchmarks.COMMANDS["step"]]


@pytest.mark.parametrize("name", all_benchmarks.COMMANDS)
def test_the_documentation_names_each_benchmark(name):
    module = all_benchmarks.COMMANDS[name][0]
    assert find_spec(f"benchmarks.{module}")
    assert f"`python -m benchmarks.{module}" in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", packing.FAMILIES)
def test_packed_and_padded_texts_are_compared(family):
    options = Namespace(width=64, layers=2, texts=4, rounds=1, long=(8, 24))
    figures = packing.measure(family, options)
    assert min(figures.values()) > 0


def test_packed_texts_with_other_features_are_an_error(monkeypatch):
    encode = packing.encode
    monkeypatch.setattr(packing, "encode", lambda tower, batches, packed: encode(tower, batches, packed) + packed)
    with pytest.raises(AssertionError, match=r"features of bert differ by (1\.|0\.99)"):
        packing.measure("bert", Namespace(width=64, layers=1, texts=2, rounds=1, long=(8, 9)))
