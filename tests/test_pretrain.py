"""Training: settings, and complete runs of a tiny model and its variants."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from lotlip.core.compute import TrainingCompute
from lotlip.core.files import read_json
from lotlip.core.section import merge
from lotlip.models.saving import load_model
from lotlip.pretrain import trainer
from lotlip.pretrain.config import OptimizerConfig, PretrainConfig
from lotlip.pretrain.engine import deepspeed_config, initialise_processes, learning_rate_factor, parameter_groups
from lotlip.pretrain.initialisation import build_for_pretraining
from lotlip.pretrain.job import Job
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import Trainer, resolve_pretrained
from tests.conftest import TinySample, write_shards
from tests.training import TINY, finish, history, losses, same, split, start, tiny_job, train, weights

pytestmark = pytest.mark.usefixtures("forked")  # programs start as forks

# --- settings -----------------------------------------------------------------------------------------------------


def test_deepspeed_gets_the_configured_settings():
    config = PretrainConfig(batch_size=48, precision="bf16", optimizer=OptimizerConfig(gradient_clipping=0.5))
    compute = TrainingCompute(processes=3, gradient_accumulation_steps=4, zero_stage=2)
    settings = deepspeed_config(config, compute)
    assert settings["train_batch_size"] == 48
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 50_000_000}
    assert settings["bf16"] == {"enabled": True}
    default = deepspeed_config(PretrainConfig(), TrainingCompute())
    assert (default["bf16"], default["zero_optimization"]["stage"]) == ({"enabled": False}, 0)
    # stage 0 would lose the fp32 weights
    assert deepspeed_config(PretrainConfig(precision="bf16"), TrainingCompute())["zero_optimization"]["stage"] == 1


def test_the_learning_rate_warms_up_and_decays_to_zero():
    settings = OptimizerConfig(warmup_steps=10)
    factors = [learning_rate_factor(step, 110, settings) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5)
    assert factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_without_warmup_the_learning_rate_starts_at_its_peak():
    settings = OptimizerConfig(warmup_steps=0)
    assert learning_rate_factor(0, 100, settings) == 1
    assert learning_rate_factor(50, 100, settings) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_never_decays():
    factors = [learning_rate_factor(step, 5, OptimizerConfig(warmup_steps=10)) for step in range(6)]
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_norms_biases_and_the_temperature_have_no_weight_decay(tiny_tower):
    model = build_for_pretraining(PretrainConfig.model_validate(split(TINY)[0]), tiny_tower)
    model.text.proj.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model, PretrainConfig(optimizer=OptimizerConfig(weight_decay=0.2)))
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.2, 0.0)
    plain = {names[id(parameter)] for parameter in undecayed["params"]}
    assert plain == {name for name in names.values() if name == "logit_scale" or "bias" in name or "LayerNorm" in name}
    trained = {names[id(parameter)] for parameter in decayed["params"]} | plain
    assert trained == set(names.values()) - {"text.proj.weight"}  # frozen weights are in neither group


def test_unnamed_norms_have_no_weight_decay():
    decayed, undecayed = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), PretrainConfig())
    assert (len(decayed["params"]), len(undecayed["params"])) == (1, 3)


# --- complete runs ------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_history_has_every_step_and_the_model_loads(base):
    points = history(base)
    assert [point["step"] for point in points] == list(range(1, 13))
    keys = {"step", "loss", "in_batch_recall", "temperature", "learning_rate", "samples_per_second", "data_wait_share"}
    assert all(point.keys() == keys for point in points)
    assert all(math.isfinite(value) for point in points for value in point.values())
    assert points[0]["temperature"] == pytest.approx(0.07, rel=0.01)
    expected = [2e-3 * learning_rate_factor(step, 12, OptimizerConfig(warmup_steps=2)) for step in range(12)]
    assert [point["learning_rate"] for point in points] == pytest.approx(expected)
    assert all(0 <= point["data_wait_share"] <= 1 for point in points)
    model, tokenizer = load_model(base.model_folder(0))
    assert model.config.corner_tokens == tokenizer.corner_tokens == 2
    assert not (Path(base.scratch) / "checkpoints-0").exists()


@pytest.mark.integration
def test_seeds_differ_and_each_is_reproducible(base, tiny_world, tmp_path):
    repeated = train(tiny_job(tiny_world, tmp_path))
    assert same(weights(repeated), weights(base))
    assert losses(repeated) == losses(base)
    assert not same(weights(base, seed=1), weights(base))


@pytest.mark.integration
def test_training_learns_the_tiny_world(group, tiny_world, tmp_path):
    optimizer = {"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0}
    job = train(tiny_job(tiny_world, tmp_path, {"steps": 90, "optimizer": optimizer}))
    assert np.mean(losses(job)[:3]) > 0.95 * math.log(8)
    assert np.mean(losses(job)[-6:]) < 0.7 * math.log(8)


# --- precision, stages and inputs ---------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_give_the_same_model(base, tiny_world, tmp_path, zero_stage):
    job = train(tiny_job(tiny_world, tmp_path, {"zero_stage": zero_stage}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-5)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(job)[name], value, atol=1e-3, rtol=0)
    load_model(job.model_folder(0))


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_trains_like_fp32_and_saves_exact_weights(base, tiny_world, tmp_path, zero_stage):
    job = train(tiny_job(tiny_world, tmp_path, {"precision": "bf16", "zero_stage": zero_stage}))
    assert losses(job) == pytest.approx(losses(base), abs=0.05)
    model, _ = load_model(job.model_folder(0))
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        if name.startswith("text.") and value.ndim == 2:  # the optimizer's fp32 copy
            assert not torch.equal(value, value.bfloat16().float()), name


@pytest.mark.integration
def test_pixels_and_stored_features_give_the_same_losses(base, tiny_world, tmp_path):
    job = train(tiny_job(tiny_world, tmp_path, shards=str(tiny_world.pixel_shards)))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.integration
def test_stored_features_may_be_computed_again(base, tiny_world, tmp_path):
    job = train(tiny_job(tiny_world, tmp_path, {"image_tower": {"features": "computed"}}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.integration
def test_augmentation_is_reproducible_and_changes_the_losses(base, tiny_world, tmp_path):
    """Augmented images differ from those of the stored features, and are equal for equal seeds."""
    tower = {"features": "computed", "augmentation": {"scale": [0.3, 0.6]}}
    first, second = (train(tiny_job(tiny_world, tmp_path / name, {"image_tower": tower})) for name in "ab")
    assert losses(first) == losses(second)
    assert abs(losses(first)[0] - losses(base)[0]) > 1e-3


@pytest.mark.integration
def test_augmentation_with_full_images_changes_nothing(base, tiny_world, tmp_path):
    tower = {"features": "computed", "augmentation": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}
    job = train(tiny_job(tiny_world, tmp_path, {"image_tower": tower}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.integration
def test_training_with_resampled_epochs(group, tiny_world, tmp_path):
    """Blue things are drawn nine times as often as others, and epochs have the configured length."""
    settings = {
        "epochs": "resampled",
        "samples_per_epoch": 400,
        "weights": {"blue-": 9.0},
    }
    job = tiny_job(tiny_world, tmp_path, {"loader": settings})
    trainer = Trainer(job, 0, NullSink())
    assert trainer.loader.steps_per_epoch == 50
    keys = [key for (batch,) in trainer.loader.steps(0, 50) for key in batch.keys]
    assert np.mean([key.startswith("blue-") for key in keys]) == pytest.approx(9 / 14, abs=0.1)
    trainer.train()
    assert len(losses(job)) == 12


@pytest.mark.integration
def test_the_saved_model_records_its_provenance(base):
    config = read_json(base.model_folder(0) / "config.json")
    about = config["provenance"]
    assert about["ablation"] == "tiny" and about["seed"] == 0
    assert about["pretraining"] == base.config.model_dump(mode="json")
    assert about["data"]["samples"] == {"train": 48}
    card = (base.model_folder(0) / "README.md").read_text()
    assert "# tiny, seed 0" in card
    assert "| steps | 12 |" in card


VARIANTS = {
    "registers": {"text": {"corner_tokens": 0, "register_tokens": 2}},
    "siglip": {"loss": {"objective": "siglip"}, "text": {"corner_tokens": 0}},
    "filip": {"similarity": "late-interaction", "text": {"corner_tokens": 0}},
    "clip": {"image_tower": {"frozen": False}, "text": {"corner_tokens": 0}, "long_texts": {"sub_captions": 0}},
    "principal components": {"loss": {"image_components": 3}, "text": {"corner_tokens": 0}},
    "smartclip": {"loss": {"masks": {}}, "text": {"corner_tokens": 0}, "long_texts": {"sampler": "first"}},
    "flair": {
        "loss": {"objective": "siglip", "conditioned": {"heads": 4}, "short_loss_fraction": 0},
        "text": {"corner_tokens": 0},
        "long_texts": {"per_image": 3},
    },
    "debias": {
        "text": {"corner_tokens": 0},
        "short_texts": {"sampler": "without-first", "random_offset": True},
        "long_texts": {"sampler": "all"},
        "loss": {"short_loss_fraction": 0.1, "image_components": 3},
    },
    "himo": {
        "text": {"corner_tokens": 0},
        "long_texts": {"sampler": "all"},
        "loss": {"short_loss_fraction": 0, "text_components": 0.9, "label_smoothing": 0.1},
    },
    "margin": {"loss": {"hard_negative_margin": 0.5}},
}


@pytest.mark.integration
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_loads(group, tiny_world, tmp_path, variant):
    optimizer = {"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0}
    differences = merge({"steps": 40, "optimizer": optimizer}, VARIANTS[variant])
    job = train(tiny_job(tiny_world, tmp_path, differences))
    assert np.mean(losses(job)[-6:]) < 0.93 * np.mean(losses(job)[:3]), losses(job)
    model, tokenizer = load_model(job.model_folder(0))
    assert model.config.similarity == job.config.similarity
    assert tokenizer.register_tokens == job.config.text.register_tokens
    trained = not torch.equal(
        weights(job)["image.trunk.cls_token"],
        load_file(Path(job.image_tower) / "model.safetensors")["trunk.cls_token"],
    )
    assert trained is (variant == "clip")


@pytest.mark.integration
@pytest.mark.parametrize("variant", ["smartclip", "flair"])
def test_modules_of_the_objective_are_saved_apart_and_accumulate_gradients(group, tiny_world, tmp_path, variant):
    differences = merge({"steps": 4}, VARIANTS[variant])
    job = train(tiny_job(tiny_world, tmp_path / "full", differences))
    changes = merge(differences, {"gradient_accumulation_steps": 2, "zero_stage": 3})
    split_job = train(tiny_job(tiny_world, tmp_path / "parts", changes))
    assert losses(job) == pytest.approx(losses(split_job), abs=1e-5)
    assert not [name for name in weights(job) if name.startswith("objective.")]
    expected, accumulated = (load_file(run.model_folder(0) / "objective.safetensors") for run in (job, split_job))
    assert expected.keys() == accumulated.keys() and all(name.startswith("objective.") for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(accumulated[name], value, atol=1e-4, rtol=0)


@pytest.mark.integration
def test_long_clip_finetunes_a_model_of_short_texts(group, tiny_world, tmp_path):
    """It interpolates positions and compares short captions with image components (arXiv 2403.15378)."""
    short = {"text": {"corner_tokens": 0, "context_length": 8, "config": {"max_position_embeddings": 8}}}
    first = train(tiny_job(tiny_world, tmp_path / "short", merge(short, {"long_texts": {"sub_captions": 0}})))
    text = {
        "pretrained": str(first.model_folder(0)),
        "position_interpolation": {"positions": 8, "keep": 4, "factor": 4},
    }
    longer = {"text": {**text, "config": {}, "corner_tokens": 0, "context_length": 20}, "loss": {"image_components": 3}}
    bare = {key: value for key, value in split(TINY)[0].items() if key != "text"}
    config = PretrainConfig.model_validate({**bare, **longer}).model_dump(mode="json")
    job = train(tiny_job(tiny_world, tmp_path / "long", config=config))
    model, _ = load_model(job.model_folder(0))
    assert model.text.positions == 20
    assert len(losses(job)) == 12
    assert all(map(math.isfinite, losses(job)))


def test_each_seed_finetunes_the_model_of_the_same_seed(tmp_path):
    config = PretrainConfig.model_validate({"text": {"pretrained": str(tmp_path)}})
    assert resolve_pretrained(config, 3).text.pretrained == str(tmp_path)  # the folder of a model
    (tmp_path / "run.json").touch()
    (tmp_path / "seed-3").mkdir()
    assert resolve_pretrained(config, 3).text.pretrained == str(tmp_path / "seed-3")
    with pytest.raises(ValueError, match="has no seed-4 to start from; train it with the same seeds"):
        resolve_pretrained(config, 4)


@pytest.mark.system
def test_parallel_seeds_equal_sequential_ones(group, tiny_world, tmp_path):
    alone = train(tiny_job(tiny_world, tmp_path / "alone"), seeds=[2])
    together = tiny_job(tiny_world, tmp_path / "together", {"seeds": [0, 1, 2], "parallel_seeds": 2})
    finish(start(together, tmp_path / "together"))
    assert losses(together, 2) == pytest.approx(losses(alone, 2), rel=1e-4)
    assert losses(together, 0) != pytest.approx(losses(together, 1), rel=1e-4)


@pytest.mark.system
def test_a_failing_seed_stops_parallel_ones(tiny_world, tiny_samples, tmp_path):
    shards = shards_with_nan(tmp_path / "shards", tiny_samples, 0)
    changes = {"seeds": [0, 1], "parallel_seeds": 2, "steps": 100_000}
    process = start(tiny_job(tiny_world, tmp_path, changes, shards=str(shards)), tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "the broken image features of" in errors


# --- runs that fail -----------------------------------------------------------------------------------------------


def shards_with_nan(folder: Path, samples: list[TinySample], which: int) -> Path:
    """The data set with one feature of NaN."""
    bad = replace(samples[which], feature=np.full_like(samples[which].feature, np.nan))
    return write_shards(folder, [*samples[:which], bad, *samples[which + 1 :]], 3)


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, 2])
def test_a_non_finite_loss_stops_the_run(tiny_world, tiny_samples, tmp_path, processes):
    """All processes report the same sample, whichever process had it."""
    shards = shards_with_nan(tmp_path / "shards", tiny_samples, 20)
    job = tiny_job(tiny_world, tmp_path, {"processes": processes}, shards=str(shards))
    process = start(job, tmp_path, processes)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    (message,) = {line for line in errors.splitlines() if line.startswith("error: ")}
    assert message.startswith("error: tiny, seed 0: the loss is nan at step ")
    assert tiny_samples[20].key in message
    assert not Path(job.out).exists()
    steps_before = int(message.split("at step ")[1].split()[0]) - 1
    assert "no checkpoint was written" in message and steps_before < 6  # the first epoch has six batches


@pytest.mark.integration
def test_fewer_samples_than_a_batch_is_an_error(group, tiny_world, tiny_samples, tmp_path):
    shards = write_shards(tmp_path / "shards", tiny_samples[:5], 1)
    with pytest.raises(ValueError, match=r"has 5 training samples, fewer than a batch of 8; set pretrain\.batch"):
        train(tiny_job(tiny_world, tmp_path, shards=str(shards)))


@pytest.mark.integration
def test_a_wrong_number_of_processes_is_an_error(group):
    with pytest.raises(ValueError, match=r"1 processes were started, but compute\.training\.processes is 2"):
        initialise_processes(TrainingCompute(processes=2))


def test_a_job_is_read_as_written(tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path)
    job.write(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job
    assert job.model_folder(3) == Path(job.out) / "seed-3"
    assert os.fspath(job.model_folder(3)).startswith(str(tmp_path))


@pytest.mark.integration
def test_every_group_of_processes_has_the_peer_timeout(group, tiny_world, tmp_path):
    """DeepSpeed's too: else a peer that hangs in the backward pass is waited for 30 minutes."""
    Trainer(tiny_job(tiny_world, tmp_path, {"peer_timeout_seconds": 77}), 0, NullSink())
    groups = list(dist.distributed_c10d._world.pg_map)
    timeouts = {one._get_backend(torch.device("cpu")).options._timeout for one in groups}
    assert len(groups) > 1 and timeouts == {timedelta(seconds=77)}


def test_all_processes_train_the_seeds_that_the_first_finds_unfinished(tiny_world, tmp_path, monkeypatch):
    """On a shared file system, this process may not see yet that seed 0 is finished."""
    job, trained = tiny_job(tiny_world, tmp_path, {"seeds": [0, 1, 2]}), []
    monkeypatch.setattr(trainer, "initialise_processes", lambda compute: None)
    monkeypatch.setattr(trainer, "broadcast", lambda seeds: [seed for seed in seeds if seed != 0])
    monkeypatch.setattr(trainer.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(trainer.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(trainer, "Trainer", lambda job, seed, sink: SimpleNamespace(train=lambda: trained.append(seed)))
    job.model_folder(2).mkdir(parents=True)
    trainer.main(job, lambda uri, run: NullSink())
    assert trained == [1]
