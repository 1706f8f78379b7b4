"""A few drills of every kind on the real pipeline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.drills.drills import KINDS
from tests.tiny_pipeline import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prebuilt(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would take the checkout of the drills a minute to make: Prefect's tables."""
    folder = tmp_path_factory.mktemp("prebuilt")
    (folder / "project" / ".prefect").mkdir(parents=True)
    shutil.copy(prefect_database, folder / "project" / ".prefect")
    return folder


def test_the_pipeline_recovers_from_every_kind_of_drill(prebuilt: Path, tmp_path: Path) -> None:
    out = tmp_path / "drills.json"
    options = ["--seed", "1", "--minutes", "30", "--count", str(len(KINDS)), "--kills", "2"]
    folders = ["--prebuilt", str(prebuilt), "--folder", str(tmp_path / "drills"), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.drills", *options, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(out.read_text())
    assert {row["kind"] for row in found["rows"]} == set(KINDS)
    assert all(row["skipped"] == (row["drills"] if row["tried"] == 0 else 0) for row in found["rows"])
    assert "0 failed" in done.stdout
