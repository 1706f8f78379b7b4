"""ALIGN: an image tower from scratch, LAMB with linear decay, and a temperature that starts at 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from lotlip.config.params import checked_params
from lotlip.core.section import ConfigError, merge
from lotlip.exporting.plain import logit_scale
from lotlip.image_tower.config import TimmTowerConfig
from lotlip.image_tower.timm import timm_tower
from lotlip.models.saving import load_model
from lotlip.pretrain.config import OptimizerConfig, PretrainConfig
from lotlip.pretrain.engine import build_optimizer, learning_rate_factor
from lotlip.pretrain.initialisation import build_for_pretraining
from lotlip.pretrain.model import LotlipForPreTraining
from tests.conftest import IMAGE_SIZE, TEXT
from tests.test_config import MINIMAL
from tests.test_resume import train_interrupted
from tests.training import losses, same, tiny_job, train, weights

SCRATCH = {"frozen": False, "from_scratch": True}


def build(tower: Path, seed: int = 0, **settings: Any) -> LotlipForPreTraining:
    torch.manual_seed(seed)
    return build_for_pretraining(PretrainConfig(text={"config": TEXT, "context_length": 32}, **settings), tower)


# --- the image tower from scratch -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tower_from_scratch_has_new_weights_that_depend_on_the_seed(tiny_tower):
    models = [build(tiny_tower, seed, image_tower=SCRATCH) for seed in (0, 0, 1)]
    stage = load_file(tiny_tower / "model.safetensors")
    first, repeated, other = (
        {k: v for k, v in model.state_dict().items() if k.startswith("image.")} for model in models
    )
    assert {name.removeprefix("image."): value.shape for name, value in first.items()} == {
        name: value.shape for name, value in stage.items()
    }
    matrices = [name for name, value in first.items() if value.ndim > 1]
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert not any(torch.equal(first[name], stage[name.removeprefix("image.")]) for name in matrices)
    assert all(parameter.requires_grad for parameter in models[0].image_tower.parameters())


def test_batch_norms_of_a_new_tower_are_calibrated_and_frozen(tiny_tower):
    tower = build(tiny_tower, image_tower=SCRATCH).train().image_tower
    outputs: list[torch.Tensor] = []
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    before = [norm.running_var.clone() for norm in norms]  # type: ignore[union-attr]
    tower(torch.randn(32, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert all(value.std().item() == pytest.approx(1, abs=0.15) for value in outputs)
    assert all(torch.equal(norm.running_var, old) for norm, old in zip(norms, before, strict=True))
    assert all(norm.momentum == 0.1 for norm in norms)


def test_a_frozen_tower_from_scratch_is_an_error():
    with pytest.raises(ValidationError, match="from_scratch starts from random weights"):
        PretrainConfig(image_tower={"from_scratch": True})


def test_timm_towers_without_pretrained_weights_download_nothing(monkeypatch):
    monkeypatch.setattr("lotlip.image_tower.timm._from_hub", lambda *_: pytest.fail("asked the hub"))
    config = TimmTowerConfig(kind="timm", model="test_nfnet", pretrained=False, pooling="model", image_size=64)
    one, other = timm_tower(config).state_dict(), timm_tower(config).state_dict()
    assert same(one, other)
    assert timm_tower(config)(torch.randn(2, 3, 64, 64)).shape[0] == 2


@pytest.mark.parametrize("name", ["checkpoint", "revision"])
def test_weights_for_a_tower_without_pretrained_weights_are_an_error(name):
    value = {"checkpoint": "w.safetensors", "revision": "a" * 40}[name]
    with pytest.raises(ValidationError, match="pretrained is false, so checkpoint and revision have no effect"):
        TimmTowerConfig(kind="timm", model="test_vit", pretrained=False, **{name: value})


def test_an_ablation_with_random_frozen_features_is_an_error():
    tower = {"kind": "timm", "model": "test_vit", "pretrained": False}
    with pytest.raises(ConfigError, match=r"ablation lotlip uses the weights of image_tower, which are random"):
        checked_params({**MINIMAL, "image_tower": tower}, "params.yaml")
    params = checked_params(merge(MINIMAL, {"image_tower": tower, "pretrain": {"image_tower": SCRATCH}}), "params.yaml")
    assert params.warnings == []  # nothing is downloaded, so nothing has to be pinned


# --- temperature ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_temperature_starts_from_its_setting(tiny_tower):
    assert build(tiny_tower, temperature={"initial": 1.0}).scale.item() == pytest.approx(1)
    assert build(tiny_tower).scale.item() == pytest.approx(1 / 0.07)
    siglip = build(tiny_tower, temperature={"initial": 0.5}, loss={"objective": "siglip"})
    assert siglip.scale.item() == pytest.approx(2)


@pytest.mark.parametrize(("smallest", "largest"), [(0.01, 100), (0.05, 20), (None, math.exp(6))])
def test_the_clamp_of_the_temperature_is_configured_and_saved(tiny_tower, tmp_path, smallest, largest):
    model = build(tiny_tower, temperature={"min": smallest}, image_tower={"frozen": False})
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert model.scale.item() == pytest.approx(largest)
    assert logit_scale(model).exp().item() == pytest.approx(largest)
    assert type(model.config).from_dict(model.config.to_dict()).min_temperature == smallest


def test_a_temperature_below_the_minimum_is_an_error():
    with pytest.raises(ValidationError, match=r"initial 0.005 is below min 0.01"):
        PretrainConfig(temperature={"initial": 0.005})


# --- optimizer --------------------------------------------------------------------------------------------------------


def test_linear_decay_ends_at_zero():
    settings = OptimizerConfig(warmup_steps=10, decay="linear")
    shares = [learning_rate_factor(step, 110, settings) for step in range(111)]
    assert shares[9] == shares[10] == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0)


def test_lamb_scales_updates_by_the_norm_of_decayed_weights():
    large, small, bias = (nn.Parameter(torch.full((4, 4), size)) for size in (8.0, 2.0, 2.0))
    groups = [
        {"params": [large, small], "lr": 0.1, "weight_decay": 1e-5},
        {"params": [bias], "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = build_optimizer(groups, OptimizerConfig(name="lamb"))
    for weight in (large, small, bias):
        weight.grad = torch.full((4, 4), 100.0)
    optimizer.step()
    steps = [size - weight.mean().item() for size, weight in ((8.0, large), (2.0, small), (2.0, bias))]
    assert steps == pytest.approx([0.8, 0.2, 0.1], rel=1e-3)
    before = bias.mean().item()
    large.grad, small.grad, bias.grad = None, None, torch.ones(4, 4)
    optimizer.step()
    assert before - bias.mean().item() < 0.08  # it would be 0.1 if LAMB clipped gradients itself


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrain": {"precision": "bf16"}}, "lamb needs the norm of each weight, which bf16"),
        ({"compute": {"training": {"zero_stage": 2}}}, "lamb needs the norm of each weight, which ZeRO splits"),
    ],
)
def test_lamb_does_not_support_partitioned_weights(settings, message):
    lamb = merge(MINIMAL, {"pretrain": {"optimizer": {"name": "lamb"}}})
    checked_params(lamb, "params.yaml")
    with pytest.raises(ConfigError, match=message):
        checked_params(merge(lamb, settings), "params.yaml")


@pytest.mark.integration
def test_align_learns_resumes_exactly_and_loads(group, tiny_world, tmp_path, monkeypatch):
    differences: dict[str, Any] = {
        "text": {"corner_tokens": 0},
        "long_texts": {"sub_captions": 0},
        "image_tower": SCRATCH,
        "loss": {"label_smoothing": 0.1},
        "temperature": {"initial": 1.0},
        "optimizer": {"name": "lamb", "decay": "linear", "learning_rate": 2e-2, "weight_decay": 1e-5},
        "checkpoint_every": 3,
    }
    uninterrupted, job = (
        tiny_job(tiny_world, tmp_path / name, differences, shards=str(tiny_world.pixel_shards)) for name in "ab"
    )
    train(uninterrupted)
    assert losses(uninterrupted)[-1] < losses(uninterrupted)[0]
    train_interrupted(job, 7, monkeypatch)
    train(job)
    assert losses(job) == losses(uninterrupted)
    assert same(weights(job), weights(uninterrupted))
    load_model(job.model_folder(0))
