"""A pretrained image tower from open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip

from lotlip.core.files import read_json
from lotlip.data.models import LOCAL
from lotlip.image_tower.config import OpenClipTowerConfig
from lotlip.image_tower.preprocessing import with_settings
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.image_tower import load_weights
from lotlip.models.vision.open_clip_tower import OpenClipTower
from lotlip.models.vision.spec import ImageTowerSpec

_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}  # open_clip's resize_mode
CONFIG_FILE = "open_clip_config.json"


def pretrained_tower(config: OpenClipTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Returns the result of the stage for `open_clip_tower`, which is not trained here."""
    return TowerResult(open_clip_tower(config))


def model_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the configuration of an open_clip model.

    Args:
        name: name of an architecture, or `LOCAL` and the folder of a saved model.

    Returns:
        The model's configuration, and how its images are prepared: empty for an architecture.

    Raises:
        ValueError: there is no such model, or the folder's configuration is damaged.
    """
    if not name.startswith(LOCAL):
        found = open_clip.get_model_config(name)
        if found is None:
            raise ValueError(
                f"open_clip {open_clip.__version__} has no model {name!r}; open_clip.list_models() lists its models"
            )
        return found, {}
    path = Path(name.removeprefix(LOCAL)) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the folder of a model that open_clip saved")
    data = read_json(path)
    model, images = (data.get(key) for key in ("model_cfg", "preprocess_cfg"))
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise ValueError(f"{path} has no model_cfg with embed_dim, vision_cfg and text_cfg; save the model again")
    return model, images or {}


def open_clip_spec(config: OpenClipTowerConfig) -> ImageTowerSpec:
    """What `open_clip_tower` builds. Images are prepared as open_clip does it.

    Raises:
        ValueError: open_clip has no such configuration or weights.
    """
    found, data = model_config(config.model)
    if config.weights:
        data = open_clip.get_pretrained_cfg(config.model, config.weights)
    if config.weights and not data:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.model)) or "none"
        raise ValueError(
            f"image_tower.weights {config.weights} is not a tag of {config.model} in open_clip (tags: {tags}); name a "
            "local file in image_tower.checkpoint"
        )
    kwargs = {
        "embed_dim": found["embed_dim"],
        "vision_cfg": found["vision_cfg"],
        "quick_gelu": bool(data.get("quick_gelu", found.get("quick_gelu", False))),
    }
    spec = ImageTowerSpec(
        config.model,
        found["vision_cfg"].get("image_size", 224),
        kwargs=kwargs,
        library="open_clip",
        mean=tuple(data.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(data.get("std", open_clip.OPENAI_DATASET_STD)),
        resize=_RESIZE[data.get("resize_mode", "shortest")],
        interpolation=data.get("interpolation", "bicubic"),
    )
    return with_settings(spec, config)


def load_open_clip(config: OpenClipTowerConfig) -> Any:
    """Returns open_clip's model with both towers and their weights.

    Raises:
        ValueError: as `open_clip_spec`, or the weights cannot be had or do not fit.
    """
    spec = open_clip_spec(config)
    if config.checkpoint is not None and not config.checkpoint.is_file():
        raise ValueError(f"image_tower.checkpoint: {config.checkpoint} does not exist")
    source = str(config.checkpoint or config.weights)
    try:
        return open_clip.create_model(
            config.model,
            None if config.model.startswith(LOCAL) else source,
            weights_only=True,
            require_pretrained=True,  # else a folder without weights gives random ones
            force_image_size=spec.image_size,
            force_quick_gelu=spec.kwargs["quick_gelu"],
        )
    except Exception as error:  # the hub's client, torch and open_clip raise many types
        raise ValueError(
            f"open_clip cannot load {config.model} with the weights {source}: {type(error).__name__}: {error}"
        ) from error


def open_clip_tower(config: OpenClipTowerConfig) -> OpenClipTower:
    """Builds the image tower of an open_clip model with its weights.

    Raises:
        ValueError: as `load_open_clip`.
    """
    tower = OpenClipTower(open_clip_spec(config))
    weights = {f"trunk.{name}": value for name, value in load_open_clip(config).visual.state_dict().items()}
    load_weights(tower, weights, f"open_clip's {config.model}")
    return tower.eval()
