"""Damaged checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lotlip.core.files import SCRATCH, sha256_files, write_json
from lotlip.pretrain import checkpoint
from lotlip.pretrain.checkpoint import Checkpoints, full_weights
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import Trainer
from tests.training import finish, losses, start, tiny_job, train, trainers, wait_for

pytestmark = pytest.mark.usefixtures("forked")  # programs start as forks

FILES = ["weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "state.json", "sha256.json"]
OLDER, NEWER = "step-000000001", "step-000000002"


def flip_bit(path: Path, place: float, bit: int = 0) -> None:
    """Flips one bit of a file; `place` is a fraction of its length."""
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first bit flipped": lambda path: flip_bit(path, 0),
    "bit in the middle flipped": lambda path: flip_bit(path, 0.5, 3),
    "last byte flipped": lambda path: flip_bit(path, 1, 6),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\n\n"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def trainer(group, tiny_world, tmp_path_factory) -> Trainer:
    """A trainer that has written checkpoints after steps 1 and 2."""
    job = tiny_job(tiny_world, tmp_path_factory.mktemp("trainer"))
    new_trainer = Trainer(job, 0, NullSink())
    steps = new_trainer.loader.steps(0, 2)
    for step in (0, 1):
        new_trainer.engine.step(next(steps), step)
        new_trainer._checkpoint(step + 1)
    return new_trainer


@pytest.fixture
def copy(trainer: Trainer, tmp_path: Path) -> Checkpoints:
    folder = tmp_path / SCRATCH / "checkpoints"
    shutil.copytree(trainer.checkpoints.folder, folder)
    return Checkpoints(folder)


def load(checkpoints: Checkpoints, trainer: Trainer) -> tuple[Any, dict[str, torch.Tensor]]:
    state = checkpoints.load(trainer.engine.deepspeed)
    return state, full_weights(trainer.engine.deepspeed)


@pytest.mark.integration
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(trainer, copy, capsys, name):
    shutil.move(copy.folder / NEWER, copy.folder.parent / NEWER)
    _, expected = load(copy, trainer)
    shutil.move(copy.folder.parent / NEWER, copy.folder / NEWER)
    DAMAGES["bit in the middle flipped"](copy.folder / NEWER / name)
    state, weights = load(copy, trainer)
    assert state["step"] == 1
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    out = capsys.readouterr().out
    assert "warning" in out
    assert str(copy.folder / NEWER) in out


@pytest.mark.integration
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_damage_to_every_file_is_found(copy, name, how):
    if name == "sha256.json" and how.startswith("one byte"):
        pytest.skip("the end of the line of a JSON file says nothing")
    DAMAGES[how](copy.folder / NEWER / name)
    assert checkpoint.damage(copy.folder / NEWER)
    assert checkpoint.damage(copy.folder / OLDER) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(tmp_path, name):
    for file in checkpoint.FILES:
        (tmp_path / file).write_bytes(f"what is in {file}".encode())
    write_json(tmp_path / "sha256.json", {file: sha256_files([tmp_path / file]) for file in checkpoint.FILES})
    assert checkpoint.damage(tmp_path) is None
    data = (tmp_path / name).read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            (tmp_path / name).write_bytes(changed)
            assert checkpoint.damage(tmp_path), (place, bit)


@pytest.mark.integration
def test_training_starts_over_if_no_checkpoint_is_intact(trainer, copy, capsys):
    for name in (OLDER, NEWER):
        flip_bit(copy.folder / name / "weights.safetensors", 0.5)
    assert copy.load(trainer.engine.deepspeed) is None
    out = capsys.readouterr().out
    assert all(str(copy.folder / name) in out for name in (OLDER, NEWER))


@pytest.mark.integration
def test_a_damaged_checkpoint_does_not_replace_an_intact_one(trainer, copy):
    flip_bit(copy.folder / NEWER / "exp_avg.safetensors", 0.5)
    copy.load(trainer.engine.deepspeed)
    copy.save(trainer.engine.deepspeed, 3, {"history": [], "watch": []})
    assert sorted(path.name for path in copy.folder.iterdir()) == [OLDER, "step-000000003"]


@pytest.mark.integration
def test_a_checkpoint_of_another_model_is_an_error(trainer, tiny_world, tmp_path):
    other = tiny_job(tiny_world, tmp_path, {"text": {"config": {"hidden_size": 16}}})
    other_trainer = Trainer(other, 0, NullSink())
    with pytest.raises(ValueError, match=NEWER):
        trainer.checkpoints.load(other_trainer.engine.deepspeed)


@pytest.mark.integration
def test_two_processes_skip_the_same_damaged_checkpoint(base, tiny_world, tmp_path):
    differences = {"checkpoint_every": 3, "processes": 2, "steps": 12}
    job = tiny_job(tiny_world, tmp_path, differences)
    process = start(job, tmp_path, processes=2)
    wait_for(process, "step 8/12")
    trainers(process)[0].kill()
    process.communicate()
    flip_bit(Path(job.scratch) / "checkpoints-0" / "step-000000006" / "weights.safetensors", 0.5)
    out = finish(start(job, tmp_path, processes=2))
    assert out.count("step-000000006") == 1
    assert "after step 3" in out
    assert losses(job) == pytest.approx(losses(base), abs=1e-5)


@pytest.mark.integration
def test_a_checkpoint_that_one_process_cannot_read_is_skipped_by_all(monkeypatch):
    """The checkpoint is damaged only for the other process."""
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 2)

    def gather(views: list[str | None], view: str | None) -> None:
        views[:] = [view, "weights.safetensors does not match its hash"]

    monkeypatch.setattr(checkpoint.dist, "all_gather_object", gather)
    assert checkpoint._first_problem(None) == "weights.safetensors does not match its hash"


@pytest.mark.integration
def test_a_run_with_a_damaged_checkpoint_resumes_exactly(base, tiny_world, tmp_path, monkeypatch):
    from tests.test_resume import train_interrupted

    job = tiny_job(tiny_world, tmp_path, {"checkpoint_every": 2})
    train_interrupted(job, 9, monkeypatch)
    flip_bit(Path(job.scratch) / "checkpoints-0" / "step-000000008" / "weights.safetensors", 0.7)
    train(job)
    assert losses(job) == losses(base)
    assert math.isfinite(losses(job)[-1])
