"""FLOPs of a training step: those of matrix products, with 2 per multiply-add."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from lotlip.core.compute import TrainingCompute
from lotlip.evaluate.flops import text_tower_flops
from lotlip.models.vision.image_tower import ImageTower
from lotlip.objectives.contrastive import LOGITS_AT_ONCE
from lotlip.plan.memory import compared_patches, logits_per_process
from lotlip.plan.texts import TextLengths
from lotlip.plan.towers import Towers
from lotlip.pretrain.config import PretrainConfig


def step_flops(
    config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths
) -> dict[str, float]:
    """Estimates the FLOPs of one step over all GPUs.

    A backward pass costs two forward passes. Gradient accumulation adds a forward pass without gradients, to compute
    all features before the loss, and activation checkpointing one that recomputes activations.
    """
    passes = 3 + (compute.gradient_accumulation_steps > 1) + compute.activation_checkpointing
    model = towers.model.config
    text = text_tower_flops(model, round(texts.short))
    if texts.per_image:
        text += texts.per_image * text_tower_flops(model, round(texts.long))
    image_passes = int(config.from_pixels) if config.image_tower.frozen else passes
    features = 1 + texts.per_image * (1 + config.text.corner_tokens)
    batch = config.batch_size
    pooling = {}
    patches = compared_patches(config, towers)
    if config.loss.conditioned:  # computed in blocks, so twice
        pair = 4 * patches * model.embed_dim + 2 * model.embed_dim**2  # attention and its output
        pooling = {"pooling of patches": 4.0 * batch * (batch + features - 1) * pair}
    return {
        **pooling,
        "text tower": float(batch * passes * text),
        "image tower": float(batch * image_passes * image_flops(towers.image)) if image_passes else 0.0,
        "loss": loss_flops(config, compute, texts, model.embed_dim, patches),
    }


def loss_flops(
    config: PretrainConfig, compute: TrainingCompute, texts: TextLengths, embed_dim: int, patches: int = 0
) -> float:
    """Estimates the FLOPs of the logits over all GPUs; see `lotlip.plan.memory.loss_bytes` for the arguments.

    Logits computed in blocks are computed twice. The features of a frozen image tower have no gradient.
    """
    features = 1 + texts.per_image * (1 + config.text.corner_tokens)
    products = 2 + (not config.image_tower.frozen) + (logits_per_process(config, compute, features) > LOGITS_AT_ONCE)
    compared = patches * texts.tokens if config.similarity == "late-interaction" else features
    return 2.0 * products * config.batch_size**2 * compared * embed_dim


def image_flops(tower: ImageTower) -> int:
    """Counts the FLOPs of one image in the forward pass."""
    size = tower.spec.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()
