"""A pretrained image tower from timm."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config

from lotlip.data.weights import read_any_weights
from lotlip.image_tower.config import TimmTowerConfig
from lotlip.image_tower.preprocessing import with_settings
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.image_tower import load_weights
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.timm_tower import TimmTower, check_name

_RESIZE = {"center": "crop", "squash": "squash", "border": "pad"}  # timm's crop_mode


def pretrained_tower(config: TimmTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Returns the result of the stage for `timm_tower`, which is not trained here."""
    return TowerResult(timm_tower(config))


def timm_spec(config: TimmTowerConfig) -> ImageTowerSpec:
    """What `timm_tower` builds. Pictures are prepared as timm does it, unless the settings say otherwise.

    Raises:
        ValueError: timm has no such model.
    """
    check_name(config.model)
    pretrained = timm.get_pretrained_cfg(config.model)
    data = resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else {})
    height, width = data["input_size"][1:]
    if height != width and config.image_size is None:
        raise ValueError(
            f"{config.model} was trained with images of {width} × {height} pixels, and image towers take squares; "
            "set image_tower.image_size"
        )
    spec = ImageTowerSpec(
        config.model,
        width,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        resize=_RESIZE[data["crop_mode"]],
        interpolation=data["interpolation"],
        crop=min(data["crop_pct"], 1.0),
    )
    return with_settings(spec, config)


def timm_tower(config: TimmTowerConfig) -> TimmTower:
    """Builds a pretrained tower by its name in timm, with the weights of a local file or of timm's hub.

    Raises:
        ValueError: the hub cannot be reached, the weights do not fit, or the model cannot pool as the settings say.
    """
    spec = timm_spec(config)
    if not config.pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TimmTower(spec).eval()
    if config.checkpoint is None:
        return _from_hub(spec, config.revision).eval()
    tower = TimmTower(spec)
    _load_checkpoint(tower, config.checkpoint)
    return tower.eval()


def _from_hub(spec: ImageTowerSpec, revision: str | None) -> TimmTower:
    try:
        return TimmTower(spec, pretrained=True, revision=revision)
    except ValueError:
        raise
    except Exception as error:  # the hub's client and the network layer raise many types
        raise ValueError(
            f"cannot download the weights of {spec.model} from timm's hub ({type(error).__name__}: {error}); "
            "download its model.safetensors on another machine and set image_tower.checkpoint to the file"
        ) from error


def _load_checkpoint(tower: TimmTower, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise ValueError(f"image_tower.checkpoint: {checkpoint} does not exist")
    weights = read_any_weights(checkpoint)
    if foreign := [name for name in weights if name.startswith(("text", "image.", "vision_model.", "visual."))]:
        raise ValueError(
            f"image_tower.checkpoint {checkpoint} holds a model of images and texts ({foreign[0]}, …); use the kind "
            "transformers or open_clip, which take their image tower, or give the weights of timm's model alone"
        )
    have = tower.trunk.state_dict()
    # the classifier is dropped; some models have their last norm under the same name
    named = (tower.trunk.default_cfg or {}).get("classifier") or ()
    dropped = ("head.", "pre_logits.", "fc.", "classifier.", *([named] if isinstance(named, str) else named))
    kept = {name: value for name, value in weights.items() if name in have or not name.startswith(dropped)}
    own = (tower.trunk.default_cfg or {}).get("input_size", (0, 0, 0))[-1]
    size = tower.spec.image_size
    hint = f"; with image_tower.image_size {size}, it must be of a model for {size} pixels" if size != own else ""
    load_weights(tower.trunk, kept, f"image_tower.checkpoint {checkpoint}{hint}:")
