"""Training: settings, and whole runs of a tiny model in this process, in one of its own and in two together."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lotlip.config import Optimizer, Pretrain, merge
from lotlip.data.loader import Batch
from lotlip.files import read_json
from lotlip.models.initialisation import build_for_pretraining
from lotlip.models.saving import load_model
from lotlip.tracking import NullSink
from lotlip.training.engine import (
    Engine,
    StepResult,
    deepspeed_config,
    initialise_processes,
    learning_rate_share,
    parameter_groups,
)
from lotlip.training.pretrain import ChanceWatch, Job, Trainer, TrainingStopped
from tests.conftest import TEXT, TinySample, TinyWorld, write_shards

ROOT = Path(__file__).parent.parent
TINY: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint_every": 1000,
    "loader": {"workers": 0},
    "text": {"config": TEXT, "context_length": 32},
    "long_texts": {"sub_captions": 2},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2},
}
DROPOUT = {"text": {"config": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}}}


# --- settings -----------------------------------------------------------------------------------------------------


def test_deepspeed_is_told_what_the_parameters_say():
    config = Pretrain(
        batch_size=48,
        processes=3,
        accumulation=4,
        zero_stage=2,
        precision="bf16",
        optimizer=Optimizer(gradient_clipping=0.5),
    )
    told = deepspeed_config(config)
    assert told["train_batch_size"] == 48
    assert told["train_micro_batch_size_per_gpu"] == 4
    assert told["gradient_accumulation_steps"] == 4
    assert told["gradient_clipping"] == 0.5
    assert told["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 50_000_000}
    assert told["bf16"] == {"enabled": True}
    plain = deepspeed_config(Pretrain())
    assert (plain["bf16"], plain["zero_optimization"]["stage"]) == ({"enabled": False}, 0)
    # stage 0 would lose the exact weights
    assert deepspeed_config(Pretrain(precision="bf16"))["zero_optimization"]["stage"] == 1


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    settings = Optimizer(warmup_steps=10)
    shares = [learning_rate_share(step, 110, settings) for step in range(111)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[4] == pytest.approx(0.5)
    assert shares[9] == shares[10] == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0, abs=1e-12)
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_without_warmup_the_learning_rate_starts_at_its_peak():
    settings = Optimizer(warmup_steps=0)
    assert learning_rate_share(0, 100, settings) == 1
    assert learning_rate_share(50, 100, settings) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_only_climbs():
    shares = [learning_rate_share(step, 5, Optimizer(warmup_steps=10)) for step in range(6)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_norms_biases_and_the_temperature_do_not_decay(tiny_tower):
    model = build_for_pretraining(Pretrain.model_validate(TINY), tiny_tower)
    model.text.proj.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.2)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    plain = {names[id(parameter)] for parameter in others["params"]}
    assert plain == {name for name in names.values() if name == "logit_scale" or "bias" in name or "LayerNorm" in name}
    both = {names[id(parameter)] for parameter in decayed["params"]} | plain
    assert both == set(names.values()) - {"text.proj.weight"}  # what is frozen is in neither


def test_a_norm_without_a_name_to_know_it_by_does_not_decay():
    decayed, others = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1)
    assert (len(decayed["params"]), len(others["params"])) == (1, 3)


# --- whole runs ---------------------------------------------------------------------------------------------------


def tiny_job(world: TinyWorld, folder: Path, differences: dict[str, Any] | None = None, **more: Any) -> Job:
    given = {
        "ablation": "tiny",
        "config": Pretrain.model_validate(merge(TINY, differences or {})).model_dump(mode="json"),
        "shards": str(world.shards),
        "image_tower": str(world.image_tower),
        "scratch": str(folder / "scratch"),
        "out": str(folder / "out"),
        "tracking_uri": "",
        "run_ids": {},
    }
    return Job(**{**given, **more})


def start(job: Job, folder: Path, processes: int = 1) -> subprocess.Popen[str]:
    """Training as the flow starts it."""
    file = folder / "job.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vars(job)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "lotlip.training.pretrain", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> str:
    """What a run that must succeed wrote."""
    out, errors = process.communicate(timeout=300)
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


def same_to(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(value, second[name], atol=tolerance, rtol=0) for name, value in first.items()
    )


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as a group of its own, as DeepSpeed wants it; it joins once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what training sets is unset at the end
            patch.delenv(name)
        patch.setenv("PATH", os.environ["PATH"])
        initialise_processes(Pretrain())
        yield
        torch.distributed.destroy_process_group()


def train(job: Job, seeds: Sequence[int] = (0,)) -> Job:
    """Trains in this process."""
    for seed in seeds:
        Trainer(job, Pretrain.model_validate(job.config), seed, NullSink()).train()
    return job


@pytest.fixture(scope="module")
def base(group: None, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A plain run of 12 steps and two seeds, which others are compared with."""
    return train(tiny_job(tiny_world, tmp_path_factory.mktemp("base")), seeds=(0, 1))


