"""Two drills on the real pipeline: kills, and a flipped bit of an output."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_pipeline import ROOT


@pytest.fixture
def prebuilt(prefect_database: Path, tmp_path: Path) -> Path:
    """Prefect's tables, which take a minute to create."""
    folder = tmp_path / "prebuilt"
    (folder / "project" / ".prefect").mkdir(parents=True)
    shutil.copy(prefect_database, folder / "project" / ".prefect")
    return folder


@pytest.mark.system
def test_the_pipeline_recovers_from_kills_and_a_flipped_bit(prebuilt: Path, tmp_path: Path) -> None:
    out = tmp_path / "drills.json"
    options = ["--seed", "1", "--kinds", "kill", "flip", "--count", "2", "--kills", "2"]
    folders = ["--prebuilt", str(prebuilt), "--folder", str(tmp_path / "drills"), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.drills", *options, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    results = {row["kind"]: row for row in json.loads(out.read_text())["rows"]}
    assert results.keys() == {"kill", "flip"}
    assert all(row["tried"] == row["recovered"] == row["identical"] > 0 for row in results.values())
