"""Initial weights: random, or from a BERT-family model or another LoTLIP model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from lotlip.core.files import read_json
from lotlip.data.plain_tokenizer import PlainTokenizer, open_tokenizer
from lotlip.data.text import SentenceEnds
from lotlip.data.tokenizer import TextTokenizer
from lotlip.data.weights import check_weights, open_weights, read_weights
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.bert import first_position
from lotlip.models.text.siglip import SiglipTower
from lotlip.models.text.text_tower import position_table
from lotlip.models.vision.spec import START
from lotlip.pretrain.config import TEXT_MODELS, PositionInterpolation, PretrainConfig
from lotlip.pretrain.config import TextTowerConfig as TextTowerSettings
from lotlip.pretrain.model import LotlipForPreTraining

if TYPE_CHECKING:
    from lotlip.models.vision.image_tower import ImageTower

# Dual encoders of transformers, whose text encoder `text.pretrained` uses.
WHOLE_MODELS = ("clip", "siglip")
_NOISE_IMAGES = 16


def build_for_pretraining(
    config: PretrainConfig, image_tower: Path, sentence_ends: SentenceEnds = "released"
) -> LotlipForPreTraining:
    """Builds the model to train: a text tower with random or trained weights, plus corner and register tokens.

    Args:
        config: settings of the pretrain stage.
        image_tower: folder of the image tower, whose width is that of the shared space. Its weights are loaded only if
            they are trained.
        sentence_ends: how the training texts are split into sub-captions.

    Raises:
        ValueError: tokenizer and encoder do not match, the context length exceeds the encoder's positions, or a
            pretrained LoTLIP model has another width.
    """
    text = config.text
    tokenizer = open_tokenizer(
        tokenizer_name(config, image_tower), text.context_length, text.corner_tokens, text.register_tokens
    )
    name = str(image_tower / START) if config.start else text.pretrained
    start = _pretrained(name, text, tokenizer) if name else _random(text, tokenizer)
    _check_family(start.config, tokenizer)
    weights = dict(start.weights)
    model = LotlipForPreTraining(
        LotlipConfig(
            text_config=start.config.to_dict(),
            image_config=read_json(image_tower / "config.json"),
            embed_dim=_feature_width(image_tower, config.similarity == "late-interaction"),
            context_length=text.context_length,
            corner_tokens=text.corner_tokens,
            corner_mask=text.corner_mask,
            register_tokens=text.register_tokens,
            similarity=config.similarity,
            logit_bias=config.loss.objective == "siglip",
            min_temperature=config.temperature.min,
            sentence_ends=sentence_ends,
        ),
        image_tower=not config.image_tower.frozen,
    )
    if text.context_length > model.text.positions:
        raise ValueError(
            f"text.context_length {text.context_length} exceeds the encoder's {model.text.positions} positions; set it "
            "lower, or " + ("set text.position_interpolation" if name else "raise text.config.max_position_embeddings")
        )
    if isinstance(model.text, SiglipTower) and text.context_length != model.text.positions and name:
        raise ValueError(
            f"text.context_length is {text.context_length}, but SigLIP reads texts padded to its "
            f"{model.text.positions} positions; set it to {model.text.positions}, or set text.position_interpolation "
            "for longer texts"
        )
    if config.short_texts.random_offset and not model.text.moves_words:
        raise ValueError(
            f"short_texts.random_offset is true, but a {start.config.model_type} encoder cannot move words to other "
            "positions; use an encoder of the BERT or CLIP family, or set it to false"
        )
    if config.loss.objective == "siglip":
        # one in `batch_size` pairs matches; SigLIP's −10 corresponds to its batch size of 32 k (section 3.2 there)
        weights["logit_bias"] = torch.full((1,), -math.log(config.batch_size - 1))
    if start.source is not None:
        weights |= _weights_beside_encoder(start.source, model, str(name))
    if config.temperature.initial:
        weights["logit_scale"] = torch.full((1,), -math.log(config.temperature.initial))
    if config.loss.initial_bias is not None:
        weights["logit_bias"] = torch.full((1,), config.loss.initial_bias)
    if config.image_tower.from_scratch:
        _measure_batch_norms(model.image_tower)
    elif not config.image_tower.frozen:
        tower = read_weights(image_tower / "model.safetensors")
        weights |= {f"image.{name}": value for name, value in tower.items()}
    model.load_state_dict({**model.state_dict(), **weights})
    if text.frozen and start.source is None:
        raise ValueError(
            f"text.frozen is true, but text.pretrained {name} has no projection to the shared space, which needs "
            "training; use pretrain.start, or set text.frozen to false"
        )
    _freeze(model, text)
    token_width = read_json(image_tower / "config.json").get("token_width") or model.config.embed_dim
    model.add_objective(config.loss, token_width)
    return model.train()


@torch.no_grad()
def _measure_batch_norms(tower: ImageTower) -> None:
    """Sets the running statistics of batch norms to those of random weights on noise.

    Training keeps them fixed, so that its result does not depend on how batches are split. Without them, activations
    would shrink or grow from layer to layer.
    """
    norms = [module for module in tower.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the next batch
    tower.train()
    tower(torch.randn(_NOISE_IMAGES, 3, tower.spec.image_size, tower.spec.image_size))
    tower.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def tokenizer_name(config: PretrainConfig, image_tower: Path) -> str:
    """Returns the name of the text tower's tokenizer; a starting model has its own."""
    return str(image_tower / START) if config.start else config.text.tokenizer


