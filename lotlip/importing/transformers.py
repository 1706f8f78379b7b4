"""Starting models of transformers: CLIP, SigLIP, and SigLIP 2 of one image size."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from lotlip.data.plain_tokenizer import PlainTokenizer
from lotlip.image_tower.config import TransformersTowerConfig
from lotlip.image_tower.transformers import transformers_spec
from lotlip.importing.start import ACCEPTED, StartingModel
from lotlip.importing.tokenizers import as_plain, check_tokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.saving import wrong_weights

TYPES = ("clip", "siglip")


def open_start(
    name: str, revision: str | None = None, tokenizer: str | None = None, local_files_only: bool = False
) -> StartingModel:
    """Opens a CLIP or SigLIP model; see `lotlip.importing.start.open_start`.

    Raises:
        ValueError: there is no such model, or it is of another type.
    """
    options: dict[str, Any] = {"revision": revision or "main", "local_files_only": local_files_only}
    try:
        whole = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{name} is not a model that can be read: {error}; {ACCEPTED}") from error
    if whole.model_type not in TYPES:
        remedy = ACCEPTED
        if whole.model_type == "siglip2":
            remedy = (
                "it takes images of any shape; use the version of one size, such as google/siglip2-base-patch16-224"
            )
        raise ValueError(f"{name} is a model of type {whole.model_type!r}, which cannot be a starting model: {remedy}")
    tower = TransformersTowerConfig(kind="transformers", model=name, revision=revision)
    spec = transformers_spec(tower, local_files_only, is_start=True)
    words = _tokenizer(name, options, whole.text_config.max_position_embeddings, tokenizer)
    check_tokenizer(words, whole.model_type, whole.text_config.vocab_size, name)
    is_siglip = whole.model_type == "siglip"
    text = whole.text_config
    # models of earlier versions have other ids in their configuration than in their tokenizer
    text.pad_token_id, text.eos_token_id, text.bos_token_id = words.pad_id, words.end_id, words.special_ids[0]
    config = LotlipConfig(
        text_config=text,
        image_config=spec.to_json(),
        embed_dim=text.projection_size if is_siglip else whole.projection_dim,
        context_length=words.context_length,
        corner_tokens=0,
        logit_bias=is_siglip,
    )
    return StartingModel(name, config, words, lambda: _weights(name, options))


def _tokenizer(name: str, options: Mapping[str, Any], positions: int, tokenizer: str | None) -> PlainTokenizer:
    if tokenizer is not None:
        return PlainTokenizer(tokenizer, positions)
    words: Any = None
    with suppress(Exception):  # SigLIP's own needs sentencepiece, but its tokenizer.json does not
        words = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    try:
        if words is None or not words.is_fast:
            words = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(
            f"the tokenizer of {name} cannot be read: {error}; import the model with `lotlip import --tokenizer "
            "FOLDER`, where the folder has a tokenizer.json"
        ) from error
    return as_plain(words, positions)


def _weights(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        model, info = AutoModel.from_pretrained(
            name, trust_remote_code=False, weights_only=True, dtype="float32", output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the weights of {name} cannot be read, or do not fit its config.json: {error}") from error
    if wrong := wrong_weights(info):
        raise ValueError(f"the weights of {name} do not fit its config.json: {wrong}")
    weights: dict[str, Tensor] = {f"image.trunk.{key}": value for key, value in model.vision_model.state_dict().items()}
    text = model.text_model.state_dict()
    if model.config.model_type == "siglip":
        weights |= {f"text.proj.{part}": text.pop(f"head.{part}") for part in ("weight", "bias")}
        weights["logit_bias"] = model.logit_bias.detach().reshape(1)
    else:
        weights["text.proj.weight"] = model.text_projection.weight.detach()
        weights["image.proj.weight"] = model.visual_projection.weight.detach()
    weights |= {f"text.transformer.{key}": value for key, value in text.items()}
    return {**weights, "logit_scale": model.logit_scale.detach().reshape(1)}
