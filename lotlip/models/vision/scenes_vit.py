"""The demo's ViT, registered with timm as `vit_scenes`."""

from __future__ import annotations

from math import log2
from typing import Any

from timm.layers import PatchEmbed
from timm.models import VisionTransformer, register_model
from torch import nn


class ConvStem(PatchEmbed):
    """Patches by a row of 3×3 convolutions of stride 2, which learn small objects faster than one large convolution."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **others: Any) -> None:
        super().__init__(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **others)
        halvings = int(log2(patch_size))
        if 2**halvings != patch_size:
            raise ValueError(f"patch_size {patch_size} is not a power of 2, which the stem's halvings need")
        layers: list[nn.Module] = []
        channels = in_chans
        for step in range(halvings):
            wider = embed_dim // 2 ** max(halvings - 2 - step, 0)
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))  # type: ignore[assignment]


@register_model
def vit_scenes(
    pretrained: bool = False,
    pretrained_cfg: Any = None,  # timm passes these three; they change nothing here
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> VisionTransformer:
    """A small ViT with a convolutional stem for the demo's scenes; every size is in `kwargs`."""
    if pretrained:
        raise ValueError("vit_scenes has no pretrained weights; the image_tower stage trains it")
    return VisionTransformer(embed_layer=ConvStem, **kwargs)
