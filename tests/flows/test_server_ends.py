"""Stages whose Prefect server is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.runtime.servers import free_port, prefect_client
from tests.workspace import PREFECT, ROOT

pytestmark = pytest.mark.system

STAGE = """
from pathlib import Path

import psutil
from prefect import flow, get_run_logger, task

from flows.runtime.stage import main


@task
def unit(number: int) -> int:
    return number


@flow
def here(item: str) -> None:
    get_run_logger().info("begins")
    command = ["-m", "flows.runtime.applications", "prefect"]
    (server,) = [child for child in psutil.Process().children() if child.cmdline()[1:4] == command]
    server.kill()
    server.wait()
    assert [unit.submit(number).result() for number in range(3)] == [0, 1, 2]
    Path("published").touch()


main(here, "lotlip")
"""


def environment(home: Path) -> dict[str, str]:
    mine = {key: value for key, value in os.environ.items() if key not in PREFECT}
    return {**mine, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home), "PREFECT_CLIENT_MAX_RETRIES": "0"}


def run(folder: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "stage.py").write_text(script)
    return subprocess.run(
        [sys.executable, "stage.py"],
        cwd=folder,
        env={**environment(folder / ".prefect"), **more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stage_continues_and_succeeds_when_its_server_is_killed(tmp_path: Path, prefect_database: Path):
    (tmp_path / ".prefect").mkdir()
    shutil.copy(prefect_database, tmp_path / ".prefect")
    done = run(tmp_path, STAGE)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert (tmp_path / "published").exists()
    assert "Traceback" not in output
    assert "Error logging to API" not in output
    (warning,) = [line for line in output.splitlines() if line.startswith("warning in here lotlip")]
    assert "Prefect's server at http://127.0.0.1:" in warning


def test_a_stage_that_finds_its_server_dead_fails_in_one_line(tmp_path: Path):
    port = free_port()
    done = run(tmp_path, STAGE, **prefect_client(port, "a:b"))
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error in here lotlip")]
    assert f"http://127.0.0.1:{port}" in error
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "published").exists()
