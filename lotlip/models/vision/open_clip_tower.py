"""Image towers of open_clip: its own ViTs and ResNets, and the timm models that it wraps."""

from __future__ import annotations

from typing import Any

import timm
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from lotlip.models.vision.image_tower import ImageTower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.timm_tower import Grid, has_attention_pool, last_norm, number_of_prefix_tokens


class OpenClipTower(ImageTower):
    """The image tower of an open_clip model, its projection included.

    Args:
        spec: `kwargs` has `embed_dim`, `vision_cfg` and `quick_gelu` of open_clip's model configuration.

    Raises:
        ValueError: the configuration is not valid.
    """

    def __init__(self, spec: ImageTowerSpec) -> None:
        try:
            config = {**spec.kwargs["vision_cfg"], "image_size": spec.image_size}
            # a configuration may come from anyone: it must not load files, nor ask the hub
            config.pop("timm_model_pretrained", None)
            if (name := config.get("timm_model_name")) and not timm.is_model(name):
                raise ValueError(f"timm has no model {name!r}")
            trunk: Any = _build_vision_tower(
                spec.kwargs["embed_dim"], CLIPVisionCfg(**config), bool(spec.kwargs.get("quick_gelu", False))
            )
        except (LookupError, TypeError, AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"the configuration of the image tower {spec.model} is not valid: {error!r}") from error
        super().__init__(spec, trunk)
        self._grid = Grid(trunk.trunk if isinstance(trunk, TimmModel) else trunk)

    @property
    def prefix_tokens(self) -> int:
        """[CLS], where the model has one."""
        if isinstance(self.trunk, TimmModel):
            return number_of_prefix_tokens(self.trunk.trunk)
        return 0 if isinstance(self.trunk, ModifiedResNet) else 1

    @property
    def token_width(self) -> int:
        if isinstance(self.trunk, TimmModel):
            return self.trunk.trunk.num_features
        if isinstance(self.trunk, ModifiedResNet):
            return self.trunk.attnpool.k_proj.in_features
        return self.trunk.positional_embedding.shape[-1]

    @property
    def own_width(self) -> int:
        return self.spec.kwargs["embed_dim"]

    def hidden_states(self, pixel_values: Tensor) -> Tensor:
        trunk: Any = self.trunk
        if isinstance(trunk, TimmModel):
            return self._grid.tokens(trunk.trunk.forward_features(pixel_values))
        if isinstance(trunk, ModifiedResNet):
            layers = nn.Sequential(trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
            return self._grid.tokens(layers(trunk.stem(pixel_values)))
        return trunk.transformer(trunk._embeds(pixel_values))

    def own_feature(self, hidden: Tensor) -> Tensor:
        trunk: Any = self.trunk
        if isinstance(trunk, TimmModel):
            return trunk.head(trunk.trunk.forward_head(self._grid.features(hidden)))
        if isinstance(trunk, ModifiedResNet):
            return trunk.attnpool(self._grid.features(hidden))
        pooled, _ = trunk._pool(hidden)
        return pooled if trunk.proj is None else pooled @ trunk.proj

    def normalised(self, hidden: Tensor) -> Tensor:
        if isinstance(self.trunk, TimmModel):
            return last_norm(self.trunk.trunk, hidden)
        norm = getattr(self.trunk, "ln_post", None)  # after an attention pooling, it has that one's width
        return hidden if norm is None or self.trunk.attn_pool is not None else norm(hidden)

    @property
    def has_attention_pool(self) -> bool:
        return isinstance(self.trunk, TimmModel) and has_attention_pool(self.trunk.trunk)

    def attention_pool(self, hidden: Tensor) -> Tensor:
        trunk: Any = self.trunk
        return trunk.trunk.pool(hidden)
