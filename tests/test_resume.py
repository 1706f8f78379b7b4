"""Runs that are killed, resumed by others, stopped, or hang."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.runtime.fork_server import SOCKET
from flows.runtime.local_launch import STORE
from lotlip.core.section import merge
from lotlip.pretrain.engine import Engine, StepResult
from lotlip.pretrain.job import Job
from lotlip.pretrain.loader import Batch
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import ChanceWatch, Trainer, TrainingStopped
from tests.processes import have_ended
from tests.training import (
    DROPOUT,
    ROOT,
    finish,
    losses,
    near,
    same,
    start,
    tiny_job,
    train,
    trainers,
    wait_for,
    weights,
)

pytestmark = pytest.mark.usefixtures("forked")  # programs start as forks


@pytest.mark.integration
@pytest.mark.parametrize(
    ("processes", "zero_stage", "gradient_accumulation_steps", "precision"),
    [pytest.param(1, 0, 2, "fp32", marks=pytest.mark.system), (2, 1, 1, "bf16")],
)
def test_a_killed_run_resumes_exactly(
    tiny_world, tmp_path, processes, zero_stage, gradient_accumulation_steps, precision
):
    """Killing the last process within an epoch, with dropout, gives identical weights after resuming."""
    differences = merge(DROPOUT, {"steps": 40, "checkpoint_every": 4, "processes": processes, "loader_workers": 1})
    differences |= {
        "zero_stage": zero_stage,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "precision": precision,
    }
    job, uninterrupted = (tiny_job(tiny_world, tmp_path / name, differences) for name in ("killed", "uninterrupted"))
    finish(start(uninterrupted, tmp_path / "uninterrupted", processes))
    process = start(job, tmp_path / "killed", processes)
    wait_for(process, "step 10/40")
    trainers(process)[-1].kill()
    process.communicate()
    assert process.returncode != 0
    assert not Path(job.out).exists()
    assert (
        1 <= len(list((Path(job.scratch) / "checkpoints-0").glob("step-*[0-9]"))) <= 3
    )  # two, and one that is not removed yet

    out = finish(start(job, tmp_path / "killed", processes))
    assert "resumes after step" in out and "step 1/40" not in out
    assert losses(job) == losses(uninterrupted)
    assert same(weights(job), weights(uninterrupted))
    assert not (Path(job.scratch) / "checkpoints-0").exists()


def train_interrupted(job: Job, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process, and stops within a step."""
    with monkeypatch.context() as patch:
        step = Engine.step

        def interrupt(self: Engine, batches: list[Batch], number: int) -> StepResult:
            if number == after:
                raise KeyboardInterrupt
            return step(self, batches, number)

        patch.setattr(Engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(job)


@pytest.mark.system
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_one_process_resumes_a_run_of_two(base, tiny_world, tmp_path, zero_stage):
    differences = {"checkpoint_every": 3, "processes": 2, "zero_stage": zero_stage, "steps": 12}
    two = tiny_job(tiny_world, tmp_path, differences)
    process = start(two, tmp_path, processes=2)
    wait_for(process, "step 8/12")
    trainers(process)[0].kill()
    process.communicate()
    one = train(tiny_job(tiny_world, tmp_path, {"checkpoint_every": 3}))
    assert losses(one) == pytest.approx(losses(base), abs=1e-5)
    assert near(weights(one), weights(base), 1e-3)


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.system), 3])
def test_two_processes_resume_a_run_of_one(base, tiny_world, tmp_path, monkeypatch, zero_stage):
    train_interrupted(tiny_job(tiny_world, tmp_path, {"checkpoint_every": 3}), 7, monkeypatch)
    differences = {"checkpoint_every": 3, "processes": 2, "zero_stage": zero_stage}
    two = tiny_job(tiny_world, tmp_path, differences)
    assert "resumes after step 6" in finish(start(two, tmp_path, processes=2))
    assert losses(two) == pytest.approx(losses(base), abs=1e-5)
    assert near(weights(two), weights(base), 1e-3)


@pytest.mark.integration
def test_checkpoints_are_written_atomically(base, tiny_world, tmp_path, monkeypatch, capfd):
    job = tiny_job(tiny_world, tmp_path, {"checkpoint_every": 2})
    train_interrupted(job, 9, monkeypatch)
    folder = Path(job.scratch) / "checkpoints-0"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000008"]
    partial = folder / "step-000000010.partial"  # left by a machine that died while writing
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    train(job)
    assert "resumes after step 8" in capfd.readouterr().out
    assert losses(job) == losses(base)
    assert same(weights(job), weights(base))