@pytest.mark.slow
def test_history_has_every_step_and_the_model_loads(base):
    points = history(base)
    assert [point["step"] for point in points] == list(range(1, 13))
    keys = {"step", "loss", "recall_in_batch", "temperature", "learning_rate", "samples_per_second", "data_wait_share"}
    assert all(point.keys() == keys for point in points)
    assert all(math.isfinite(value) for point in points for value in point.values())
    assert points[0]["temperature"] == pytest.approx(0.07, rel=0.01)
    expected = [2e-3 * learning_rate_share(step, 12, Optimizer(warmup_steps=2)) for step in range(12)]
    assert [point["learning_rate"] for point in points] == pytest.approx(expected)
    assert all(0 <= point["data_wait_share"] <= 1 for point in points)
    model, tokenizer = load_model(base.model_folder(0))
    assert model.config.corner_tokens == tokenizer.corner_tokens == 2
    assert not (Path(base.scratch) / "checkpoints-0").exists()


@pytest.mark.slow
def test_seeds_differ_and_each_repeats_bit_for_bit(base, tiny_world, tmp_path):
    again = train(tiny_job(tiny_world, tmp_path))
    assert same(weights(again), weights(base))
    assert losses(again) == losses(base)
    assert not same(weights(base, seed=1), weights(base))


@pytest.mark.slow
def test_the_tiny_world_is_learned(group, tiny_world, tmp_path):
    optimizer = {"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0}
    job = train(tiny_job(tiny_world, tmp_path, {"steps": 90, "optimizer": optimizer}))
    assert np.mean(losses(job)[:3]) > 0.95 * math.log(8)
    assert np.mean(losses(job)[-6:]) < 0.7 * math.log(8)


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Until a line of the process has the words."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without a line with {words!r}: {process.communicate()[1]}")


def trainers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes: what was started, or the launcher's children."""
    started = psutil.Process(process.pid)
    return [child for child in started.children() if "lotlip.training.pretrain" in child.cmdline()] or [started]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "zero_stage", "accumulation", "precision"), [(1, 0, 2, "fp32"), (2, 1, 1, "bf16"), (2, 2, 1, "fp32")]
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    tiny_world, tmp_path, processes, zero_stage, accumulation, precision
):
    """With dropout, in the middle of an epoch, the last process killed: the same weights, bit for bit."""
    differences = merge(DROPOUT, {"steps": 40, "checkpoint_every": 4, "processes": processes, "loader": {"workers": 1}})
    differences |= {"zero_stage": zero_stage, "accumulation": accumulation, "precision": precision}
    job, whole = (tiny_job(tiny_world, tmp_path / name, differences) for name in ("killed", "whole"))
    finish(start(whole, tmp_path / "whole", processes))
    process = start(job, tmp_path / "killed", processes)
    wait_for(process, "step 10/40")
    trainers(process)[-1].kill()
    process.communicate()
    assert process.returncode != 0
    assert not Path(job.out).exists()
    assert 1 <= len(list((Path(job.scratch) / "checkpoints-0").glob("step-*[0-9]"))) <= 3  # two, and one too old

    out = finish(start(job, tmp_path / "killed", processes))
    assert "goes on after step" in out and "step 1/40" not in out
    assert losses(job) == losses(whole)
    assert same(weights(job), weights(whole))
    assert not (Path(job.scratch) / "checkpoints-0").exists()


