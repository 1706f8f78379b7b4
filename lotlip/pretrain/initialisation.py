"""What training starts from: random weights, a BERT-family model, or another LoTLIP model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from lotlip.core.files import read_json
from lotlip.data.text import SentenceEnds
from lotlip.data.tokenizer import TextTokenizer
from lotlip.data.weights import check_weights, open_weights, read_weights
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text_tower import first_position, position_table
from lotlip.pretrain.config import TEXT_MODELS, PositionInterpolation, PretrainConfig
from lotlip.pretrain.config import TextTowerConfig as TextTowerSettings
from lotlip.pretrain.model import LotlipForPreTraining

POSITIONS = "text.transformer.embeddings.position_embeddings.weight"


def build_for_pretraining(
    config: PretrainConfig, image_tower: Path, sentence_ends: SentenceEnds = "released"
) -> LotlipForPreTraining:
    """A new model to train: its text tower from random or pretrained weights, corner and register tokens added.

    Args:
        config: section of params.yaml.
        image_tower: folder of the image tower, whose width is that of the shared space. Its weights come in only where
            they are trained.
        sentence_ends: how the training texts are split into sub-captions.

    Raises:
        ValueError: tokenizer and encoder do not fit, the context length exceeds the encoder's positions, or a
            pretrained LoTLIP model is of another width.
    """
    text = config.text
    tokenizer = TextTokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)
    start = _pretrained(text.pretrained, text, tokenizer) if text.pretrained else _random(text, tokenizer)
    weights = dict(start.weights)
    model = LotlipForPreTraining(
        LotlipConfig(
            text_config=start.config.to_dict(),
            image_config=read_json(image_tower / "config.json"),
            embed_dim=_width(image_tower),
            context_length=text.context_length,
            corner_tokens=text.corner_tokens,
            corner_mask=text.corner_mask,
            register_tokens=text.register_tokens,
            similarity=config.similarity,
            logit_bias=config.loss.objective == "siglip",
            sentence_ends=sentence_ends,
        ),
        image_tower=not config.image_tower.frozen,
    )
    if text.context_length > model.text.positions:
        raise ValueError(
            f"text.context_length {text.context_length} exceeds the encoder's {model.text.positions} positions"
        )
    if config.loss.objective == "siglip":
        # one pair of `batch_size` belongs together; SigLIP's −10 is that of its batch of 32 k (section 3.2 there)
        weights["logit_bias"] = torch.full((1,), -math.log(config.batch_size - 1))
    if start.earlier is not None:
        weights |= _other_weights(start.earlier, model, text)
    if not config.image_tower.frozen:
        tower = read_weights(image_tower / "model.safetensors")
        weights |= {f"image.{name}": value for name, value in tower.items()}
    model.load_state_dict({**model.state_dict(), **weights})
    return model.train()


@dataclass(frozen=True)
class _Start:
    """Where the text tower starts.

    Attributes:
        config: of its encoder, corner and register tokens counted.
        weights: of its encoder, by the model's names; none of a random one.
        earlier: the LoTLIP model that the encoder comes from, where it comes from one.
    """

    config: PretrainedConfig
    weights: dict[str, Tensor] = field(default_factory=dict)
    earlier: LotlipForPreTraining | None = None


def _random(text: TextTowerSettings, tokenizer: TextTokenizer) -> _Start:
    kind = {"model_type": "bert", "pad_token_id": tokenizer.pad_id, **text.config}
    rows = tokenizer.vocabulary_size + text.corner_tokens + text.register_tokens
    return _Start(AutoConfig.for_model(**{**kind, "vocab_size": rows}))


def _pretrained(name: str, text: TextTowerSettings, tokenizer: TextTokenizer) -> _Start:
    encoder, earlier = _open(name, text.config, text.revision)
    _fit_vocabulary(encoder, text, tokenizer, earlier)
    weights = {f"text.transformer.{name}": value for name, value in encoder.state_dict().items()}
    if text.position_interpolation:
        table = position_table(encoder)
        if table is None:
            raise ValueError(
                f"text.pretrained {name} has no learned positions to stretch; take out text.position_interpolation"
            )
        stretched = interpolate_positions(table.weight.detach(), text.position_interpolation, first_position(table))
        weights[POSITIONS] = stretched
        encoder.config.max_position_embeddings = len(stretched)
    return _Start(encoder.config, weights, earlier)


def text_config(
    name: str, changes: Mapping[str, Any], revision: str | None = None, local_files_only: bool = False
) -> PretrainedConfig:
    """The configuration of a pretrained text tower, of one of `TEXT_MODELS` or of a LoTLIP model.

    Args:
        name: folder of the model, or its name on the hub.
        changes: `text.config`, which go before what the model's own configuration says.
        revision: commit of the model on the hub; None: the newest.
        local_files_only: whether the hub's cache will do, and the hub is not asked.

    Raises:
        OSError: the hub does not have it, or not its cache.
        ValueError: it is no folder with a model, or of a model that cannot be a text tower.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"text.pretrained {name} is a file; name a folder with config.json and model.safetensors")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"text.pretrained {name} has no config.json; name the folder of a model")
        _check_kind(name, read_json(folder / "config.json").get("model_type"))
    options = {"local_files_only": local_files_only, "revision": revision or "main"}
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options, **changes)
    _check_kind(name, config.model_type)
    if isinstance(config, LotlipConfig):
        given = config.text_config.to_dict()
        other = [f"{key}: {value!r}" for key, value in changes.items() if given.get(key) != value]
        if other:
            raise ValueError(
                f"text.config ({', '.join(other)}) differs from the text tower of text.pretrained {name}, which cannot "
                "be changed; remove these keys, or set them to that model's values"
            )
    return config