@pytest.mark.integration
def test_non_finite_weights_are_not_checkpointed(group, tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path)
    trainer = Trainer(job, 0, NullSink())
    trainer.engine.step(next(trainer.loader.steps(0, 1)), 0)
    trainer._checkpoint(1)
    with torch.no_grad():
        trainer.engine.model.text.proj.weight[0, 0] = math.inf
    message = (
        r"1 weights are not finite after step 2, such as text.proj.weight; the last good checkpoint is \S+step-0+1;"
    )
    with pytest.raises(TrainingStopped, match=message):
        trainer._checkpoint(2)
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["step-000000001"]


def run_two_processes(job: Job, folder: Path, module: str) -> list[str]:
    """Last line of standard error of two training processes without a launcher, which would end both."""
    job.write(folder / "job.json")
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", STORE: str(folder / "store")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "flows.runtime.run", module, str(folder / "job.json")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=900)[1].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.integration
@pytest.mark.parametrize("differences", [{"checkpoint_every": 2}, {"steps": 2}], ids=["checkpoint", "end"])
def test_non_finite_weights_end_every_process_with_the_same_error(tiny_world, tmp_path, differences):
    job = tiny_job(tiny_world, tmp_path, {"processes": 2, "peer_timeout_seconds": 3600, **differences})
    first, second = run_two_processes(job, tmp_path, "tests.infinite_weight")
    assert first == second
    assert first.startswith("error: tiny, seed 0: 1 weights are not finite after step 2, such as text.proj.weight;")
    assert not Path(job.out).exists()


@pytest.mark.integration
def test_a_failed_write_of_the_model_ends_every_process_with_the_same_error(tiny_world, tmp_path):
    (tmp_path / "out").write_text("a file where the folder of models should be")
    job = tiny_job(tiny_world, tmp_path, {"processes": 2, "peer_timeout_seconds": 3600, "steps": 2})
    first, second = run_two_processes(job, tmp_path, "lotlip.train")
    assert first == second
    assert first.startswith("error: [Errno ") and str(job.out) in first


@pytest.mark.parametrize(
    ("recalls", "stuck_at"),
    [
        ([0.1] * 20, 10),  # chance is 1/8
        ([0.9] * 5 + [0.1] * 15, 10),  # only the second half counts
        ([0.1] * 5 + [0.9] * 15, None),
        ([0.9] * 10 + [0.1] * 10, 20),  # the model collapses
        ([0.1] * 9, None),
        ([0.5] * 20, None),
    ],
)
def test_the_watch_detects_recall_at_chance(recalls, stuck_at):
    watch = ChanceWatch(10, batch_size=8)
    stuck_steps = [step for step, recall in enumerate(recalls, start=1) if watch.stuck(step, recall)]
    assert (stuck_steps[0] if stuck_steps else None) == stuck_at
    assert not any(ChanceWatch(0, 8).stuck(step, recall) for step, recall in enumerate(recalls, start=1))


def test_the_watch_allows_for_random_variation():
    for recall, expected in ((0.02, True), (0.08, False)):  # 32 × 10 guesses: chance is 5 ± 11 hits
        watch = ChanceWatch(20, batch_size=64)
        assert [watch.stuck(step, recall) for step in range(1, 21)][-1] is expected


def test_a_watch_resumes_from_its_state():
    recalls = [0.1] * 5 + [0.1, 0.9, 0.9, 0.1, 0.9]
    watch = ChanceWatch(10, batch_size=8)
    for step, recall in enumerate(recalls[:7], start=1):
        watch.stuck(step, recall)
    resumed = ChanceWatch(10, batch_size=8)
    resumed.load_state(json.loads(json.dumps(watch.state())))
    for step, recall in enumerate(recalls[7:], start=8):
        assert watch.stuck(step, recall) == resumed.stuck(step, recall)
    assert watch.recall == resumed.recall == pytest.approx(0.58)


@pytest.mark.integration
def test_a_run_that_stays_at_chance_stops(group, tiny_world, tmp_path):
    differences = {"stop_at_chance_after": 8, "optimizer": {"learning_rate": 1e-9}}
    with pytest.raises(
        TrainingStopped, match=r"after 8 steps a text finds its image among the batch's 8 no more often"
    ):
        train(tiny_job(tiny_world, tmp_path, differences))


@pytest.mark.system
def test_a_hung_peer_ends_the_run(tiny_world, tmp_path, monkeypatch):
    monkeypatch.delenv(SOCKET)  # otherwise the test would suspend the client of a fork
    job = tiny_job(tiny_world, tmp_path, {"processes": 2, "steps": 1000, "peer_timeout_seconds": 20})
    process = start(job, tmp_path, processes=2)
    wait_for(process, "step 10/1000")
    hung = trainers(process)[1]
    hung.suspend()
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert (
        "process 0 of 2 lost another one, which ended or did not answer for 20 s (compute.training.peer_timeout"
        in errors
    )
    assert have_ended([hung])
