"""Training: settings, and whole runs of a tiny model and its variants."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lotlip.core.compute import TrainingCompute
from lotlip.core.files import read_json
from lotlip.core.section import merge
from lotlip.models.saving import load_model
from lotlip.pretrain.config import OptimizerConfig, PretrainConfig
from lotlip.pretrain.engine import deepspeed_config, initialise_processes, learning_rate_factor, parameter_groups
from lotlip.pretrain.initialisation import build_for_pretraining
from lotlip.pretrain.job import Job
from lotlip.pretrain.trainer import Trainer, resolve_pretrained
from lotlip.tracking.mlflow import NullSink
from tests.conftest import TinySample, write_shards
from tests.training import TINY, finish, history, losses, same, split, start, tiny_job, train, weights

pytestmark = pytest.mark.usefixtures("forked")  # programs start as forks

# --- settings -----------------------------------------------------------------------------------------------------


def test_deepspeed_is_told_what_the_parameters_say():
    config = PretrainConfig(batch_size=48, precision="bf16", optimizer=OptimizerConfig(gradient_clipping=0.5))
    compute = TrainingCompute(processes=3, gradient_accumulation_steps=4, zero_stage=2)
    told = deepspeed_config(config, compute)
    assert told["train_batch_size"] == 48
    assert told["train_micro_batch_size_per_gpu"] == 4
    assert told["gradient_accumulation_steps"] == 4
    assert told["gradient_clipping"] == 0.5
    assert told["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 50_000_000}
    assert told["bf16"] == {"enabled": True}
    plain = deepspeed_config(PretrainConfig(), TrainingCompute())
    assert (plain["bf16"], plain["zero_optimization"]["stage"]) == ({"enabled": False}, 0)
    # stage 0 would lose the exact weights
    assert deepspeed_config(PretrainConfig(precision="bf16"), TrainingCompute())["zero_optimization"]["stage"] == 1


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    settings = OptimizerConfig(warmup_steps=10)
    shares = [learning_rate_factor(step, 110, settings) for step in range(111)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[4] == pytest.approx(0.5)
    assert shares[9] == shares[10] == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0, abs=1e-12)
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_without_warmup_the_learning_rate_starts_at_its_peak():
    settings = OptimizerConfig(warmup_steps=0)
    assert learning_rate_factor(0, 100, settings) == 1
    assert learning_rate_factor(50, 100, settings) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_only_climbs():
    shares = [learning_rate_factor(step, 5, OptimizerConfig(warmup_steps=10)) for step in range(6)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_norms_biases_and_the_temperature_do_not_decay(tiny_tower):
    model = build_for_pretraining(PretrainConfig.model_validate(split(TINY)[0]), tiny_tower)
    model.text.proj.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, PretrainConfig(optimizer=OptimizerConfig(weight_decay=0.2)))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    plain = {names[id(parameter)] for parameter in others["params"]}
    assert plain == {name for name in names.values() if name == "logit_scale" or "bias" in name or "LayerNorm" in name}
    both = {names[id(parameter)] for parameter in decayed["params"]} | plain
    assert both == set(names.values()) - {"text.proj.weight"}  # what is frozen is in neither


def test_a_norm_without_a_name_to_know_it_by_does_not_decay():
    decayed, others = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), PretrainConfig())
    assert (len(decayed["params"]), len(others["params"])) == (1, 3)


# --- whole runs ---------------------------------------------------------------------------------------------------


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
def test_seeds_differ_and_each_repeats_bit_for_bit(base, tiny_world, tmp_path):
    again = train(tiny_job(tiny_world, tmp_path))
    assert same(weights(again), weights(base))
    assert losses(again) == losses(base)
    assert not same(weights(base, seed=1), weights(base))


@pytest.mark.integration
def test_the_tiny_world_is_learned(group, tiny_world, tmp_path):
    optimizer = {"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0}
    job = train(tiny_job(tiny_world, tmp_path, {"steps": 90, "optimizer": optimizer}))
    assert np.mean(losses(job)[:3]) > 0.95 * math.log(8)
    assert np.mean(losses(job)[-6:]) < 0.7 * math.log(8)


# --- runs that stop ------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_train_alike(base, tiny_world, tmp_path, zero_stage):
    job = train(tiny_job(tiny_world, tmp_path, {"zero_stage": zero_stage}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-5)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(job)[name], value, atol=1e-3, rtol=0)
    load_model(job.model_folder(0))


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_trains_alike_and_saves_exact_weights(base, tiny_world, tmp_path, zero_stage):
    job = train(tiny_job(tiny_world, tmp_path, {"precision": "bf16", "zero_stage": zero_stage}))
    assert losses(job) == pytest.approx(losses(base), abs=0.05)
    model, _ = load_model(job.model_folder(0))
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        if name.startswith("text.") and value.ndim == 2:  # the optimizer's copy, not the rounded one
            assert not torch.equal(value, value.bfloat16().float()), name


@pytest.mark.integration
def test_pixels_give_what_stored_features_give(base, tiny_world, tmp_path):
    job = train(tiny_job(tiny_world, tmp_path, shards=str(tiny_world.pixel_shards)))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.integration
def test_features_may_be_computed_where_they_are_stored(base, tiny_world, tmp_path):
    job = train(tiny_job(tiny_world, tmp_path, {"image_tower": {"features": "computed"}}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.integration
def test_pictures_are_augmented_alike_again(base, tiny_world, tmp_path):
    """Other pictures than stored features are of, and the same ones for the same seed."""
    tower = {"features": "computed", "augmentation": {"scale": [0.3, 0.6]}}
    first, second = (train(tiny_job(tiny_world, tmp_path / name, {"image_tower": tower})) for name in "ab")
    assert losses(first) == losses(second)
    assert abs(losses(first)[0] - losses(base)[0]) > 1e-3


@pytest.mark.integration
def test_a_whole_picture_as_augmentation_is_none(base, tiny_world, tmp_path):
    tower = {"features": "computed", "augmentation": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}
    job = train(tiny_job(tiny_world, tmp_path, {"image_tower": tower}))
    assert losses(job) == pytest.approx(losses(base), abs=1e-4)


@pytest.mark.integration
def test_resampled_epochs_train(group, tiny_world, tmp_path):
    """Blue things are drawn nine times as often as the others, and an epoch is as long as was asked."""
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
def test_the_saved_model_tells_where_it_comes_from(base):
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
def test_modules_of_the_objective_train_alike_in_parts_and_stay_out_of_the_model(group, tiny_world, tmp_path, variant):
    differences = merge({"steps": 4}, VARIANTS[variant])
    job = train(tiny_job(tiny_world, tmp_path / "whole", differences))
    parts = merge(differences, {"gradient_accumulation_steps": 2, "zero_stage": 3})
    in_parts = train(tiny_job(tiny_world, tmp_path / "parts", parts))
    assert losses(job) == pytest.approx(losses(in_parts), abs=1e-5)
    assert not [name for name in weights(job) if name.startswith("objective.")]
    own, others = (load_file(run.model_folder(0) / "objective.safetensors") for run in (job, in_parts))
    assert own.keys() == others.keys() and all(name.startswith("objective.") for name in own)
    for name, value in own.items():
        torch.testing.assert_close(others[name], value, atol=1e-4, rtol=0)


@pytest.mark.integration
def test_long_clip_goes_on_from_a_model_of_short_texts(group, tiny_world, tmp_path):
    """Positions stretched, the short caption against principal components (arXiv 2403.15378)."""
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


def test_each_seed_goes_on_from_its_own_model_of_an_ablation(tmp_path):
    config = PretrainConfig.model_validate({"text": {"pretrained": str(tmp_path)}})
    assert resolve_pretrained(config, 3).text.pretrained == str(tmp_path)  # a model's folder
    (tmp_path / "run.json").touch()
    (tmp_path / "seed-3").mkdir()
    assert resolve_pretrained(config, 3).text.pretrained == str(tmp_path / "seed-3")
    with pytest.raises(ValueError, match="has no seed-4 to start from; train it with the same seeds"):
        resolve_pretrained(config, 4)


@pytest.mark.integration
def test_seeds_side_by_side_are_those_one_after_another(group, tiny_world, tmp_path):
    alone = train(tiny_job(tiny_world, tmp_path / "alone"), seeds=[2])
    together = tiny_job(tiny_world, tmp_path / "together", {"seeds": [0, 1, 2], "parallel_seeds": 2})
    finish(start(together, tmp_path / "together"))
    assert losses(together, 2) == pytest.approx(losses(alone, 2), rel=1e-4)
    assert losses(together, 0) != pytest.approx(losses(together, 1), rel=1e-4)


@pytest.mark.integration
def test_a_seed_that_stops_ends_those_beside_it_and_says_why(tiny_world, tiny_samples, tmp_path):
    shards = spoiled(tmp_path / "shards", tiny_samples, 0)
    changes = {"seeds": [0, 1], "parallel_seeds": 2, "steps": 100_000}
    process = start(tiny_job(tiny_world, tmp_path, changes, shards=str(shards)), tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "the broken image features of" in errors


# --- the same, however the work is split ---------------------------------------------------------------------------


def spoiled(folder: Path, samples: list[TinySample], which: int) -> Path:
    """The data set with a feature that is not a number."""
    bad = replace(samples[which], feature=np.full_like(samples[which].feature, np.nan))
    return write_shards(folder, [*samples[:which], bad, *samples[which + 1 :]], 3)


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run(tiny_world, tiny_samples, tmp_path, processes):
    """Every process says the same, also of a sample that another one had."""
    shards = spoiled(tmp_path / "shards", tiny_samples, 20)
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
def test_another_number_of_processes_than_configured_is_an_error(group):
    with pytest.raises(ValueError, match=r"1 processes were started, but compute\.training\.processes is 2"):
        initialise_processes(TrainingCompute(processes=2))


def test_a_job_survives_its_file(tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path)
    job.write(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job
    assert job.model_folder(3) == Path(job.out) / "seed-3"
    assert os.fspath(job.model_folder(3)).startswith(str(tmp_path))
