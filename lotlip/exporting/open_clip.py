"""Exports a model in the layout of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.core.files import write_json
from lotlip.data.tokenizer import CLIP as CLIP_WORDS
from lotlip.data.tokenizer import TextTokenizer, word_pieces
from lotlip.exporting.plain import encoder_weights, logit_scale, plain_text_tower, vocabulary_size
from lotlip.exporting.transformers import activation, at_size
from lotlip.importing.clip_names import TEXT, VISION, to_open_clip
from lotlip.models.lotlip import LotlipModel
from lotlip.models.text.appended import AppendedTower
from lotlip.models.vision.image_tower import ImageTower
from lotlip.models.vision.open_clip_tower import OpenClipTower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.transformers_tower import CLIP, TransformersTower

USE = """
import open_clip
import torch
from PIL import Image

folder = "local-dir:path/to/this/folder"
model, prepare = open_clip.create_model_from_pretrained(folder)
tokenizer = open_clip.get_tokenizer(folder)
with torch.inference_mode():
    image = model.eval().encode_image(prepare(Image.open("picture.jpg"))[None], normalize=True)
    text = model.encode_text(tokenizer(["A long text. With many sentences."]), normalize=True)
    print(model.logit_scale.exp() * image @ text.T)
"""
_RESIZE = {"crop": "shortest", "squash": "squash"}
# Activation in transformers → open_clip's options. Both towers of an open_clip model have the same `quick_gelu`.
_TANH = {"approximate": "tanh"}
_ACTIVATIONS: dict[str, tuple[bool, dict[str, str] | None]] = {
    "quick_gelu": (True, None),
    "gelu": (False, None),
    "gelu_new": (False, _TANH),
    "gelu_pytorch_tanh": (False, _TANH),
}


def write(model: LotlipModel, tokenizer: TextTokenizer, folder: Path) -> str:
    """Writes `open_clip_config.json`, `open_clip_model.safetensors`, and the tokenizer unless it is CLIP's own.

    Returns:
        A program that uses them.

    Raises:
        ValueError: open_clip cannot represent this model, or cannot prepare images as it needs.
    """
    text, image = plain_text_tower(model, "open_clip"), model.image_tower
    preprocessing = _preprocessing(image.spec)
    vision, visual, image_activation = _vision(image)
    words = _text_config(text, tokenizer)
    quick_gelu = _options(text.transformer.config.hidden_act)[0]
    if image_activation is not None and _options(image_activation)[0] != quick_gelu:
        raise ValueError(
            f"the activations of the towers are {text.transformer.config.hidden_act} (text) and {image_activation} "
            "(image), but open_clip uses quick_gelu in both or in none; use --to transformers or --to onnx"
        )
    config = {"embed_dim": model.config.embed_dim, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": words}
    weights = {f"visual.{name}": value for name, value in visual.items()} | {"logit_scale": logit_scale(model).view(())}
    if model.logit_bias is not None:
        config["init_logit_bias"] = model.logit_bias.item()
        weights["logit_bias"] = model.logit_bias.detach().view(())
    # a text tower with the projection of SigLIP needs a class that has the tower as a module of its own
    if not text.causal:
        config["custom_text"] = True
    prefix = "" if text.causal else "text."
    weights |= {f"{prefix}{name}": value for name, value in _text_weights(text, words["context_length"]).items()}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocessing})
    save_file(
        {name: value.detach().contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors"
    )
    if "hf_tokenizer_name" in words:
        tokenizer.save(folder)
    return USE


def features(folder: Path, texts: list[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns normalised features of texts [T, D] and images [I, D], as open_clip computes them."""
    name = f"local-dir:{folder}"
    loaded: Any = open_clip.create_model_from_pretrained(name, return_transform=False)
    model = loaded.eval()
    ids = open_clip.get_tokenizer(name)(texts)
    return normalize(model.encode_text(ids), dim=-1), normalize(model.encode_image(pixels), dim=-1)


