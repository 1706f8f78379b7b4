"""Image towers of timm: ViTs with or without a [CLS] token, and convolutional models."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn

import lotlip.models.vision.scenes_vit  # noqa: F401 (registers the demo's model)
from lotlip.models.vision.image_tower import ImageTower
from lotlip.models.vision.spec import ImageTowerSpec

# Options of timm's create_model that load something. A model's configuration may come from anyone.
LOADING_OPTIONS = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


class TimmTower(ImageTower):
    """A model of timm without its classifier.

    Args:
        spec: `kwargs` are options of the model beyond its defaults.
        pretrained: whether timm gets its weights from the model hub.
        revision: commit of the model's repository there; None: the newest.

    Raises:
        ValueError: timm has no such model or options, `spec.kwargs` would load files, or timm gets the weights from
            elsewhere than the hub, where there are no commits.
    """

    def __init__(self, spec: ImageTowerSpec, pretrained: bool = False, revision: str | None = None) -> None:
        if not timm.is_model(spec.model):
            raise ValueError(
                f"timm {timm.__version__} has no model {spec.model!r}; timm.list_models('vit*') lists those it has"
            )
        if options := [name for name in LOADING_OPTIONS if name in spec.kwargs]:
            raise ValueError(f"kwargs of the image tower {spec.model} load other files: remove {', '.join(options)}")
        arguments: dict[str, Any] = {"num_classes": 0, **spec.kwargs, "pretrained": pretrained}
        if revision is not None:
            config = timm.get_pretrained_cfg(spec.model)
            if config is None or not config.hf_hub_id:
                raise ValueError(f"timm's weights of {spec.model} are not on the hub; remove the revision {revision}")
            arguments["pretrained_cfg_overlay"] = {"hf_hub_id": f"{config.hf_hub_id}@{revision}"}
        super().__init__(spec, _create(spec, arguments))

    @property
    def prefix_tokens(self) -> int:
        """[CLS] and register tokens, which come before the patches."""
        return number_of_prefix_tokens(self.trunk)

    @property
    def has_cls(self) -> bool:
        return getattr(self.trunk, "cls_token", None) is not None

    @property
    def token_width(self) -> int:
        return self.trunk.num_features

    @property
    def own_width(self) -> int:
        return self.trunk.head_hidden_size

    def hidden_states(self, pixel_values: Tensor) -> Tensor:
        return grid_tokens(self.trunk, self.trunk.forward_features(pixel_values))

    def own_feature(self, hidden: Tensor) -> Tensor:
        return self.trunk.forward_head(ungrid(self.trunk, hidden))

    def normalised(self, hidden: Tensor) -> Tensor:
        # ViTs that pool by the mean have their last norm after it
        return self.trunk.fc_norm(hidden) if isinstance(getattr(self.trunk, "fc_norm", None), nn.Module) else hidden

    def attention_pool(self, hidden: Tensor) -> Tensor:
        pooled = attention_pooled(self.trunk, hidden)
        return super().attention_pool(hidden) if pooled is None else pooled


def _create(spec: ImageTowerSpec, arguments: dict[str, Any]) -> Any:
    try:
        try:
            return timm.create_model(spec.model, **{"img_size": spec.image_size, **arguments})
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(spec.model, **arguments)  # a convolutional model, which takes every size
    except (TypeError, AssertionError) as error:  # how timm refuses options that a model does not have
        raise ValueError(f"timm cannot build the image tower {spec.model} with {arguments}: {error}") from error


def number_of_prefix_tokens(trunk: nn.Module) -> int:
    """Tokens of a timm model before those of the patches."""
    return int(getattr(trunk, "num_prefix_tokens", 0))  # type: ignore[call-overload]


def grid_tokens(trunk: nn.Module, features: Tensor) -> Tensor:
    """Tokens [B, T, C] of a timm model's features: [B, T, C], or a feature map [B, C, G, G] or [B, G, G, C]."""
    if features.ndim != 4:
        return features
    last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    return features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)


def ungrid(trunk: Any, tokens: Tensor) -> Tensor:
    """The inverse of `grid_tokens`; pictures are square."""
    if hasattr(trunk, "num_prefix_tokens") or hasattr(trunk, "cls_token"):
        return tokens
    side = int(tokens.shape[1] ** 0.5)
    last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    return tokens.unflatten(1, (side, side)) if last else tokens.transpose(1, 2).unflatten(2, (side, side))


def attention_pooled(trunk: Any, hidden: Tensor) -> Tensor | None:
    """The feature by a timm ViT's attention pooling; None if it has none."""
    return trunk.pool(hidden) if isinstance(getattr(trunk, "attn_pool", None), nn.Module) else None
