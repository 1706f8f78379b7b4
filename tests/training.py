"""Training runs of the tiny world, in this process, in another one, or in two."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from flows.runtime.processes import launch
from lotlip.core.compute import LocalLaunch, TrainingCompute
from lotlip.core.files import SCRATCH, read_json
from lotlip.core.section import merge
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.job import Job
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import Trainer
from tests.conftest import TEXT, TinyWorld

ROOT = Path(__file__).parent.parent
TINY: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint_every": 1000,
    "loader_workers": 0,
    "text": {"config": TEXT, "context_length": 32},
    "long_texts": {"sub_captions": 2},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2},
}
DROPOUT = {"text": {"config": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}}}


def scratch(folder: Path) -> Path:
    """The checkpoint folder of a job, inside a project's scratch, where other processes may remove it."""
    return folder / SCRATCH / "work"


def split(differences: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits settings into those of `pretrain` and of `compute.training`."""
    how = {key: value for key, value in differences.items() if key in TrainingCompute.model_fields}
    return {key: value for key, value in differences.items() if key not in how}, how


def tiny_job(world: TinyWorld, folder: Path, differences: dict[str, Any] | None = None, **more: Any) -> Job:
    recipe, how = split(merge(TINY, differences or {}))
    config = PretrainConfig.model_validate(recipe)
    fields = {
        "ablation": "tiny",
        "config": config,
        "compute": TrainingCompute.model_validate(how),
        "seeds": config.seeds,
        "shards": str(world.shards),
        "image_tower": str(world.image_tower),
        "scratch": str(scratch(folder)),
        "out": str(folder / "out"),
        "tracking_uri": "",
        "run_ids": {},
    }
    return Job(**{**fields, **more})


def start(job: Job, folder: Path, processes: int = 1) -> subprocess.Popen[str]:
    """Starts training like the flow."""
    file = folder / "job.json"
    job.write(file)
    command = launch("lotlip.train", [str(file)], processes, LocalLaunch())
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run to succeed, and returns its output."""
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out


def history(job: Job, seed: int = 0) -> list[dict[str, float]]:
    return read_json(job.model_folder(seed) / "history.json")


def losses(job: Job, seed: int = 0) -> list[float]:
    return [point["loss"] for point in history(job, seed)]


def weights(job: Job, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(job.model_folder(seed) / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def near(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(value, second[name], atol=tolerance, rtol=0) for name, value in first.items()
    )


def train(job: Job, seeds: Sequence[int] = (0,)) -> Job:
    """Trains in this process."""
    for seed in seeds:
        Trainer(job, seed, NullSink()).train()
    return job


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Waits for a line with the words."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without a line with {words!r}: {process.communicate()[1]}")


def trainers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes: the started one, or the children of the launcher."""
    started = psutil.Process(process.pid)
    return [child for child in started.children() if "lotlip.train" in child.cmdline()] or [started]
