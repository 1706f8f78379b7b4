"""A pretrained image tower from transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
    SiglipVisionModel,
)

from lotlip.data.weights import check_weights
from lotlip.image_tower.config import TransformersTowerConfig
from lotlip.image_tower.preprocessing import with_settings
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.image_tower import load_weights
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.transformers_tower import CLIP, SIGLIP, TransformersTower, check_type

_PROJECTED = "CLIPVisionModelWithProjection"


def pretrained_tower(config: TransformersTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Returns the result of the stage for `transformers_tower`, which is not trained here."""
    return TowerResult(transformers_tower(config))


def transformers_spec(
    config: TransformersTowerConfig, local_files_only: bool = True, is_start: bool = False
) -> ImageTowerSpec:
    """What `transformers_tower` builds. Pictures are prepared as the model's own processor does it.

    Args:
        config: section of params.yaml.
        local_files_only: whether only a folder and the hub's cache are read.
        is_start: whether the tower is part of a starting model, whose settings cannot be changed.

    Raises:
        ValueError: the model or its processor is not found, it is of a type that cannot be an image tower, or the two
            have different image sizes and the settings have none.
    """
    options = _options(config) | {"local_files_only": local_files_only}
    return _spec(config, _read_config(config, options), options, is_start)


def _read_config(config: TransformersTowerConfig, options: dict[str, Any]) -> PretrainedConfig:
    """The configuration of the model that the settings name.

    Raises:
        ValueError: there is no such model, or its folder has an adapter.
    """
    check_weights(Path(config.model))
    try:
        return AutoConfig.from_pretrained(config.model, trust_remote_code=False, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        place = "a folder with a model of transformers, nor in the hub's cache on this machine"
        if not options.get("local_files_only"):
            place = "a folder with a model of transformers, nor a model that the hub has"
        raise ValueError(f"image_tower.model {config.model} is neither {place}: {error}") from error


def _spec(
    config: TransformersTowerConfig, whole: Any, options: dict[str, Any], is_start: bool = False
) -> ImageTowerSpec:
    """What is built of a model with a configuration; see `transformers_spec`."""
    vision: Any = whole
    if whole.model_type in ("clip", "siglip", "siglip2"):  # the last one has an error of its own
        vision = whole.vision_config
    elif hasattr(whole, "vision_config"):
        raise ValueError(
            f"image_tower.model {config.model} is a {whole.model_type} model; only the image towers of CLIP and SigLIP "
            "models can be taken out of a whole model"
        )
    check_type(vision.model_type, f"image_tower.model {config.model}")
    kwargs: dict[str, Any] = {"config": _plain(vision)}
    if vision.model_type == CLIP and (vision is not whole or _PROJECTED in (whole.architectures or ())):
        kwargs["projection_dim"] = whole.projection_dim
    spec = ImageTowerSpec(vision.model_type, getattr(vision, "image_size", 224), kwargs=kwargs, library="transformers")
    prepared = _prepared(spec, config, options, is_start)
    # DINO is trained to interpolate its positions, and its processors differ from its configurations
    if vision.model_type in (CLIP, SIGLIP) and prepared.image_size != spec.image_size and config.image_size is None:
        raise ValueError(
            f"{_name(config, is_start)} takes images of {spec.image_size} pixels, but its preprocessor_config.json "
            f"prepares {prepared.image_size}; correct that file"
            + ("" if is_start else ", or set image_tower.image_size, for which positions are interpolated")
        )
    return with_settings(prepared, config)


def transformers_tower(config: TransformersTowerConfig) -> TransformersTower:
    """Builds the image tower of a model of transformers with its weights.

    Raises:
        ValueError: as `transformers_spec`, or weights are missing or left over.
    """
    options = _options(config)
    whole = _read_config(config, options)
    spec = _spec(config, whole, options)
    options |= {"weights_only": True, "dtype": "float32", "output_loading_info": True}
    try:
        model, info = _model_class(whole, spec).from_pretrained(config.model, trust_remote_code=False, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"the weights of image_tower.model {config.model} cannot be read, or do not fit its config.json: {error}"
        ) from error
    if missing := sorted({*info["missing_keys"], *info["mismatched_keys"]}):
        raise ValueError(
            f"image_tower.model {config.model} lacks {len(missing)} weights of its image tower: "
            f"{', '.join(map(str, missing[:3]))}"
        )
    tower = TransformersTower(spec)
    weights = {f"trunk.{name}": value for name, value in getattr(model, "vision_model", model).state_dict().items()}
    if tower.proj is not None:
        weights["proj.weight"] = model.visual_projection.weight
    load_weights(tower, weights, f"image_tower.model {config.model}")
    return tower.eval()


def _model_class(whole: PretrainedConfig, spec: ImageTowerSpec) -> Any:
    """The class that reads the image tower's weights. CLIP's with a projection takes its width from a whole CLIP."""
    if spec.model == SIGLIP:
        return SiglipVisionModel
    return CLIPVisionModelWithProjection if whole.model_type == CLIP and "projection_dim" in spec.kwargs else AutoModel


def _options(config: TransformersTowerConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main"}


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON types, without what concerns only the file it came from."""
    transient = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    return {name: value for name, value in config.to_diff_dict().items() if name not in transient} | {
        "model_type": config.model_type
    }


def _name(config: TransformersTowerConfig, is_start: bool) -> str:
    return config.model if is_start else f"image_tower.model {config.model}"


def _prepared(
    spec: ImageTowerSpec, config: TransformersTowerConfig, options: dict[str, Any], is_start: bool
) -> ImageTowerSpec:
    """The spec with the preprocessing of the model's processor.

    Raises:
        ValueError: there is no processor, or it prepares images in a way that has no equal here, and the settings do
            not say how to prepare them.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(config.model, trust_remote_code=False, **options)
        return replace(spec, **_preprocessing(processor))
    except (OSError, ValueError, TypeError, KeyError) as error:
        if None not in (config.mean, config.std, config.resize):
            return spec
        raise ValueError(
            f"how {_name(config, is_start)} prepares images cannot be taken from its preprocessor_config.json "
            f"({error}); " + ("restore or correct that file" if is_start else "set image_tower.mean, std and resize")
        ) from error


def _preprocessing(processor: Any) -> dict[str, Any]:
    """Fields of an `ImageTowerSpec` from a processor of transformers.

    Raises:
        ValueError, TypeError, KeyError: it does something that these fields cannot express.
    """
    for step in ("do_resize", "do_rescale"):
        if getattr(processor, step, True) is False:
            raise ValueError(f"{step} is false")
    size, cut = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
    shorter = size.get("shortest_edge") or _side(size, "size")
    cropped = _side(cut, "crop_size") if getattr(processor, "do_center_crop", False) and cut else shorter
    if cropped > shorter:
        raise ValueError(f"crop_size {cropped} is larger than size {shorter}")
    plain = getattr(processor, "do_normalize", True) is False
    return {
        "image_size": cropped,
        "mean": (0.0, 0.0, 0.0) if plain else tuple(processor.image_mean),
        "std": (1.0, 1.0, 1.0) if plain else tuple(processor.image_std),
        "resize": "crop" if size.get("shortest_edge") else "squash",
        "interpolation": Image.Resampling(int(processor.resample)).name.lower(),
        "crop": cropped / shorter,
    }


def _side(size: dict[str, Any], name: str) -> int:
    if size["height"] != size["width"]:
        raise ValueError(f"{name} is {size['width']} × {size['height']}, not a square")
    return size["height"]