def _check_kind(name: str, kind: str | None) -> None:
    if kind not in TEXT_MODELS:
        raise ValueError(
            f"text.pretrained {name} is a model of type {kind!r}, which cannot be the text tower; supported are "
            f"{', '.join(TEXT_MODELS)}"
        )


def _open(
    name: str, changes: Mapping[str, Any], revision: str | None
) -> tuple[PreTrainedModel, LotlipForPreTraining | None]:
    """The pretrained encoder and, where it comes from one, the LoTLIP model."""
    try:
        config = text_config(name, changes, revision)
    except OSError as error:
        raise ValueError(
            f"text.pretrained {name} is neither a folder with a model nor one that the hub has: {error}; "
            "train it first, or mend the name"
        ) from error
    check_weights(Path(name))
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "revision": revision or "main",
        "weights_only": True,
    }
    if isinstance(config, LotlipConfig):
        earlier = LotlipForPreTraining.from_pretrained(name, image_tower=False, trust_remote_code=False, **options)
        return earlier.text.transformer, earlier
    return AutoModel.from_pretrained(name, config=config, trust_remote_code=False, **options), None


def _fit_vocabulary(
    encoder: PreTrainedModel,
    text: TextTowerSettings,
    tokenizer: TextTokenizer,
    earlier: LotlipForPreTraining | None,
) -> None:
    """A row for every word piece, then one for each corner and register token, each drawn from N(0, initializer_range).

    Rows of an earlier model's corner and register tokens stay where it had as many.
    """
    words, extra = tokenizer.vocabulary_size, text.corner_tokens + text.register_tokens
    had = encoder.config.vocab_size
    numbers = (text.corner_tokens, text.register_tokens)
    if earlier is not None:
        if (earlier.config.corner_tokens, earlier.config.register_tokens) == numbers and had == words + extra:
            return
        had -= earlier.config.corner_tokens + earlier.config.register_tokens
    if had < words or encoder.config.pad_token_id != tokenizer.pad_id:
        raise ValueError(
            f"text.pretrained {text.pretrained} has {had} word pieces and pads with {encoder.config.pad_token_id}, but "
            f"text.tokenizer {text.tokenizer} has {words} and pads with {tokenizer.pad_id}; name that model's own "
            "tokenizer"
        )
    encoder.resize_token_embeddings(words, mean_resizing=False)  # some tables are padded to a rounder number
    table = encoder.resize_token_embeddings(words + extra, mean_resizing=False)
    nn.init.normal_(table.weight.data[words:], std=encoder.config.initializer_range)


def interpolate_positions(table: Tensor, interpolation: PositionInterpolation, first: int = 0) -> Tensor:
    """Long-CLIP's longer context from trained positions (arXiv 2403.15378, section 3.1).

    The first `keep` stay; each of the others becomes `factor` positions on the straight line to the next, and the last
    one goes on in the direction that led to it, as in its release.

    Args:
        table: position embeddings, [P, H].
        interpolation: how many were trained, stay, and become of each.
        first: rows before the first position's, which stay.

    Returns:
        [first + interpolation.interpolated, H]

    Raises:
        ValueError: the table has fewer positions than were trained.
    """
    trained = table[first : first + interpolation.positions]
    if len(trained) < interpolation.positions:
        raise ValueError(
            f"text.position_interpolation.positions is {interpolation.positions}, but text.pretrained has "
            f"{len(table) - first} positions"
        )
    others = trained[interpolation.keep :]
    steps = torch.diff(trained, dim=0)  # towards the next position, [positions − 1, H]
    onward = torch.cat([steps[interpolation.keep :], steps[-1:]])
    share = torch.arange(interpolation.factor, dtype=table.dtype)[:, None] / interpolation.factor
    between = others[:, None] + share * onward[:, None]  # [positions − keep, factor, H]
    return torch.cat([table[: first + interpolation.keep], between.flatten(0, 1)])


def _other_weights(
    earlier: LotlipForPreTraining, model: LotlipForPreTraining, text: TextTowerSettings
) -> dict[str, Tensor]:
    """Projection, pooler and temperature of an earlier model; the temperature only where the contrast is the same."""
    if earlier.config.embed_dim != model.config.embed_dim:
        raise ValueError(
            f"text.pretrained {text.pretrained} matches images by features of width {earlier.config.embed_dim}, but "
            f"the image tower's are {model.config.embed_dim} wide; train it with the same image tower"
        )
    same = earlier.config.logit_bias == model.config.logit_bias
    return {
        name: value
        for name, value in earlier.state_dict().items()
        if not name.startswith("text.transformer.") and (same or not name.startswith("logit_"))
    }


def _width(image_tower: Path) -> int:
    """D, from the weights on disk: building the tower would import timm, which takes 2 s."""
    with open_weights(image_tower / "model.safetensors") as weights:
        return weights.get_slice("trunk.cls_token").get_shape()[-1]
