"""The model card: a saved model's architecture, origin and scores, read from its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lotlip.core.section import flatten
from lotlip.models.configuration import LotlipConfig
from lotlip.models.vision.spec import ImageTowerSpec

_USE = """
import lotlip  # registers the model with transformers
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
    """Returns the card as Markdown, with the front matter that model hubs read."""
    provenance = config.provenance or {}
    front = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["lotlip", "clip", "long-text", "image-text-retrieval"],
    }
    title = provenance.get("name", "LoTLIP")
    parts = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    parts += [*_summary(config), "", "## Use", "", "```python", _USE.strip(), "```", ""]
    parts += _scores(provenance.get("scores"), provenance.get("protocol"))
    parts += _section("Data", provenance.get("data"))
    parts += _section("Training configuration", provenance.get("pretraining"))
    origin = {key: value for key, value in provenance.items() if isinstance(value, str | int) and key != "name"}
    parts += _section("Origin", origin)
    return "\n".join(parts)


def _summary(config: LotlipConfig) -> Iterator[str]:
    encoder, image = config.text_config, ImageTowerSpec.from_json(config.image_config)
    corner = f"{config.corner_tokens} corner tokens"
    if config.corner_tokens and not config.corner_mask:
        corner += " without their mask"
    if config.register_tokens:
        corner += f", {config.register_tokens} register tokens"
    yield (
        "A language-image model after LoTLIP (NeurIPS 2024, [arXiv 2410.05249](https://arxiv.org/abs/2410.05249)). "
        f"It embeds texts of up to {config.context_length} tokens and images in {config.embed_dim} dimensions."
    )
    yield ""
    size = f"{encoder.num_hidden_layers} layers, {encoder.hidden_size} wide"
    yield f"- text tower: {encoder.model_type}, {size}; {corner}"
    resize = {
        "crop": "the centre of an image",
        "squash": "the entire image, squashed to a square",
        "pad": "the entire image, padded to a square",
    }[image.resize]
    yield f"- image tower: {image.model} ({image.library}), {image.image_size} pixels; it sees {resize}"
    yield f"- similarity: {config.similarity}{', logits with a bias' if config.logit_bias else ''}"


def _scores(scores: Mapping[str, Mapping[str, float]] | None, protocol: Mapping[str, Any] | None) -> list[str]:
    if not scores:
        return ["## Scores", "", "Not evaluated yet.", ""]
    parts = ["## Scores", ""]
    for benchmark, values in scores.items():
        parts += [f"### {benchmark}", "", *_table(values), ""]
        if protocol and benchmark in protocol:
            parts += ["Protocol:", "", *_table(protocol[benchmark]), ""]
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