def interrupted(job: Job, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process and stops in the middle of a step."""
    with monkeypatch.context() as patch:
        step = Engine.step

        def interrupt(self: Engine, batches: list[Batch], number: int) -> StepResult:
            if number == after:
                raise KeyboardInterrupt
            return step(self, batches, number)

        patch.setattr(Engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(job)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_process_goes_on_where_two_were(base, tiny_world, tmp_path, zero_stage):
    differences = {"checkpoint_every": 3, "processes": 2, "zero_stage": zero_stage, "steps": 12}
    two = tiny_job(tiny_world, tmp_path, differences)
    process = start(two, tmp_path, processes=2)
    wait_for(process, "step 8/12")
    trainers(process)[0].kill()
    process.communicate()
    one = train(tiny_job(tiny_world, tmp_path, {"checkpoint_every": 3}))
    assert losses(one) == pytest.approx(losses(base), abs=1e-5)
    assert same_to(weights(one), weights(base), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_two_processes_go_on_where_one_was(base, tiny_world, tmp_path, monkeypatch, zero_stage):
    interrupted(tiny_job(tiny_world, tmp_path, {"checkpoint_every": 3}), 7, monkeypatch)
    differences = {"checkpoint_every": 3, "processes": 2, "zero_stage": zero_stage}
    two = tiny_job(tiny_world, tmp_path, differences)
    assert "goes on after step 6" in finish(start(two, tmp_path, processes=2))
    assert losses(two) == pytest.approx(losses(base), abs=1e-5)
    assert same_to(weights(two), weights(base), 1e-3)


@pytest.mark.slow
def test_a_checkpoint_is_whole_or_not_there(base, tiny_world, tmp_path, monkeypatch, capfd):
    job = tiny_job(tiny_world, tmp_path, {"checkpoint_every": 2})
    interrupted(job, 9, monkeypatch)
    folder = Path(job.scratch) / "checkpoints-0"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000008"]
    half = folder / "step-000000010.partial"  # as a machine leaves it that dies while it writes
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    train(job)
    assert "goes on after step 8" in capfd.readouterr().out
    assert losses(job) == losses(base)
    assert same(weights(job), weights(base))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(group, tiny_world, tmp_path, monkeypatch):
    job = tiny_job(tiny_world, tmp_path, {"checkpoint_every": 2})
    interrupted(job, 5, monkeypatch)
    newest = Path(job.scratch) / "checkpoints-0" / "step-000000004"
    data = (newest / "exp_avg.safetensors").read_bytes()
    (newest / "exp_avg.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"checkpoint \S+step-000000004 cannot be gone on from: .*; remove it, and"):
        train(job)
    shutil.rmtree(newest)
    train(job)
    assert len(losses(job)) == 12


@pytest.mark.slow
def test_weights_that_are_no_numbers_do_not_become_a_checkpoint(group, tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path)
    trainer = Trainer(job, Pretrain.model_validate(job.config), 0, NullSink())
    trainer.engine.step(next(trainer.loader.steps(0, 1)), 0)
    trainer._checkpoint(1)
    with torch.no_grad():
        trainer.engine.model.text.proj.weight[0, 0] = math.inf
    message = (
        r"1 weights are no numbers after step 2, such as text.proj.weight; the last good checkpoint is \S+step-0+1;"
    )
    with pytest.raises(TrainingStopped, match=message):
        trainer._checkpoint(2)
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["step-000000001"]


# --- runs that stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recalls", "stuck_at"),
    [
        ([0.1] * 20, 10),  # chance is 1/8
        ([0.9] * 5 + [0.1] * 15, 10),  # only the later half counts
        ([0.1] * 5 + [0.9] * 15, None),
        ([0.9] * 10 + [0.1] * 10, 20),  # a model that collapses
        ([0.1] * 9, None),
        ([0.5] * 20, None),
    ],
)
def test_a_run_at_chance_is_seen(recalls, stuck_at):
    watch = ChanceWatch(10, batch_size=8)
    found = [step for step, recall in enumerate(recalls, start=1) if watch.stuck(step, recall)]
    assert (found[0] if found else None) == stuck_at
    assert not any(ChanceWatch(0, 8).stuck(step, recall) for step, recall in enumerate(recalls, start=1))


def test_what_is_no_more_than_luck_counts_as_chance():
    for recall, stuck in ((0.02, True), (0.08, False)):  # of 32 × 10 guesses, 5 are right, give or take 11 at most
        watch = ChanceWatch(20, batch_size=64)
        assert [watch.stuck(step, recall) for step in range(1, 21)][-1] is stuck


def test_a_watch_goes_on_where_it_was():
    recalls = [0.1] * 5 + [0.1, 0.9, 0.9, 0.1, 0.9]
    watch = ChanceWatch(10, batch_size=8)
    for step, recall in enumerate(recalls[:7], start=1):
        watch.stuck(step, recall)
    resumed = ChanceWatch(10, batch_size=8)
    resumed.load_state(json.loads(json.dumps(watch.state())))
    for step, recall in enumerate(recalls[7:], start=8):
        assert watch.stuck(step, recall) == resumed.stuck(step, recall)
    assert watch.recall == resumed.recall == pytest.approx(0.58)


@pytest.mark.slow
def test_a_run_that_stays_at_chance_stops(group, tiny_world, tmp_path):
    differences = {"stop_at_chance_after": 8, "optimizer": {"learning_rate": 1e-9}}
    with pytest.raises(
        TrainingStopped, match=r"after 8 steps a text finds its image among the batch's 8 no more often"
    ):
        train(tiny_job(tiny_world, tmp_path, differences))


@pytest.mark.slow
def test_a_hung_peer_ends_the_run(tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path, {"processes": 2, "steps": 1000, "peer_timeout_seconds": 4})
    process = start(job, tmp_path, processes=2)
    wait_for(process, "step 10/1000")
    hung = trainers(process)[1]
    hung.suspend()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "process 0 of 2 lost another one, which ended or did not answer for 4 s (pretrain.peer_timeout" in errors
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_processes_train_as_one(base, tiny_world, tmp_path, zero_stage):
    job = tiny_job(tiny_world, tmp_path, {"processes": 2, "zero_stage": zero_stage})
    finish(start(job, tmp_path, processes=2))
    assert losses(job) == pytest.approx(losses(base), abs=1e-5)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(job)[name], value, atol=1e-3, rtol=0)
    load_model(job.model_folder(0))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_train_alike(base, tiny_world, tmp_path, zero_stage):
    job = train(tiny_job(tiny_world, tmp_path, {"zero_stage": zero_stage}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-5)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(job)[name], value, atol=1e-3, rtol=0)
    load_model(job.model_folder(0))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_trains_alike_and_saves_exact_weights(base, tiny_world, tmp_path, zero_stage):
    job = train(tiny_job(tiny_world, tmp_path, {"precision": "bf16", "zero_stage": zero_stage}))
    assert losses(job) == pytest.approx(losses(base), abs=0.05)
    model, _ = load_model(job.model_folder(0))
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        if name.startswith("text.") and value.ndim == 2:  # the optimizer's copy, not the rounded one
            assert not torch.equal(value, value.bfloat16().float()), name


@pytest.mark.slow
def test_pixels_give_what_stored_features_give(base, tiny_world, tmp_path):
    job = train(tiny_job(tiny_world, tmp_path, shards=str(tiny_world.pixel_shards)))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.slow
def test_features_may_be_computed_where_they_are_stored(base, tiny_world, tmp_path):
    job = train(tiny_job(tiny_world, tmp_path, {"image_tower": {"features": "computed"}}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.slow
def test_the_saved_model_tells_where_it_comes_from(base):
    config = read_json(base.model_folder(0) / "config.json")
    about = config["provenance"]
    assert about["ablation"] == "tiny" and about["seed"] == 0
    assert about["pretraining"] == base.config
    assert about["data"]["samples"] == {"train": 48}
    card = (base.model_folder(0) / "README.md").read_text()
    assert "# tiny, seed 0" in card
    assert "| steps | 12 |" in card


VARIANTS = {
    "registers": {"text": {"corner_tokens": 0, "register_tokens": 2}},
    "siglip": {"loss": {"contrast": "sigmoid"}, "text": {"corner_tokens": 0}},
    "filip": {"similarity": "late-interaction", "text": {"corner_tokens": 0}},
    "clip": {"image_tower": {"frozen": False}, "text": {"corner_tokens": 0}, "long_texts": {"sub_captions": 0}},
    "principal components": {"loss": {"raw_components": 3}, "text": {"corner_tokens": 0}},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_loads(group, tiny_world, tmp_path, variant):
    optimizer = {"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0}
    differences = merge({"steps": 40, "optimizer": optimizer}, VARIANTS[variant])
    job = train(tiny_job(tiny_world, tmp_path, differences))
    assert np.mean(losses(job)[-6:]) < 0.93 * np.mean(losses(job)[:3]), losses(job)
    model, tokenizer = load_model(job.model_folder(0))
    assert model.config.similarity == job.config["similarity"]
    assert tokenizer.register_tokens == job.config["text"]["register_tokens"]
    trained = not torch.equal(
        weights(job)["image.trunk.cls_token"],
        load_file(Path(job.image_tower) / "model.safetensors")["trunk.cls_token"],
    )
    assert trained is (variant == "clip")


@pytest.mark.slow
def test_long_clip_goes_on_from_a_model_of_short_texts(group, tiny_world, tmp_path):
    """Positions stretched, the raw caption against principal components (arXiv 2403.15378)."""
    short = {"text": {"corner_tokens": 0, "context_length": 8, "config": {"max_position_embeddings": 8}}}
    first = train(tiny_job(tiny_world, tmp_path / "short", merge(short, {"long_texts": {"sub_captions": 0}})))
    text = {"pretrained": str(first.model_folder(0)), "stretch": {"positions": 8, "keep": 4, "factor": 4}}
    longer = {"text": {**text, "config": {}, "corner_tokens": 0, "context_length": 20}, "loss": {"raw_components": 3}}
    bare = {key: value for key, value in TINY.items() if key != "text"}
    config = Pretrain.model_validate({**bare, **longer}).model_dump(mode="json")
    job = train(tiny_job(tiny_world, tmp_path / "long", config=config))
    model, _ = load_model(job.model_folder(0))
    assert model.text.positions == 20
    assert len(losses(job)) == 12
    assert all(map(math.isfinite, losses(job)))


@pytest.mark.slow
def test_an_image_tower_trains_alike_in_two_processes(group, tiny_world, tmp_path):
    """Both towers' gradients cross the processes; how each variant's loss does is tested with the losses."""
    differences = merge({"steps": 3}, VARIANTS["clip"])
    one = train(tiny_job(tiny_world, tmp_path / "one", differences))
    two = tiny_job(tiny_world, tmp_path / "two", merge(differences, {"processes": 2}))
    finish(start(two, tmp_path / "two", processes=2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


# --- the same, however the work is split ---------------------------------------------------------------------------

SPLITS = [
    {"zero_stage": stage, "accumulation": accumulation, "similarity": similarity}
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
    for similarity in ("cosine", "late-interaction")
]


def one_step(world: TinyWorld, folder: Path, processes: int) -> None:
    """Writes what the first step of each of `SPLITS` had: its loss and, as the optimizer's first moment, gradients."""
    for number, split in enumerate(SPLITS):
        late = {"text": {"corner_tokens": 0}} if split["similarity"] == "late-interaction" else {}
        job = tiny_job(world, folder / f"{number}", merge({"processes": processes, **split}, late))
        trainer = Trainer(job, Pretrain.model_validate(job.config), 0, NullSink())
        result = trainer.engine.step(next(trainer.loader.steps(0, 1)), 0)
        trainer.checkpoints.save(trainer.engine.deepspeed, 1, {"loss": result.loss, "recall": result.recall})


def first_step(folder: Path, number: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    written = folder / f"{number}" / "scratch" / "checkpoints-0" / "step-000000001"
    moments = load_file(written / "exp_avg.safetensors")
    beta = Optimizer().betas[0]
    return read_json(written / "state.json"), {name: value / (1 - beta) for name, value in moments.items()}


@pytest.fixture(scope="module")
def one_process_steps(group: None, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    one_step(tiny_world, folder, 1)
    return folder


@pytest.fixture(scope="module")
def two_process_steps(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    arguments = [str(tiny_world.image_tower), str(tiny_world.shards), str(tiny_world.pixel_shards), str(folder)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *launcher, "-m", "tests.test_pretrain", *arguments], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SPLITS)), ids=[" ".join(map(str, split.values())) for split in SPLITS])
@pytest.mark.parametrize("processes", [1, 2])
def test_loss_and_gradients_do_not_depend_on_how_the_work_is_split(
    one_process_steps, two_process_steps, number, processes
):
    """Against one process, one micro-batch, no ZeRO."""
    plain = SPLITS.index({**SPLITS[number], "zero_stage": 0, "accumulation": 1})
    expected, expected_gradients = first_step(one_process_steps, plain)
    found, gradients = first_step(one_process_steps if processes == 1 else two_process_steps, number)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert found["recall"] == expected["recall"]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any(gradient.abs().max() > 1e-2 for gradient in expected_gradients.values())


def spoiled(folder: Path, samples: list[TinySample], which: int) -> Path:
    """The data set with a feature that is not a number."""
    bad = replace(samples[which], feature=np.full_like(samples[which].feature, np.nan))
    return write_shards(folder, [*samples[:which], bad, *samples[which + 1 :]], 3)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(base, tiny_world, tiny_samples, tmp_path):
    shards = spoiled(tmp_path / "shards", tiny_samples, 20)
    job = tiny_job(tiny_world, tmp_path, shards=str(shards))
    process = start(job, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: tiny, seed 0: the loss is nan at step ")
    assert tiny_samples[20].key in message
    assert not Path(job.out).exists()
    steps_before = int(message.split("at step ")[1].split()[0]) - 1
    assert "no checkpoint was written" in message and steps_before < 6  # the first epoch has six batches


@pytest.mark.slow
def test_fewer_samples_than_a_batch_is_an_error(group, tiny_world, tiny_samples, tmp_path):
    shards = write_shards(tmp_path / "shards", tiny_samples[:5], 1)
    with pytest.raises(ValueError, match=r"has 5 training samples, fewer than a batch of 8; set pretrain\.batch"):
        train(tiny_job(tiny_world, tmp_path, shards=str(shards)))


@pytest.mark.slow
def test_another_number_of_processes_than_configured_is_an_error(group):
    with pytest.raises(ValueError, match=r"1 processes were started, but pretrain\.processes is 2"):
        initialise_processes(Pretrain(processes=2))


def test_a_job_survives_its_file(tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path)
    (tmp_path / "job.json").write_text(json.dumps(vars(job)))
    assert Job.read(tmp_path / "job.json") == job
    assert job.model_folder(3) == Path(job.out) / "seed-3"
    assert os.fspath(job.model_folder(3)).startswith(str(tmp_path))


if __name__ == "__main__":  # as `two_process_steps` starts it
    tower, shards, pixels, out = map(Path, sys.argv[1:])
    initialise_processes(Pretrain(processes=2))
    one_step(TinyWorld(tower, shards, pixels, {}), out, 2)
    torch.distributed.destroy_process_group()
