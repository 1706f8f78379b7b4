"""The benchmark of orchestration: a full run, a run of no recorded stage, and no run."""

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
    """The folder of stage records in an empty project, with a record of ingest at 100 seconds after the epoch."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "metrics" / "stages"
    RECORD.write(folder / "ingest.json")
    os.utime(folder / "ingest.json", (100, 100))
    return folder


def test_a_full_run_is_split_into_work_and_orchestration(stages: Path) -> None:
    write_json(Path(".lotlip/reproduce.json"), {"started": 90, "seconds": 10.0, "parallel_stages": 1})
    measured = measure()
    assert (measured["ingest"]["work"], measured["ingest"]["imports"], measured["all"]["up to date"]) == (6.0, 1.0, 0)
    assert measured["all"]["servers, DVC, rest"] == 2.5
    assert measured["all"]["orchestration share"] == pytest.approx(0.4)


def test_stages_at_the_same_time_have_as_many_times_the_seconds(stages: Path) -> None:
    write_json(Path(".lotlip/reproduce.json"), {"started": 90, "seconds": 10.0, "parallel_stages": 2})
    assert measure()["all"]["servers, DVC, rest"] == 12.5
    assert measure()["all"]["orchestration share"] == pytest.approx(0.7)


def test_a_run_that_recorded_no_stage_is_all_orchestration(stages: Path) -> None:
    write_json(Path(".lotlip/reproduce.json"), {"started": 200, "seconds": 26.0, "parallel_stages": 1})
    measured = measure()
    assert list(measured) == ["all"]
    assert (measured["all"]["up to date"], measured["all"]["orchestration share"]) == (1, 1)
    assert "1 stages were up to date" in table(measured)


def test_no_run_is_an_error_with_a_remedy(stages: Path) -> None:
    with pytest.raises(ValueError, match="run `make reproduce` first"):
        measure()
