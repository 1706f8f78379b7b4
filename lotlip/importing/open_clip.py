"""Starting models of open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPTextConfig, PretrainedConfig, SiglipTextConfig

from lotlip.data.models import LOCAL, check_address
from lotlip.data.plain_tokenizer import PlainTokenizer
from lotlip.data.tokenizer import CLIP
from lotlip.image_tower.config import OpenClipTowerConfig
from lotlip.image_tower.open_clip import load_open_clip, model_config, open_clip_spec
from lotlip.importing.clip_names import text_weights
from lotlip.importing.start import StartingModel
from lotlip.importing.tokenizers import as_plain, check_tokenizer
from lotlip.models.configuration import LotlipConfig

# What the fields of open_clip's text configuration must be, for the text towers of CLIP and SigLIP.
_CLIP: dict[str, Any] = {"no_causal_mask": False, "pool_type": "argmax", "proj_bias": False}
_SIGLIP: dict[str, Any] = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
SCALARS = ("logit_scale", "logit_bias")  # the second one only in models trained with SigLIP's loss
_POSITIONS = ("positional_embedding", "text.positional_embedding")
_PLAIN: dict[str, Any] = {"hf_model_name": None, "embed_cls": False, "ls_init_value": None, "block_type": None}


def open_start(address: str, tokenizer: str | None = None) -> StartingModel:
    """Opens a model of open_clip.

    Args:
        address: NAME:TAG, NAME:FILE, or `LOCAL` and a folder. Images for a file are prepared as open_clip does it by
            default.
        tokenizer: see `lotlip.importing.start.open_start`.

    Raises:
        ValueError: open_clip has no such model, or its text tower is of another kind than CLIP's and SigLIP's.
    """
    local = address.startswith(LOCAL)
    architecture, _, source = (address, "", "") if local else address.partition(":")
    if not local:
        check_address(architecture, source)
    settings: dict[str, Any] = {"kind": "open_clip", "model": architecture}
    if local:
        tower = OpenClipTowerConfig(**settings)
    elif Path(source).is_file():
        import open_clip

        defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "resize": "crop"}
        tower = OpenClipTowerConfig(**settings, checkpoint=Path(source), **defaults)
    else:
        tower = OpenClipTowerConfig(**settings, weights=source)
    spec = open_clip_spec(tower)
    text = spec_text(architecture)
    siglip = is_siglip(text, f"open_clip:{address}")
    words = _tokenizer(architecture, text, siglip, tokenizer)
    check_tokenizer(words, "siglip" if siglip else "clip", text["vocab_size"], f"open_clip:{address}")
    config = LotlipConfig(
        text_config=text_config(text, spec.kwargs["embed_dim"], bool(spec.kwargs["quick_gelu"]), words),
        image_config=spec.to_json(),
        embed_dim=spec.kwargs["embed_dim"],
        context_length=words.context_length,
        corner_tokens=0,
        logit_bias=model_config(architecture)[0].get("init_logit_bias") is not None,
    )
    return StartingModel(f"open_clip:{address}", config, words, lambda: _weights(tower, text["context_length"]))


def spec_text(architecture: str) -> dict[str, Any]:
    """Returns the text configuration of an architecture, with open_clip's default for each field that it lacks."""
    from dataclasses import asdict

    from open_clip.model import CLIPTextCfg

    try:
        return asdict(CLIPTextCfg(**model_config(architecture)[0]["text_cfg"]))
    except TypeError as error:  # an unknown field
        raise ValueError(f"the text configuration of {architecture} is not valid: {error}") from error


def is_siglip(text: Mapping[str, Any], name: str) -> bool:
    """Returns whether a text tower is SigLIP's rather than CLIP's.

    Raises:
        ValueError: it is neither.
    """
    for siglip, expected in ((False, _CLIP), (True, _SIGLIP)):
        if all(text[field] == value for field, value in {**expected, **_PLAIN}.items()):
            return siglip
    different = {field: text[field] for field in {**_CLIP, **_PLAIN} if text[field] != {**_CLIP, **_PLAIN}[field]}
    raise ValueError(
        f"{name} has a text tower of another kind than CLIP's and SigLIP's ({different}), so it cannot be a starting "
        "model; its image tower can be used by image_tower: {kind: open_clip}"
    )


def text_config(text: Mapping[str, Any], width: int, quick_gelu: bool, words: PlainTokenizer) -> PretrainedConfig:
    """Returns the configuration of transformers for a text tower of open_clip.

    Args:
        text: all fields of open_clip's text configuration.
        width: of the shared space.
        quick_gelu: whether the activation is OpenAI's approximation of GELU.
        words: the model's tokenizer.
    """
    activation = "quick_gelu" if quick_gelu else "gelu"
    if (text["act_kwargs"] or {}).get("approximate") == "tanh":
        activation = "gelu_pytorch_tanh"
    common: dict[str, Any] = {
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": activation,
        "layer_norm_eps": (text["norm_kwargs"] or {}).get("eps", 1e-5),
        "pad_token_id": words.pad_id,
        "eos_token_id": words.end_id,
        "bos_token_id": words.special_ids[0],
    }
    if text["no_causal_mask"]:
        return SiglipTextConfig(projection_size=width, **common)
    return CLIPTextConfig(projection_dim=width, **common)


def _tokenizer(architecture: str, text: Mapping[str, Any], siglip: bool, tokenizer: str | None) -> PlainTokenizer:
    if tokenizer is None and text["hf_tokenizer_name"]:
        import open_clip

        try:
            library: Any = open_clip.get_tokenizer(architecture)
        except Exception as error:  # the hub's client raises many types
            raise ValueError(
                f"the tokenizer {text['hf_tokenizer_name']} of open_clip's {architecture} cannot be loaded ({error}); "
                "name a local one with --tokenizer"
            ) from error
        return as_plain(library.tokenizer, text["context_length"])
    if tokenizer is None and siglip:
        raise ValueError(f"open_clip's {architecture} names no tokenizer; name a local one with --tokenizer")
    return PlainTokenizer(tokenizer or CLIP, text["context_length"])


def _weights(tower: OpenClipTowerConfig, context_length: int) -> dict[str, Tensor]:
    model = load_open_clip(tower)
    _check_positions(tower, context_length)
    state: dict[str, Tensor] = {name: value.float() for name, value in model.state_dict().items()}
    image = {f"image.trunk.{name}": value.float() for name, value in model.visual.state_dict().items()}
    text = {
        name.removeprefix("text."): value
        for name, value in state.items()
        if not name.startswith("visual.") and name not in (*SCALARS, "attn_mask")
    }
    scalars = {name: state[name].reshape(1) for name in SCALARS if name in state}
    return {**image, **text_weights(text), **scalars}


def _check_positions(tower: OpenClipTowerConfig, context_length: int) -> None:
    """Raises ValueError if a file has another number of text positions: open_clip would interpolate them silently."""
    from open_clip.factory import _find_checkpoint_in_dir, load_state_dict

    folder = Path(tower.model.removeprefix(LOCAL)) if tower.model.startswith(LOCAL) else None
    file = _find_checkpoint_in_dir(folder) if folder else tower.checkpoint
    if file is None:
        return
    weights = load_state_dict(str(file), weights_only=True)
    positions = next((weights[name] for name in _POSITIONS if name in weights), None)
    if positions is not None and len(positions) != context_length:
        raise ValueError(
            f"{file} has {len(positions)} text positions, but {tower.model} has a context of {context_length} tokens; "
            "name the architecture that the weights were trained with; pretrain.text.position_interpolation changes "
            "their number"
        )