def _check_family(encoder: PretrainedConfig, tokenizer: TextTokenizer) -> None:
    """Raises ValueError if an encoder reads texts of another form than its tokenizer writes."""
    family = {"clip_text_model": "clip", "siglip_text_model": "siglip"}.get(encoder.model_type, "bert")
    if tokenizer.family != family:
        raise ValueError(
            f"text.tokenizer {tokenizer.name} is made for models of the {tokenizer.family} family, but the text tower "
            f"is a {encoder.model_type}; name that model's own tokenizer"
        )


def _freeze(model: LotlipForPreTraining, text: TextTowerSettings) -> None:
    """Freezes the text tower, or the embeddings of its first positions, as the settings say."""
    if text.frozen:
        model.text.requires_grad_(False)
    if not text.frozen_positions:
        return
    found = position_table(model.text.transformer)
    if found is None:
        raise ValueError(
            f"text.frozen_positions is {text.frozen_positions}, but a {model.text.transformer.config.model_type} "
            "encoder has no learned positions; set it to 0"
        )
    table = found[1]
    frozen = first_position(table) + text.frozen_positions
    # AdamW does not change rows without gradients, as the table then has no weight decay (`parameter_groups`)
    rows = (torch.arange(table.num_embeddings) >= frozen)[:, None]
    table.weight.register_hook(lambda gradient: gradient * rows.to(gradient.device))


@dataclass(frozen=True)
class _Start:
    """Initial state of the text tower.

    Attributes:
        config: configuration of the encoder, including corner and register tokens.
        weights: weights of the encoder, by the model's names; empty for random weights.
        source: the LoTLIP model that the encoder comes from; None if it comes from another model.
    """

    config: PretrainedConfig
    weights: dict[str, Tensor] = field(default_factory=dict)
    source: LotlipForPreTraining | None = None


def _random(text: TextTowerSettings, tokenizer: TextTokenizer) -> _Start:
    kind = {"model_type": "bert", **_token_ids(tokenizer), **text.config}
    rows = tokenizer.vocabulary_size + text.corner_tokens + text.register_tokens
    return _Start(AutoConfig.for_model(**{**kind, "vocab_size": rows}))


def _token_ids(tokenizer: TextTokenizer) -> dict[str, int]:
    """Returns the fields of an encoder's configuration that its tokenizer decides."""
    if isinstance(tokenizer, PlainTokenizer):
        first, *_ = tokenizer.special_ids
        return {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.end_id, "bos_token_id": first}
    return {"pad_token_id": tokenizer.pad_id}


