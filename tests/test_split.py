"""Loss and gradients do not depend on processes, micro-batches and ZeRO stages."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lotlip.core.compute import TrainingCompute
from lotlip.core.files import read_json
from lotlip.core.section import merge
from lotlip.models.saving import load_model
from lotlip.pretrain.config import OptimizerConfig
from lotlip.pretrain.engine import initialise_processes
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import Trainer
from tests.conftest import TinyWorld
from tests.training import ROOT, finish, losses, scratch, start, tiny_job, train, weights

pytestmark = pytest.mark.usefixtures("forked")  # programs start as forks

PLAIN = {"text": {"corner_tokens": 0}}
LONG_ONLY = {**PLAIN, "long_texts": {"sampler": "all"}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "infonce": {},
    "late interaction": {**PLAIN, "similarity": "late-interaction"},
    "label smoothing": {"loss": {"label_smoothing": 0.1}},
    "image components": {**PLAIN, "loss": {"image_components": 3, "short_loss_fraction": 0.1}},
    "text components": {**LONG_ONLY, "loss": {"text_components": 0.9, "short_loss_fraction": 0}},
    "margin": {"loss": {"hard_negative_margin": 0.5}},
    "masks": {**PLAIN, "long_texts": {"sampler": "first"}, "loss": {"masks": {}, "short_loss_fraction": 0}},
    "sigmoid": {**PLAIN, "loss": {"objective": "siglip"}, "long_texts": {"sub_captions": 0}},
    "sigmoid, several positives": {"loss": {"objective": "siglip"}, "long_texts": {"per_image": 2}},
    "conditioned": {
        **PLAIN,
        "loss": {"objective": "siglip", "conditioned": {"heads": 4}, "short_loss_fraction": 0},
        "long_texts": {"sampler": "merged", "per_image": 3},
    },
}
# objective, ZeRO stage and accumulation steps; ZeRO knows nothing of the objective
SPLITS = [
    *itertools.product(("infonce", "late interaction"), (0, 1, 2, 3), (1, 2)),
    *itertools.product([*OBJECTIVES][2:], (0,), (1, 2)),
]


def one_step(world: TinyWorld, folder: Path, processes: int) -> None:
    """Writes the loss and the gradients, as first moments of the optimizer, of the first step of each of `SPLITS`."""
    for number, (objective, stage, accumulation) in enumerate(SPLITS):
        how = {"processes": processes, "zero_stage": stage, "gradient_accumulation_steps": accumulation}
        job = tiny_job(world, folder / f"{number}", {**OBJECTIVES[objective], **how})
        trainer = Trainer(job, 0, NullSink())
        result = trainer.engine.step(next(trainer.loader.steps(0, 1)), 0)
        trainer.checkpoints.save(trainer.engine.deepspeed, 1, {"loss": result.loss, "recall": result.recall})


def first_step(folder: Path, number: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    checkpoint = scratch(folder / f"{number}") / "checkpoints-0" / "step-000000001"
    moments = load_file(checkpoint / "exp_avg.safetensors")
    beta = OptimizerConfig().betas[0]
    return read_json(checkpoint / "state.json"), {name: value / (1 - beta) for name, value in moments.items()}


@pytest.fixture(scope="module")
def one_process_steps(group: None, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    one_step(tiny_world, folder, 1)
    return folder


@pytest.fixture(scope="module")
def two_process_steps(forked: None, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    arguments = [str(tiny_world.image_tower), str(tiny_world.shards), str(tiny_world.pixel_shards), str(folder)]
    launcher = ["-m", "flows.runtime.local_launch", "2"]
    subprocess.run([sys.executable, *launcher, "tests.test_split", *arguments], cwd=ROOT, check=True)
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("number", range(len(SPLITS)), ids=[" ".join(map(str, split)) for split in SPLITS])
@pytest.mark.parametrize("processes", [1, 2])
def test_loss_and_gradients_do_not_depend_on_the_split(one_process_steps, two_process_steps, number, processes):
    """The reference has one process, one micro-batch and no ZeRO."""
    plain = SPLITS.index((SPLITS[number][0], 0, 1))
    expected, expected_gradients = first_step(one_process_steps, plain)
    metrics, gradients = first_step(one_process_steps if processes == 1 else two_process_steps, number)
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert metrics["recall"] == expected["recall"]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any(gradient.abs().max() > 1e-2 for gradient in expected_gradients.values())


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [3])
def test_two_processes_train_like_one(base, tiny_world, tmp_path, zero_stage):
    job = tiny_job(tiny_world, tmp_path, {"processes": 2, "zero_stage": zero_stage})
    finish(start(job, tmp_path, processes=2))
    assert losses(job) == pytest.approx(losses(base), abs=1e-5)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(job)[name], value, atol=1e-3, rtol=0)
    load_model(job.model_folder(0))


@pytest.mark.integration
def test_an_image_tower_trains_equally_in_two_processes(group, tiny_world, tmp_path):
    """Gradients of both towers are averaged over processes. test_losses covers the loss of each variant."""
    clip = {"image_tower": {"frozen": False}, "text": {"corner_tokens": 0}, "long_texts": {"sub_captions": 0}}
    differences = {"steps": 3, **clip}
    one = train(tiny_job(tiny_world, tmp_path / "one", differences))
    two = tiny_job(tiny_world, tmp_path / "two", merge(differences, {"processes": 2}))
    finish(start(two, tmp_path / "two", processes=2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


if __name__ == "__main__":  # as `two_process_steps` starts it
    tower, shards, pixels, out = map(Path, sys.argv[1:])
    initialise_processes(TrainingCompute(processes=2))
    one_step(TinyWorld(tower, shards, pixels, {}), out, 2)
    assert "torch._inductor.compile_fx" not in sys.modules  # takes 2 s to import
    torch.distributed.destroy_process_group()
