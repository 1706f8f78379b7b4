"""A pretrained image tower from timm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from timm.data import resolve_model_data_config

from lotlip.data.weights import read_weights
from lotlip.image_tower.config import TimmTowerConfig
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.image_tower import ImageTower, ImageTowerSpec, build_image_tower, load_weights


def pretrained_tower(config: TimmTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """`timm_tower`, of which nothing is trained here."""
    return TowerResult(timm_tower(config))


def timm_tower(config: TimmTowerConfig) -> ImageTower:
    """Builds a pretrained tower by its name in timm, with the weights of a local file or of timm's hub.

    Pixels are normalised as the model was trained, unless the settings say otherwise.

    Raises:
        ValueError: the hub cannot be reached, or the weights do not fit.
    """
    spec = ImageTowerSpec(config.model, config.image_size, resize=config.resize)
    if config.checkpoint is not None:
        tower = _with_checkpoint(build_image_tower(spec), config.checkpoint)
    else:
        tower = _from_hub(spec, config.revision)
    own = resolve_model_data_config(tower.trunk)
    tower.spec = replace(spec, mean=config.mean or own["mean"], std=config.std or own["std"])
    return tower.eval()


def _from_hub(spec: ImageTowerSpec, revision: str | None) -> ImageTower:
    try:
        return build_image_tower(spec, pretrained=True, revision=revision)
    except ValueError:
        raise
    except Exception as error:  # the hub's client and the network below it raise many types
        raise ValueError(
            f"no weights for {spec.timm_model} from timm's hub ({type(error).__name__}: {error}); download its "
            "model.safetensors elsewhere and name the file in image_tower.checkpoint"
        ) from error


def _with_checkpoint(tower: ImageTower, checkpoint: Path) -> ImageTower:
    if not checkpoint.is_file():
        raise ValueError(f"image_tower.checkpoint: {checkpoint} is not there")
    weights = read_weights(checkpoint)
    if whole := [name for name in weights if name.startswith(("text", "image.", "vision_model.", "visual."))]:
        raise ValueError(
            f"image_tower.checkpoint {checkpoint} holds a model of images and texts ({whole[0]}, …); give the weights "
            "of timm's model alone"
        )
    have = tower.trunk.state_dict()
    # the classifier is not wanted; some models have their last norm under the same name
    kept = {k: value for k, value in weights.items() if k in have or not k.startswith(("head.", "pre_logits."))}
    load_weights(tower.trunk, kept, checkpoint)
    return tower
