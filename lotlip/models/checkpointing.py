"""Activation checkpointing: the backward pass recomputes a layer's activations instead of keeping them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(encoder: nn.Module) -> bool:
    """Checkpoints every layer of an encoder of transformers, also in evaluation mode; returns whether it has such.

    The switch of transformers has no effect in evaluation mode, which image towers are trained in.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # it imports LotlipModel, and so this module

    layers: list[Any] = [layer for layer in encoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return bool(layers)
