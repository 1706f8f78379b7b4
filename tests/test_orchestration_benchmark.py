"""The benchmark of orchestration: what it says of a whole run, of one that had nothing to do, and of none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.orchestration import measure, table
from lotlip.core.code import ROOT
from lotlip.core.files import write_json
from lotlip.data.stage_record import StageRecord

RECORD = StageRecord(
    stage="ingest",
    name=None,
    seconds=7.5,
    work_seconds=6.0,
    samples=12,
    samples_per_second=2.0,
    orchestration_seconds={"imports": 1.0, "gate": 0.5},
    counts={},
    failure_kinds={},
    gate=[],
    notes={},
)


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stages' records in an empty project, with a record of ingest of the year 1970 + 100 seconds."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "metrics" / "stages"
    RECORD.write(folder / "ingest.json")
    os.utime(folder / "ingest.json", (100, 100))
    return folder


def test_a_run_of_all_stages_is_split_into_work_and_the_rest(stages: Path) -> None:
    write_json(Path(".lotlip/reproduce.json"), {"started": 90, "seconds": 10.0})
    found = measure()
    assert (found["ingest"]["work"], found["ingest"]["imports"], found["all"]["up to date"]) == (6.0, 1.0, 0)
    assert found["all"]["servers, DVC, rest"] == 2.5
    assert found["all"]["orchestration share"] == pytest.approx(0.4)


def test_a_run_that_had_nothing_to_do_was_all_orchestration(stages: Path) -> None:
    write_json(Path(".lotlip/reproduce.json"), {"started": 200, "seconds": 26.0})
    found = measure()
    assert list(found) == ["all"]
    assert (found["all"]["up to date"], found["all"]["orchestration share"]) == (1, 1)
    assert "1 stages were up to date" in table(found)


def test_without_a_run_it_says_what_to_do(stages: Path) -> None:
    with pytest.raises(ValueError, match="run `make reproduce` first"):
        measure()
