"""The model card: what a saved model is, how it came to be and what it scores, read from its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lotlip.core.section import flatten
from lotlip.models.configuration import LotlipConfig

_USE = """
import lotlip  # makes transformers know the model
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("path/to/this/folder").eval()
processor = AutoProcessor.from_pretrained("path/to/this/folder")
inputs = processor(text=["A long text. With many sentences."], images=Image.open("picture.jpg"), return_tensors="pt")
with torch.inference_mode():
    print(model(**inputs).logits_per_image)
"""


def model_card(config: LotlipConfig) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    about = config.provenance or {}
    front = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["lotlip", "clip", "long-text", "image-text-retrieval"],
    }
    title = about.get("name", "LoTLIP")
    parts = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    parts += [*_summary(config), "", "## Use", "", "```python", _USE.strip(), "```", ""]
    parts += _scores(about.get("scores"), about.get("protocol"))
    parts += _section("Data", about.get("data"))
    parts += _section("Training configuration", about.get("pretraining"))
    origin = {key: value for key, value in about.items() if isinstance(value, str | int) and key != "name"}
    parts += _section("Origin", origin)
    return "\n".join(parts)


def _summary(config: LotlipConfig) -> Iterator[str]:
    encoder, image = config.text_config, config.image_config
    corner = f"{config.corner_tokens} corner tokens"
    if config.corner_tokens and not config.corner_mask:
        corner += " without their mask"
    if config.register_tokens:
        corner += f", {config.register_tokens} register tokens"
    yield (
        "A language-image model after LoTLIP (NeurIPS 2024, [arXiv 2410.05249](https://arxiv.org/abs/2410.05249)): "
        f"texts of up to {config.context_length} tokens and pictures in one space of {config.embed_dim} dimensions."
    )
    yield ""
    size = f"{encoder.num_hidden_layers} layers, {encoder.hidden_size} wide"
    yield f"- text tower: {encoder.model_type}, {size}; {corner}"
    resize = {
        "crop": "the centre of a picture",
        "squash": "the whole picture, squashed to a square",
        "pad": "the whole picture, padded to a square",
    }[image.get("resize", "crop")]
    yield f"- image tower: {image['timm_model']}, {image['image_size']} pixels; it sees {resize}"
    yield f"- similarity: {config.similarity}{', logits with a bias' if config.logit_bias else ''}"


def _scores(scores: Mapping[str, Mapping[str, float]] | None, protocol: Mapping[str, Any] | None) -> list[str]:
    if not scores:
        return ["## Scores", "", "Not evaluated yet.", ""]
    parts = ["## Scores", ""]
    for benchmark, found in scores.items():
        parts += [f"### {benchmark}", "", *_table(found), ""]
        if protocol and benchmark in protocol:
            parts += ["Measured so:", "", *_table(protocol[benchmark]), ""]
    return parts


def _section(title: str, values: Mapping[str, Any] | None) -> list[str]:
    return [f"## {title}", "", *_table(flatten(values)), ""] if values else []


def _table(values: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in values.items())]


def _cell(value: Any) -> str:
    shown = (
        f"{value:.4g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, allow_nan=False)
    )
    return shown.replace("|", "\\|").replace("\n", " ")
