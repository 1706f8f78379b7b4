"""Exports a model as a plain CLIP or SigLIP model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    PretrainedConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from lotlip.core.files import read_json, write_json
from lotlip.data.images import resized_side
from lotlip.data.tokenizer import TextTokenizer
from lotlip.exporting.plain import encoder_weights, logit_scale, plain_text_tower, vocabulary_size
from lotlip.importing.clip_names import VISION, to_transformers
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import without_progress_bars
from lotlip.models.vision.image_tower import ImageTower, load_weights
from lotlip.models.vision.open_clip_tower import OpenClipTower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.transformers_tower import CLIP, SIGLIP, TransformersTower, vision_config

USE = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("path/to/this/folder").eval()
processor = AutoProcessor.from_pretrained("path/to/this/folder")
inputs = processor(
    text=["A long text. With many sentences."],
    images=Image.open("picture.jpg"),
    padding="max_length",
    truncation=True,
    return_tensors="pt",
)
with torch.inference_mode():
    print(model(**inputs).logits_per_image)
"""


def write(model: LotlipModel, tokenizer: TextTokenizer, folder: Path) -> str:
    """Writes `config.json`, `model.safetensors`, the tokenizer and `preprocessor_config.json`.

    Returns:
        A program that uses them.

    Raises:
        ValueError: transformers has no class for this model, or its processors cannot prepare images as it needs.
    """
    processor = image_processor(model.image_tower.spec)
    exported = _exported(model)
    with without_progress_bars():
        exported.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save(folder)
    if isinstance(exported, SiglipModel):  # it was trained without a mask of the padding
        settings = folder / "tokenizer_config.json"
        write_json(settings, read_json(settings) | {"model_input_names": ["input_ids"]})
    return USE


def features(folder: Path, texts: list[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns normalised features of texts [T, D] and images [I, D], as transformers computes them."""
    with without_progress_bars():
        model: Any = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    output = model(**inputs, pixel_values=pixels)
    return output.text_embeds, output.image_embeds


def image_processor(spec: ImageTowerSpec) -> Any:
    """Returns the processor of transformers that prepares images as an image tower needs.

    Raises:
        ValueError: there is none.
    """
    if spec.resize == "pad":
        raise ValueError("the image tower sees images padded to a square, which no processor of transformers does")
    whole = resized_side(spec.image_size, spec.crop)
    settings: dict[str, Any] = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": int(Image.Resampling[spec.interpolation.upper()]),
    }
    square = {"height": whole, "width": whole}
    if spec.resize == "squash" and whole == spec.image_size:
        return SiglipImageProcessor(size=square, **settings)
    crop = {"height": spec.image_size, "width": spec.image_size}
    return CLIPImageProcessor(
        size=square if spec.resize == "squash" else {"shortest_edge": whole}, crop_size=crop, **settings
    )


def _exported(model: LotlipModel) -> CLIPModel | SiglipModel:
    text, image = plain_text_tower(model, "transformers"), model.image_tower
    scale, width = logit_scale(model), model.config.embed_dim
    words = model.config.text_config.to_dict() | {"vocab_size": vocabulary_size(text)}
    exported: CLIPModel | SiglipModel
    if text.causal:
        config, visual, projection = _clip_vision(image)
        words["projection_dim"] = config.projection_dim = width
        exported = CLIPModel(CLIPConfig(text_config=words, vision_config=config.to_dict(), projection_dim=width))
        weights = {"text_projection.weight": text.proj.weight, "visual_projection.weight": projection}
        weights["logit_scale"] = scale.reshape(())
    else:
        config, visual = _siglip_vision(image)
        words["projection_size"] = width
        exported = SiglipModel(SiglipConfig(text_config=words, vision_config=config.to_dict()))
        weights = {f"text_model.head.{name}": value for name, value in text.proj.state_dict().items()}
        bias = torch.zeros(1) if model.logit_bias is None else model.logit_bias
        weights |= {"logit_scale": scale, "logit_bias": bias}
    weights |= {f"text_model.{name}": value for name, value in encoder_weights(text).items()}
    weights |= {f"vision_model.{name}": value for name, value in visual.items()}
    load_weights(exported, weights, "the exported model")
    return exported.eval()


def _siglip_vision(image: ImageTower) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    same = image.spec.model == SIGLIP and image.spec.pooling in ("model", "map")
    if same and isinstance(image, TransformersTower):
        return at_size(image)
    raise ValueError(_no_class(image, "SigLIP", "the SigLIP image tower of transformers"))


def _clip_vision(image: ImageTower) -> tuple[PretrainedConfig, dict[str, Tensor], Tensor]:
    """Returns the configuration, weights and projection of CLIP's image tower.

    Raises:
        ValueError: it is another one.
    """
    if image.spec.pooling == "model":
        if isinstance(image, OpenClipTower) and isinstance(image.trunk, VisionTransformer):
            return _clip_vision_of_open_clip(image)
        if isinstance(image, TransformersTower) and image.spec.model == CLIP and image.proj is not None:
            return *at_size(image), image.proj.weight
    raise ValueError(_no_class(image, "CLIP", "CLIP's image tower with its projection, of transformers or open_clip"))


def _no_class(image: ImageTower, kind: str, needed: str) -> str:
    spec = image.spec
    return (
        f"transformers has no class for {kind}'s text tower with the image tower {spec.model} of {spec.library} and "
        f"pooling {spec.pooling!r}; it needs {needed}, with pooling 'model'. Use --to onnx, or load the model itself "
        "with AutoModel after `import lotlip`"
    )


def at_size(image: TransformersTower) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Returns a vision model's configuration and weights, with positions for the image size that it is used at."""
    config, weights, side = vision_config(image.spec), image.trunk.state_dict(), image.spec.image_size
    if config.image_size != side:
        embeddings, name = image.trunk.embeddings, "embeddings.position_embedding.weight"
        tokens = (side // config.patch_size) ** 2 + image.prefix_tokens
        resized = embeddings.interpolate_pos_encoding(torch.empty(1, tokens, config.hidden_size), side, side)
        weights[name], config.image_size = resized[0].detach(), side
    return config, weights


def _clip_vision_of_open_clip(image: OpenClipTower) -> tuple[PretrainedConfig, dict[str, Tensor], Tensor]:
    """Renames a ViT of open_clip.

    Raises:
        ValueError: its structure is not CLIP's.
    """
    trunk, weights = image.trunk, image.trunk.state_dict()
    projection = weights.pop("proj")
    renamed, unknown = to_transformers(weights, VISION)
    different = [*unknown, *(f"no {name}" for name in VISION if name not in weights)]
    if trunk.pool_type != "tok":
        different.append(f"pooling {trunk.pool_type!r}")
    if different:
        raise ValueError(
            f"the image tower {image.spec.model} of open_clip is not built as CLIP's: {', '.join(different[:5])}; use "
            "--to open_clip or --to onnx"
        )
    block = trunk.transformer.resblocks[0]
    config = CLIPVisionConfig(
        hidden_size=trunk.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(trunk.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=image.spec.image_size,
        patch_size=trunk.conv1.kernel_size[0],
        hidden_act=activation(image.spec.kwargs),
        layer_norm_eps=trunk.ln_post.eps,
    )
    return config, renamed, projection.T


def activation(kwargs: Mapping[str, Any]) -> str:
    """The name that transformers has for the activation of an open_clip ViT."""
    if kwargs.get("quick_gelu"):
        return "quick_gelu"
    tanh = (kwargs["vision_cfg"].get("act_kwargs") or {}).get("approximate") == "tanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"
