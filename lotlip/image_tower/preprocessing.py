"""Settings of params.yaml that override how a pretrained image tower prepares pictures and pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lotlip.image_tower.config import PretrainedTowerConfig
from lotlip.models.vision.spec import ImageTowerSpec


def with_settings(spec: ImageTowerSpec, config: PretrainedTowerConfig) -> ImageTowerSpec:
    """A spec with the settings that params.yaml gives; those that are null stay as they are."""
    names = ("image_size", "resize", "interpolation", "crop", "mean", "std")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(config, name)) is not None}
    if config.resize == "pad" or (config.resize and config.crop is None):
        changes["crop"] = 1.0  # a mode of one's own choice shows the whole square
    return replace(spec, pooling=config.pooling, **changes)