def _preprocessing(spec: ImageTowerSpec) -> dict[str, Any]:
    """Returns open_clip's description of how images are prepared.

    Raises:
        ValueError: open_clip cannot prepare them so.
    """
    if spec.resize not in _RESIZE or spec.crop != 1 or spec.interpolation not in ("bicubic", "bilinear"):
        raise ValueError(
            f"open_clip cannot prepare images as this model needs (resize {spec.resize}, crop {spec.crop:g}, "
            f"interpolation {spec.interpolation}): it knows resize crop and squash, crop 1, and interpolation bicubic "
            "and bilinear; use --to transformers or --to onnx"
        )
    return {
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": _RESIZE[spec.resize],
    }


def _options(name: str) -> tuple[bool, dict[str, str] | None]:
    """Returns `quick_gelu` and `act_kwargs` for an activation of transformers."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"open_clip has no activation {name}; use --to transformers or --to onnx")
    return _ACTIVATIONS[name]


def _encoder(width: int, intermediate: int, layers: int, act: str, eps: float) -> dict[str, Any]:
    """Returns the fields that configurations of text and image towers share."""
    ratio = intermediate / width
    if int(width * ratio) != intermediate:  # open_clip rounds down
        ratio = (intermediate + 0.5) / width
    config: dict[str, Any] = {"width": width, "layers": layers, "mlp_ratio": ratio, "norm_kwargs": {"eps": eps}}
    if options := _options(act)[1]:
        config["act_kwargs"] = options
    return config


def _text_config(text: AppendedTower, tokenizer: TextTokenizer) -> dict[str, Any]:
    config = text.transformer.config
    fields = _encoder(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.hidden_act,
        config.layer_norm_eps,
    ) | {
        "context_length": tokenizer.context_length,
        "vocab_size": vocabulary_size(text),
        "heads": config.num_attention_heads,
    }
    if not text.causal:
        fields |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    elif config.eos_token_id != vocabulary_size(text) - 1:  # by default, open_clip pools at the highest id
        fields |= {"pool_type": "eos", "eos_id": config.eos_token_id}
    if not _is_clip(tokenizer):
        fields["hf_tokenizer_name"] = "."  # with any name, open_clip reads the tokenizer in the model's folder
    return fields


def _is_clip(tokenizer: TextTokenizer) -> bool:
    """Whether a tokenizer has the words of CLIP's, which open_clip has itself."""
    if tokenizer.family != "clip":
        return False
    words = word_pieces(CLIP_WORDS)
    size = words.get_vocab_size()
    return tokenizer.vocabulary_size == size and all(tokenizer.token(n) == words.id_to_token(n) for n in range(size))


def _text_weights(text: AppendedTower, context_length: int) -> dict[str, Tensor]:
    weights = to_open_clip(encoder_weights(text), TEXT, text.transformer.config.num_hidden_layers)
    # open_clip pads texts to the number of positions
    weights["positional_embedding"] = weights["positional_embedding"][:context_length]
    if text.causal:
        return weights | {"text_projection": text.proj.weight.T}
    return weights | {f"text_projection.{name}": value for name, value in text.proj.state_dict().items()}


def _vision(image: ImageTower) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """Returns the configuration and weights of an image tower, and its activation if that depends on `quick_gelu`.

    Raises:
        ValueError: open_clip has no such tower.
    """
    spec = image.spec
    if spec.pooling == "model" and isinstance(image, OpenClipTower):
        config = {**spec.kwargs["vision_cfg"], "image_size": spec.image_size}
        own = isinstance(image.trunk, VisionTransformer)
        return config, image.trunk.state_dict(), activation(spec.kwargs) if own else None
    is_clip = isinstance(image, TransformersTower) and spec.model == CLIP and image.proj is not None
    if spec.pooling == "model" and is_clip:
        return _clip_vision(image)
    raise ValueError(
        f"open_clip cannot build the image tower {spec.model} of {spec.library} with pooling {spec.pooling!r}; it "
        "needs a tower of open_clip, or CLIP's of transformers with its projection, with pooling 'model'. Use --to "
        "onnx, or --to transformers for SigLIP"
    )


def _clip_vision(image: Any) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    config, weights = at_size(image)
    act = config.hidden_act
    fields = _encoder(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, act, config.layer_norm_eps
    ) | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "head_width": config.hidden_size // config.num_attention_heads,
    }
    visual = to_open_clip(weights, VISION, config.num_hidden_layers)
    return fields, visual | {"proj": image.proj.weight.T}, act
