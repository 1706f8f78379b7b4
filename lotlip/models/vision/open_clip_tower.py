"""Image towers of open_clip: its own ViTs and ResNets, and the timm models that it wraps."""

from __future__ import annotations

from typing import Any

from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from lotlip.models.vision.image_tower import ImageTower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.timm_tower import attention_pooled, grid_tokens, number_of_prefix_tokens, ungrid


class OpenClipTower(ImageTower):
    """The image tower of an open_clip model, its projection included.

    Args:
        spec: `kwargs` has `embed_dim`, `vision_cfg` and `quick_gelu` of open_clip's model configuration.

    Raises:
        ValueError: the configuration is not valid.
    """

    def __init__(self, spec: ImageTowerSpec) -> None:
        config = {**spec.kwargs["vision_cfg"], "image_size": spec.image_size}
        # weights come from the folder of the tower; a configuration may come from anyone
        config.pop("timm_model_pretrained", None)
        try:
            trunk: Any = _build_vision_tower(
                spec.kwargs["embed_dim"], CLIPVisionCfg(**config), bool(spec.kwargs.get("quick_gelu", False))
            )
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"the configuration of the image tower {spec.model} is not valid: {error}") from error
        super().__init__(spec, trunk)

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
            return grid_tokens(trunk.trunk, trunk.trunk.forward_features(pixel_values))
        if isinstance(trunk, ModifiedResNet):
            layers = nn.Sequential(trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
            return layers(trunk.stem(pixel_values)).flatten(2).transpose(1, 2)
        return trunk.transformer(trunk._embeds(pixel_values))

    def own_feature(self, hidden: Tensor) -> Tensor:
        trunk: Any = self.trunk
        if isinstance(trunk, TimmModel):
            return trunk.head(trunk.trunk.forward_head(ungrid(trunk.trunk, hidden)))
        if isinstance(trunk, ModifiedResNet):
            side = int(hidden.shape[1] ** 0.5)
            return trunk.attnpool(hidden.transpose(1, 2).unflatten(2, (side, side)))
        pooled, _ = trunk._pool(hidden)
        return pooled if trunk.proj is None else pooled @ trunk.proj

    def normalised(self, hidden: Tensor) -> Tensor:
        norm = getattr(self.trunk, "ln_post", None)  # after an attention pooling, it has that one's width
        return hidden if norm is None or self.trunk.attn_pool is not None else norm(hidden)

    def attention_pool(self, hidden: Tensor) -> Tensor:
        if isinstance(self.trunk, TimmModel) and (pooled := attention_pooled(self.trunk.trunk, hidden)) is not None:
            return pooled
        return super().attention_pool(hidden)
