"""Image towers of transformers: the vision models of CLIP, SigLIP and SigLIP 2, and DINOv2 and DINOv3."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from lotlip.models.checkpointing import checkpoint_layers
from lotlip.models.vision.image_tower import ImageTower
from lotlip.models.vision.spec import ImageTowerSpec

# Model types whose towers are supported. A SigLIP 2 model of fixed resolution has the type of SigLIP.
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
TYPES = (CLIP, SIGLIP, "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")


class TransformersTower(ImageTower):
    """A vision model of transformers, with CLIP's projection where the spec has one.

    Args:
        spec: `kwargs` has `config`, the model's configuration as plain JSON types, and for a CLIP model with a
            projection `projection_dim`.

    Raises:
        ValueError: the model type is not one of `TYPES`, the configuration is not valid, or the model lacks the spec's
            pooling.
    """

    def __init__(self, spec: ImageTowerSpec) -> None:
        config = vision_config(spec)
        attention = None if config.model_type == "dinov3_convnext" else "sdpa"
        trunk: Any = AutoModel.from_config(config, attn_implementation=attention, trust_remote_code=False)
        super().__init__(spec, trunk)
        if config.model_type == SIGLIP and spec.pooling == "model" and not self.has_attention_pool:
            raise ValueError(
                f"this {spec.model} has no attention pooling (vision_use_head is false), so it has no feature of a "
                "whole image; use it as an image tower with image_tower.pooling: mean"
            )
        dimension = spec.kwargs.get("projection_dim")
        self.proj = nn.Linear(config.hidden_size, dimension, bias=False) if dimension else None
        # transformers stretches DINO's positions by itself
        self._stretches = config.model_type in (CLIP, SIGLIP) and spec.image_size != config.image_size

    @property
    def prefix_tokens(self) -> int:
        """[CLS] and register tokens, which come before the patches."""
        if self.trunk.config.model_type == SIGLIP:
            return 0
        return 1 + (getattr(self.trunk.config, "num_register_tokens", None) or 0)

    @property
    def token_width(self) -> int:
        return (
            self.trunk.config.hidden_sizes[-1]
            if self.trunk.config.model_type == "dinov3_convnext"
            else self.trunk.config.hidden_size
        )

    @property
    def own_width(self) -> int:
        return self.token_width if self.proj is None else self.proj.out_features

    def hidden_states(self, pixel_values: Tensor) -> Tensor:
        options = {"interpolate_pos_encoding": True} if self._stretches else {}
        hidden = self.trunk(pixel_values, **options).last_hidden_state
        return self.trunk.post_layernorm(hidden) if self.trunk.config.model_type == CLIP else hidden

    def own_feature(self, hidden: Tensor) -> Tensor:
        if self.trunk.config.model_type == SIGLIP:
            return self.attention_pool(hidden)
        return hidden[:, 0] if self.proj is None else self.proj(hidden[:, 0])

    def enable_checkpointing(self) -> None:
        if not checkpoint_layers(self.trunk):
            raise ValueError(
                f"the image tower {self.spec.model} (transformers) does not support activation checkpointing; set "
                "compute.training.activation_checkpointing to false"
            )

    @property
    def has_attention_pool(self) -> bool:
        return isinstance(getattr(self.trunk, "head", None), nn.Module)

    def attention_pool(self, hidden: Tensor) -> Tensor:
        return self.trunk.head(hidden)


def vision_config(spec: ImageTowerSpec) -> PretrainedConfig:
    """The configuration of a spec's model.

    Raises:
        ValueError: the model type is not one of `TYPES`, or the configuration is not valid.
    """
    given = dict(spec.kwargs.get("config") or {})
    kind = given.pop("model_type", None)
    check_type(kind, spec.model)
    try:
        return AutoConfig.for_model(kind, **given)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"the configuration of the image tower {spec.model} is not valid: {error}") from error


def check_type(kind: str | None, name: str) -> None:
    """Raises ValueError if a model type of transformers cannot be an image tower."""
    if kind in TYPES:
        return
    remedy = f"supported are {', '.join(TYPES)}"
    if kind is not None and kind.startswith("siglip2"):
        remedy = "it takes pictures of any shape; take the version of one size, such as google/siglip2-base-patch16-224"
    raise ValueError(f"{name} is a model of type {kind!r} and cannot be an image tower: {remedy}")