def _pretrained(name: str, text: TextTowerSettings, tokenizer: TextTokenizer) -> _Start:
    encoder, source = _load_pretrained(name, text.config, text.revision)
    _resize_vocabulary(encoder, name, text, tokenizer, source)
    weights = {f"text.transformer.{key}": value for key, value in encoder.state_dict().items()}
    weights = {key: value for key, value in weights.items() if not key.startswith("text.transformer.head.")}
    if text.position_interpolation:
        found = position_table(encoder)
        if found is None:
            raise ValueError(f"{name} has no learned positions to interpolate; remove text.position_interpolation")
        table = found[1]
        positions = interpolate_positions(table.weight.detach(), text.position_interpolation, first_position(table))
        weights[f"text.transformer.{found[0]}.weight"] = positions
        encoder.config.max_position_embeddings = len(positions)
    return _Start(encoder.config, weights, source)


def text_config(
    name: str, changes: Mapping[str, Any], revision: str | None = None, local_files_only: bool = False
) -> PretrainedConfig:
    """Returns the configuration of a pretrained text tower, one of `TEXT_MODELS`.

    Args:
        name: folder of the model, or its name on the hub.
        changes: `text.config`, which overrides the model's configuration.
        revision: commit of the model on the hub; None: the newest.
        local_files_only: whether to use the local cache only and make no request to the hub.

    Raises:
        OSError: neither the hub nor the local cache has the model.
        ValueError: the folder has no model, or the model cannot be a text tower.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"text.pretrained {name} is a file; name a folder with config.json and model.safetensors")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"text.pretrained {name} has no config.json; name the folder of a model")
        _check_model_type(name, read_json(folder / "config.json").get("model_type"))
    options = {"local_files_only": local_files_only, "revision": revision or "main"}
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options, **changes)
    _check_model_type(name, config.model_type)
    if config.model_type in WHOLE_MODELS and changes:
        raise ValueError(
            f"text.config cannot change a part of the whole model text.pretrained {name}; remove {', '.join(changes)}"
        )
    if isinstance(config, LotlipConfig):
        original = config.text_config.to_dict()
        different = [f"{key}: {value!r}" for key, value in changes.items() if original.get(key) != value]
        if different:
            raise ValueError(
                f"text.config ({', '.join(different)}) differs from the text tower of text.pretrained {name}, which "
                "cannot be changed; remove these keys, or set them to that model's values"
            )
    return config


def _check_model_type(name: str, kind: str | None) -> None:
    if kind not in TEXT_MODELS:
        raise ValueError(
            f"text.pretrained {name} is a model of type {kind!r}, which cannot be the text tower; supported are "
            f"{', '.join(TEXT_MODELS)}"
        )


def _load_pretrained(
    name: str, changes: Mapping[str, Any], revision: str | None
) -> tuple[PreTrainedModel, LotlipForPreTraining | None]:
    """Loads the pretrained encoder and, if it is part of one, the LoTLIP model."""
    try:
        config = text_config(name, changes, revision)
    except OSError as error:
        raise ValueError(
            f"text.pretrained {name} is neither a folder with a model nor one on the hub: {error}; train it "
            "first, or correct the name"
        ) from error
    check_weights(Path(name))
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "revision": revision or "main",
        "weights_only": True,
    }
    if isinstance(config, LotlipConfig):
        source = LotlipForPreTraining.from_pretrained(name, image_tower=False, trust_remote_code=False, **options)
        return source.text.transformer, source
    loaded: Any = AutoModel.from_pretrained(
        name, config=config, trust_remote_code=False, output_loading_info=True, **options
    )
    model, info = loaded
    # a model of another task may lack the pooler, which then starts at random
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(
            f"text.pretrained {name} lacks {len(missing)} weights of its encoder: {', '.join(missing[:3])}; restore "
            "the file, or name another model"
        )
    return (model.text_model if config.model_type in WHOLE_MODELS else model), None


def _resize_vocabulary(
    encoder: PreTrainedModel,
    name: str,
    text: TextTowerSettings,
    tokenizer: TextTokenizer,
    source: LotlipForPreTraining | None,
) -> None:
    """Resizes the table to one row per word piece, corner token and register token.

    Rows of corner and register tokens are drawn from N(0, initializer_range). If `source` has the same numbers of these
    tokens, its rows are kept.
    """
    if isinstance(tokenizer, PlainTokenizer):  # configurations of earlier versions of CLIP have other ids
        for field_name, number in _token_ids(tokenizer).items():
            setattr(encoder.config, field_name, number)
    words, extra = tokenizer.vocabulary_size, text.corner_tokens + text.register_tokens
    pretrained_words = encoder.config.vocab_size
    counts = (text.corner_tokens, text.register_tokens)
    if source is not None:
        if (source.config.corner_tokens, source.config.register_tokens) == counts and pretrained_words == words + extra:
            return
        pretrained_words -= source.config.corner_tokens + source.config.register_tokens
    if pretrained_words < words or encoder.config.pad_token_id != tokenizer.pad_id:
        raise ValueError(
            f"the text tower of {name} has {pretrained_words} word pieces and pads with "
            f"{encoder.config.pad_token_id}, but the tokenizer {tokenizer.name} has {words} and pads with "
            f"{tokenizer.pad_id}; name that model's own tokenizer"
        )
    encoder.resize_token_embeddings(words, mean_resizing=False)  # some tables are padded to a round number of rows
    table = encoder.resize_token_embeddings(words + extra, mean_resizing=False)
    # SigLIP's configuration has no such field
    nn.init.normal_(table.weight.data[words:], std=getattr(encoder.config, "initializer_range", 0.02))


def interpolate_positions(table: Tensor, interpolation: PositionInterpolation, first: int = 0) -> Tensor:
    """Extends trained positions to Long-CLIP's longer context (arXiv 2403.15378, section 3.1).

    The first `keep` positions do not change. Each of the others becomes `factor` positions on the line to the next one.
    The last one is extrapolated from its predecessor, as in the Long-CLIP release.

    Args:
        table: position embeddings, [P, H].
        interpolation: number of trained positions, of kept positions, and of new positions per trained one.
        first: number of rows before the first position, which do not change.

    Returns:
        [first + interpolation.interpolated, H]

    Raises:
        ValueError: the table has fewer positions than `interpolation.positions`.
    """
    trained = table[first : first + interpolation.positions]
    if len(trained) < interpolation.positions:
        raise ValueError(
            f"text.position_interpolation.positions is {interpolation.positions}, but the text tower has "
            f"{len(table) - first} positions; set it to that number"
        )
    others = trained[interpolation.keep :]
    steps = torch.diff(trained, dim=0)  # towards the next position, [positions − 1, H]
    onward = torch.cat([steps[interpolation.keep :], steps[-1:]])
    share = torch.arange(interpolation.factor, dtype=table.dtype)[:, None] / interpolation.factor
    between = others[:, None] + share * onward[:, None]  # [positions − keep, factor, H]
    return torch.cat([table[: first + interpolation.keep], between.flatten(0, 1)])


def _weights_beside_encoder(source: LotlipForPreTraining, model: LotlipForPreTraining, name: str) -> dict[str, Tensor]:
    """Returns projection, pooler and temperature of `source`; the temperature only if the objective is the same."""
    if source.config.embed_dim != model.config.embed_dim:
        raise ValueError(
            f"{name} was trained with image features of width {source.config.embed_dim}, "
            f"but the image tower's are {model.config.embed_dim} wide; use a model trained with the same image tower"
        )
    same_objective = source.config.logit_bias == model.config.logit_bias
    return {
        name: value
        for name, value in source.state_dict().items()
        if not name.startswith("text.transformer.") and (same_objective or not name.startswith("logit_"))
    }


def _feature_width(image_tower: Path, late_interaction: bool) -> int:
    """Returns D, from the files on disk: building the tower would import its library, which takes 2 s."""
    about = read_json(image_tower / "config.json")
    width, token_width = about.get("width"), about.get("token_width")
    if late_interaction and width != token_width:
        raise ValueError(
            f"similarity is late-interaction, which compares patches, but {image_tower} has patches of width "
            f"{token_width} and features of width {width}; use a tower or image_tower.pooling where they are equal"
        )
    with open_weights(image_tower / "model.safetensors") as weights:  # damaged ones are found before training
        return width or weights.get_slice("trunk.cls_token").get_shape()[-1]
