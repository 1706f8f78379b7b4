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
    """Returns the result of the stage for `timm_tower`, which is not trained here."""
    return TowerResult(timm_tower(config))


def timm_tower(config: TimmTowerConfig) -> ImageTower:
    """Builds a tower by its name in timm, with pretrained weights from a local file or from the model hub.

    Pixels are normalised as the model was trained, unless the settings override that.

    Raises:
        ValueError: the hub cannot be reached, or the weights do not fit.
    """
    spec = ImageTowerSpec(config.model, config.image_size, resize=config.resize)
    if config.checkpoint is not None:
        tower = _with_checkpoint(build_image_tower(spec), config.checkpoint)
    else:
        tower = _from_hub(spec, config.revision)
    trained_with = resolve_model_data_config(tower.trunk)
    tower.spec = replace(spec, mean=config.mean or trained_with["mean"], std=config.std or trained_with["std"])
    return tower.eval()


def _from_hub(spec: ImageTowerSpec, revision: str | None) -> ImageTower:
    try:
        return build_image_tower(spec, pretrained=True, revision=revision)
    except ValueError:
        raise
    except Exception as error:  # the hub's client and the network layer raise many types
        raise ValueError(
            f"cannot download the weights of {spec.timm_model} from timm's hub ({type(error).__name__}: {error}); "
            "download its model.safetensors on another machine and set image_tower.checkpoint to the file"
        ) from error


def _with_checkpoint(tower: ImageTower, checkpoint: Path) -> ImageTower:
    if not checkpoint.is_file():
        raise ValueError(f"image_tower.checkpoint: {checkpoint} does not exist")
    weights = read_weights(checkpoint)
    if foreign := [name for name in weights if name.startswith(("text", "image.", "vision_model.", "visual."))]:
        raise ValueError(
            f"image_tower.checkpoint {checkpoint} holds a model of images and texts ({foreign[0]}, …); use a file "
            "with the weights of timm's model only"
        )
    expected = tower.trunk.state_dict()
    # drop the classifier, but keep the last norm, which some models store under the same prefix
    kept = {k: value for k, value in weights.items() if k in expected or not k.startswith(("head.", "pre_logits."))}
    load_weights(tower.trunk, kept, checkpoint)
    return tower
