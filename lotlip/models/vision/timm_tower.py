"""Image towers of timm: ViTs with or without a [CLS] token, and convolutional models."""

from __future__ import annotations

import math
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
        check_name(spec.model)
        if options := [name for name in LOADING_OPTIONS if name in spec.kwargs]:
            raise ValueError(f"kwargs of the image tower {spec.model} load other files: remove {', '.join(options)}")
        arguments: dict[str, Any] = {"num_classes": 0, **spec.kwargs, "pretrained": pretrained}
        if revision is not None:
            config = timm.get_pretrained_cfg(spec.model)
            if config is None or not config.hf_hub_id:
                raise ValueError(f"timm's weights of {spec.model} are not on the hub; remove the revision {revision}")
            arguments["pretrained_cfg_overlay"] = {"hf_hub_id": f"{config.hf_hub_id}@{revision}"}
        trunk = _create(spec, arguments)
        super().__init__(spec, trunk)
        self._grid = Grid(trunk)

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
        return self._grid.tokens(self.trunk.forward_features(pixel_values))

    def own_feature(self, hidden: Tensor) -> Tensor:
        return self.trunk.forward_head(self._grid.features(hidden))

    def normalised(self, hidden: Tensor) -> Tensor:
        return last_norm(self.trunk, hidden)

    @property
    def has_attention_pool(self) -> bool:
        return has_attention_pool(self.trunk)

    def attention_pool(self, hidden: Tensor) -> Tensor:
        return self.trunk.pool(hidden)


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


def check_name(name: str) -> None:
    """Raises ValueError if timm has no model of a name. Other names, such as `hf-hub:…`, would make it load files."""
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models('vit*') lists those it has")


def number_of_prefix_tokens(trunk: nn.Module) -> int:
    """Tokens of a timm model before those of the patches."""
    return int(getattr(trunk, "num_prefix_tokens", 0))  # type: ignore[call-overload]


class Grid:
    """The layout of a timm model's features: tokens [B, T, C], or a feature map [B, C, G, G] or [B, G, G, C]."""

    def __init__(self, trunk: nn.Module) -> None:
        self._channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        self._is_map = False

    def tokens(self, features: Tensor) -> Tensor:
        """Features as tokens [B, T, C]. Their layout is remembered for `features`.

        Raises:
            ValueError: the features are neither tokens nor one map.
        """
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ValueError(
                "this model of timm gives neither tokens nor one feature map, so it cannot be an image tower; "
                "choose a ViT or a convolutional model"
            )
        self._is_map = features.ndim == 4
        if not self._is_map:
            return features
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).transpose(1, 2)

    def features(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`; images are square."""
        if not self._is_map:
            return tokens
        side = math.isqrt(tokens.shape[1])
        return (
            tokens.unflatten(1, (side, side))
            if self._channels_last
            else tokens.transpose(1, 2).unflatten(2, (side, side))
        )


def last_norm(trunk: nn.Module, hidden: Tensor) -> Tensor:
    """Applies a timm model's last norm where it comes after the mean over tokens."""
    norm = getattr(trunk, "fc_norm", None)
    return norm(hidden) if isinstance(norm, nn.Module) else hidden


def has_attention_pool(trunk: nn.Module) -> bool:
    """Whether a timm ViT pools by attention."""
    return isinstance(getattr(trunk, "attn_pool", None), nn.Module)
