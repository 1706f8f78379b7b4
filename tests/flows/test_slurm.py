"""infra/slurm/reproduce.sbatch on a Slurm cluster of two machines."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lotlip.config.params import load_params
from lotlip.core.compute import TrainingCompute
from lotlip.core.files import read_json, write_record
from lotlip.pretrain.job import Job
from tests.conftest import TEXT, TinyWorld
from tests.machines import need
from tests.slurm import PROGRAMS, slurm
from tests.tiny_pipeline import ROOT, smallest
from tests.training import losses, scratch, train
from tests.workspace import Workspace

pytestmark = pytest.mark.system


def two_nodes(params: dict[str, Any]) -> None:
    """Changes to params.yaml: a training on two nodes that takes long enough to be interrupted."""
    smallest(params)
    params["pretrain"]["steps"] = 60
    params["pretrain"]["text"]["config"] = TEXT  # without dropout, of which each process draws its own
    training = {"processes": 2, "gradient_accumulation_steps": 4, "launch": {"kind": "slurm", "nodes": 2}}
    params["compute"]["training"] |= {"checkpoint_every": 10, **training}


def alone(folder: Path) -> Job:
    """The training of the project in the current folder, in one process."""
    params = load_params()
    config = params.ablation("lotlip")
    return Job(
        ablation="lotlip",
        config=config,
        compute=TrainingCompute(log_every=4),
        seeds=config.seeds,
        shards=params.paths.shards,
        image_tower=params.paths.image_tower,
        scratch=scratch(folder),
        out=folder / "out",
        tracking_uri="",
        run_ids={},
    )


def test_a_requeued_job_trains_on_two_nodes_to_the_losses_of_one_process(
    tiny_world: TinyWorld, tmp_path: Path, prefect_database: Path, group: None, monkeypatch: pytest.MonkeyPatch
):
    need(PROGRAMS)
    workspace = Workspace(tmp_path / "project")
    workspace.change(two_nodes)
    # what the stages before the training would write
    for source, name in ((tiny_world.shards, "shards"), (tiny_world.image_tower, "image-tower")):
        shutil.copytree(source, workspace.folder / "data" / name)
        write_record(workspace.folder / "data" / name, Path("data") / name)
    (workspace.folder / ".venv").symlink_to(sys.prefix)
    (workspace.folder / ".prefect").mkdir()
    shutil.copy(prefect_database, workspace.folder / ".prefect")
    environment = {key: value for key, value in workspace.alone.items() if key != "PYTHONPATH"}
    with slurm(tmp_path / "slurm") as cluster:
        words = ["--nodes=2", str(ROOT / "infra/slurm/reproduce.sbatch"), "--single-item", "pretrain@lotlip"]
        job = cluster.run("sbatch", "--parsable", *words, environment=environment, folder=workspace.folder).strip()
        log = workspace.folder / f"slurm-{job}.log"
        cluster.wait_for_job(job, log, lambda: log.is_file() and "step 12/60," in log.read_text())
        cluster.run("scontrol", "requeue", job)
        cluster.wait_for_job(job, log)
        nodes = [machine.logs() for machine in cluster.machines]
    # the log keeps what was written before the interruption, and only its owner may read Prefect's password in it
    text = log.read_text()
    assert text.index("step 12/60") < text.index("DUE TO JOB REQUEUE") < text.index("resumes after step ")
    assert log.stat().st_mode & 0o077 == 0
    assert all("launch task StepId=" in told for told in nodes)
    monkeypatch.chdir(workspace.folder)
    trained = [point["loss"] for point in read_json(Path("models/lotlip/seed-0/history.json"))]
    assert len(trained) == 15
    assert trained == pytest.approx(losses(train(alone(tmp_path / "alone"))), abs=1e-5)
