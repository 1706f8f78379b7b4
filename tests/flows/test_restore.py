"""A fresh clone with DVC's outputs, and no MLflow store: all that training left is there again, without training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lotlip.core.files import sha256_files
from tests.workspace import Workspace, tiny

pytestmark = pytest.mark.integration


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def contents(folder: Path) -> dict[str, Any]:
    """Run's name → all that a store tells of it, but for ids, times and who ran it."""
    from mlflow import MlflowClient

    client = MlflowClient(store(folder))
    experiment = client.get_experiment_by_name("lotlip")
    assert experiment is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.run_name not in found
        figures = client.list_artifacts(run.info.run_id, "figures/scenes")
        (output,) = run.outputs.model_outputs
        made = client.get_logged_model(output.model_id)
        kept = Path(made.artifact_location.removeprefix("file://"))
        found[run.info.run_name] = {
            "status": run.info.status,
            "tags": {key: value for key, value in run.data.tags.items() if key not in ("mlflow.user",)},
            "params": run.data.params,
            "metrics": run.data.metrics,
            "loss": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train.loss")],
            "figures": {Path(file.path).name: file.file_size for file in figures},
            "model": (made.name, made.status, sha256_files([kept / "data" / "model.safetensors"])),
        }
    return found


@pytest.fixture(scope="module")
def pulled(make_workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """A workspace in which everything ran, and a fresh clone of it after `dvc pull`."""
    workspace = make_workspace()
    workspace.change(tiny)
    workspace.run("dvc", "repro", "--quiet")
    remote, published, clone = (tmp_path_factory.mktemp("restore") / name for name in ("remote", "published", "clone"))
    workspace.run("dvc", "remote", "add", "--local", "--default", "here", str(remote))  # --local: it leaves no commit
    workspace.run("dvc", "push", "--quiet")
    subprocess.run(["git", "clone", "--quiet", workspace.folder, published], check=True)
    for name in ("params.yaml", "dvc.lock"):
        (published / name).write_bytes((workspace.folder / name).read_bytes())
    git = ["git", "-C", str(published), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "add", "params.yaml", "dvc.lock"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "ran"], check=True)
    subprocess.run(["git", "clone", "--quiet", published, clone], check=True)
    run(workspace, clone, "-m", "dvc", "remote", "add", "--local", "--default", "here", str(remote))
    run(workspace, clone, "-m", "dvc", "pull", "--quiet")
    return workspace, clone


def run(workspace: Workspace, clone: Path, *arguments: str) -> str:
    """Runs Python in the clone, with the workspace's Prefect server and no fork server."""
    environment = {key: value for key, value in workspace.environment.items() if key != "LOTLIP_FORK_SERVER"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=clone,
        env={**environment, "PYTHONPATH": os.fspath(clone)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_store_is_rebuilt_without_training(pulled):
    workspace, clone = pulled
    assert not (clone / "mlflow.db").exists()
    said = run(workspace, clone, "-m", "flows.restore")
    assert "lit: 1 seeds, scores on scenes" in said
    assert "MLflow has 2 ablations" in said
    expected, found = contents(workspace.folder), contents(clone)
    assert set(found) == set(expected) == {"lit-seed0", "lotlip-seed0"}
    for name, told in expected.items():
        for what, value in told.items():
            assert found[name][what] == value, (name, what)
    assert not (clone / ".lotlip" / "work").exists()  # where stages work
    run(workspace, clone, "-m", "flows.restore")
    assert contents(clone) == found


def test_the_report_comes_with_the_outputs_and_can_be_made_again(pulled):
    workspace, clone = pulled
    assert "didn't change" in run(workspace, clone, "-m", "dvc", "repro", "--dry", "report")
    assert "Running stage" not in run(workspace, clone, "-m", "dvc", "repro", "--dry")
    before = {file.relative_to(clone): file.read_bytes() for file in (clone / "report").rglob("*") if file.is_file()}
    assert len(before) > 5
    run(workspace, clone, "-m", "flows.stages.report")
    after = {file.relative_to(clone): file.read_bytes() for file in (clone / "report").rglob("*") if file.is_file()}
    assert after == before


def test_dvc_shows_what_is_worth_comparing(pulled):
    workspace, clone = pulled
    shown = run(workspace, clone, "-m", "dvc", "metrics", "show", "--md")
    assert "scenes.long.text_to_image.r1" in shown
    assert "protocol" not in shown
    assert "metrics/summary/lotlip.json" in shown.replace("\\", "/")
    run(workspace, clone, "-m", "dvc", "plots", "show", "--out", "drawn")
    page = (clone / "drawn" / "index.html").read_text()
    for what in ("Loss", "R@1 and accuracy", '"ablation": "lotlip"', "in_batch_recall"):
        assert what in page
    assert "<DVC_METRIC" not in page


def test_without_outputs_the_error_says_how_to_get_them(pulled, tmp_path):
    workspace, clone = pulled
    environment = {**workspace.alone, "PYTHONPATH": os.fspath(clone)}
    (tmp_path / "params.yaml").write_bytes((clone / "params.yaml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "flows.restore"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "models has no trained ablations; run `dvc pull`" in done.stderr
    assert "Traceback" not in done.stderr
