"""Work pools: locks that workers push, and the declared pools and deployments."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from flows import pool
from flows.runtime.scratch import StageFailed
from tests.tiny_pipeline import ROOT


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker's clone of a bare repository."""
    source, clone_folder = tmp_path / "source", tmp_path / "clone"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", source], check=True)
    git(tmp_path, "clone", "--quiet", str(source), str(clone_folder))
    (clone_folder / "params.yaml").touch()
    git(clone_folder, "add", "--all")
    git(clone_folder, "commit", "--quiet", "--message", "start")
    git(clone_folder, "push", "--quiet", "origin", "HEAD:main")
    monkeypatch.chdir(clone_folder)
    monkeypatch.setattr(pool, "run_dvc", lambda arguments, environment: 0)
    return clone_folder


def test_the_lock_of_a_run_is_pushed_to_a_branch(clone: Path, tmp_path: Path):
    main = git(tmp_path / "source", "rev-parse", "main")
    for content in ("first", "second"):  # the second worker of a run starts from the main branch again
        git(clone, "reset", "--quiet", "--hard", "origin/main")
        (clone / "dvc.lock").write_text(content)
        pool.share("runs/blue-fox")
        assert git(tmp_path / "source", "show", "runs/blue-fox:dvc.lock") == content
    assert git(tmp_path / "source", "rev-parse", "main") == main
    assert git(tmp_path / "source", "rev-list", "--count", "main..runs/blue-fox").strip() == "1"


def test_a_failed_push_is_an_error_with_its_reason(clone: Path, monkeypatch: pytest.MonkeyPatch):
    (clone / "dvc.lock").touch()
    git(clone, "remote", "set-url", "origin", "/nowhere")
    with pytest.raises(StageFailed, match=r"(?s)`git push` failed: .*the outputs are in DVC's remote"):
        pool.share("runs/blue-fox")
    monkeypatch.setattr(pool, "run_dvc", lambda arguments, environment: 1)
    with pytest.raises(StageFailed, match="`dvc push` failed"):
        pool.share("runs/blue-fox")


def test_pools_and_heartbeats_agree_with_the_compose_file():
    from flows.deploy import POOLS, SILENCE

    file = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text(encoding="utf-8"))
    workers = {service["command"][-1] for name, service in file["services"].items() if name.startswith("worker")}
    assert workers == set(POOLS)
    beat = int(file["x-worker-environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert SILENCE.total_seconds() >= 3 * beat
