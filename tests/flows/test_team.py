"""A team's servers, run natively from infra/compose.yaml: flows, rejected requests, a restored backup, new keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.team.native import Team, missing_programs
from tests.tiny_pipeline import ROOT

pytestmark = pytest.mark.system


def test_pools_access_control_and_backups_work(tmp_path: Path):
    if missing := missing_programs():
        pytest.skip(f"install {', '.join(missing)}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW", "AWS"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.team", "check", str(tmp_path / "team")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-12000:]}"
    checks = [json.loads(line)["seen"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert checks[-1] == "done"
    secrets = [
        line.split("=", 1)[1]
        for folder in ("team/local/secrets", "team/former-secrets")
        for file in (tmp_path / folder).glob("*.env")
        for line in file.read_text().split()
    ]
    logs = "".join(file.read_text(errors="replace") for file in (tmp_path / "team/logs").iterdir())
    assert not [value for value in secrets if len(value) > 20 and value in logs + done.stdout + done.stderr]


def test_services_see_an_environment_below_tmp_and_nothing_else_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if missing := missing_programs():
        pytest.skip(f"install {', '.join(missing)}")
    with TemporaryDirectory(dir="/tmp") as project:
        prefix = Path(project, ".venv")
        prefix.mkdir()
        (prefix / "weed").touch()
        monkeypatch.setattr(sys, "prefix", str(prefix))
        team = Team(tmp_path / "team")
        sandbox = team._sandbox("seaweedfs", team.file["services"]["seaweedfs"])
        command = [*sandbox, "--", "find", "/tmp", "-mindepth", "1"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert sorted(found.split()) == [project, str(prefix), str(prefix / "weed")]
