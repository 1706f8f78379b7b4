"""Converts the LoTLIP authors' checkpoints into models of this project."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lotlip.core.files import atomic_write, write_record
from lotlip.data.tokenizer import TextTokenizer
from lotlip.data.weights import load_checkpoint
from lotlip.importing.output import check_out
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import save_model
from lotlip.models.vision.spec import ImageTowerSpec

RELEASED_IMAGE_TOWER = ImageTowerSpec("vit_base_patch16_224", 224)  # of LoTLIP-ViT-B-16
MAX_CORNER_TOKENS = 16  # more extra rows mean that the checkpoint has another tokenizer
BERT_LIKE = ("bert", "roberta", "xlm-roberta")  # encoders whose weights have BERT's names
BERT_HEAD = 64  # width of an attention head in all published BERT models

# Sizes of a BERT encoder: the weight and the dimension that show each.
_SIZES = {
    "vocab_size": ("embeddings.word_embeddings.weight", 0),
    "hidden_size": ("embeddings.word_embeddings.weight", 1),
    "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
    "intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0),
}
_ENCODER, _PROJECTION = "text.transformer.", "text.proj.weight"
_LAYER = re.compile(r"text\.transformer\.encoder\.layer\.(\d+)\.")
# A buffer 0, 1, 2, … that older versions of transformers saved.
_POSITION_IDS = "text.transformer.embeddings.position_ids"


class WrongWeightsError(ValueError):
    """The weights do not belong to the described model; the message has one line per mismatch."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of an authors' checkpoint.

    Attributes:
        file: that was read.
        weights: fp32, by the released code's names without `module.`.
        about: its `epoch`, and its name as `official_name`, if it has them.
    """

    file: Path
    weights: Mapping[str, Tensor]
    about: Mapping[str, int | str]


def import_official(
    file: Path,
    out: Path,
    image: ImageTowerSpec = RELEASED_IMAGE_TOWER,
    text_config: Path | None = None,
    tokenizer: str = "bert-base-uncased",
    context_length: int = 128,
    force: bool = False,
) -> tuple[LotlipConfig, list[str]]:
    """Writes an authors' checkpoint as a model in Hugging Face layout; the folder is written atomically.

    Args:
        file: the authors' `model.pt`.
        out: folder to write.
        image: the image tower that the checkpoint was trained with.
        text_config: JSON file with fields of the text encoder's configuration that the weights do not show; None: as in
            BERT.
        tokenizer: of the text tower: a bundled name, a `tokenizer.json` or its folder.
        context_length: maximum number of tokens in a text.
        force: whether an imported model in `out` may be replaced; a folder with other files is never replaced.

    Returns:
        The model's configuration, and the keys of `text_config` that are not fields of an encoder's configuration.

    Raises:
        ValueError: `file` is not such a checkpoint, the description of the model contradicts its weights, or `out`
            exists.
    """
    inputs = [Path(path).resolve() for path in (file, text_config, tokenizer) if path]
    check_out(out, inputs, force)
    checkpoint = read_checkpoint(file)
    settings, ignored = read_text_config(text_config) if text_config else ({}, [])
    config, weights, words = convert(checkpoint, image, settings, tokenizer, context_length)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    config.provenance = {"name": out.resolve().name, "source": f"{file.name}, sha256 {digest}", **checkpoint.about}
    with atomic_write(out.resolve()) as partial:
        save_model(config, weights, words, partial, image_tower=None)
        write_record(partial, Path(out.resolve().name), "lotlip import-official")
    return config, ignored


# --- reading ------------------------------------------------------------------------------------------------------


def read_checkpoint(file: Path) -> Checkpoint:
    """Reads `{"epoch", "name", "state_dict"}` or a bare state dict, without running any code in it.

    Raises:
        ValueError: the file does not exist, is not a torch checkpoint, or contains more than tensors and plain values.
    """
    content = load_checkpoint(file)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file} contains a {type(state).__name__}, not weights by name; name a model.pt")
    invalid = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if invalid:
        raise ValueError(
            f"{file} has no weights under {', '.join(invalid)}; name a checkpoint with the entry 'state_dict', or one "
            "that contains only weights by name"
        )
    weights = {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }
    about = {"epoch": content.get("epoch"), "official_name": content.get("name")}
    return Checkpoint(file, weights, {key: value for key, value in about.items() if isinstance(value, int | str)})


def read_text_config(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads fields of a BERT-family configuration; also returns the keys of the file that are not such fields.

    Fields that transformers writes for every model (its version, the weights' type) are ignored silently.

    Raises:
        ValueError: the file does not exist, is not a JSON object, or describes a model without BERT's weight layout.
    """
    if not file.is_file():
        raise ValueError(f"--text-config {file} does not exist")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--text-config {file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"--text-config {file} contains a {type(data).__name__}; it needs an object with the config's fields"
        )
    kind = data.pop("model_type", "bert")
    if kind not in BERT_LIKE:
        raise ValueError(
            f"--text-config {file} describes a {kind!r}; only models with BERT's layout can be read: "
            f"{', '.join(BERT_LIKE)}"
        )
    common = {field.name for field in fields(PretrainedConfig)}  # type: ignore[arg-type]
    known = {field.name for field in fields(CONFIG_MAPPING[kind])} - common
    chosen = {"model_type": kind, **{name: data[name] for name in data if name in known}}
    return chosen, sorted(data.keys() - known - common)


# --- converting ---------------------------------------------------------------------------------------------------


def convert(
    checkpoint: Checkpoint,
    image: ImageTowerSpec,
    text_config: Mapping[str, Any],
    tokenizer: str = "bert-base-uncased",
    context_length: int = 128,
) -> tuple[LotlipConfig, dict[str, Tensor], TextTokenizer]:
    """The configuration, the weights by this project's names, and the tokenizer; arguments as for `import_official`.

    Raises:
        ValueError: names or shapes of the weights are not those of the described model; a `WrongWeightsError` if there
            may be many lines.
    """
    words = TextTokenizer(tokenizer, context_length)
    text = _text_config(checkpoint, text_config, words)
    corner_tokens = text["vocab_size"] - words.vocabulary_size
    words = TextTokenizer(tokenizer, context_length, corner_tokens)
    try:
        config = LotlipConfig(
            text_config=AutoConfig.for_model(**text),
            image_config=image.to_json(),
            embed_dim=_weight(checkpoint, _PROJECTION).shape[0],
            context_length=context_length,
            corner_tokens=corner_tokens,
        )
        with torch.device("meta"):  # only names and shapes
            model = LotlipModel(config)
    except (StrictDataclassError, KeyError) as error:  # a field's type or a function's name is invalid
        raise ValueError(
            f"--text-config has a value that a {text['model_type']} cannot have: {error}; correct or remove the field"
        ) from error
    _check_fit(checkpoint, model)
    if model.image_tower.width != config.embed_dim:
        raise ValueError(
            f"{checkpoint.file}: the text features have {config.embed_dim} dimensions, those of {image.model} "
            f"{model.image_tower.width}; set --vision to the ViT that the checkpoint was trained with"
        )
    if context_length > model.text.positions:
        raise ValueError(
            f"--context-length {context_length} exceeds the {model.text.positions} positions of {checkpoint.file}"
        )
    weights = {_our_name(name): value for name, value in checkpoint.weights.items() if name != _POSITION_IDS}
    return config, {**weights, "logit_scale": weights["logit_scale"].reshape(1)}, words


def _our_name(name: str) -> str:
    return re.sub(r"^visual\.", "image.", name)


def _official_name(name: str) -> str:
    return re.sub(r"^image\.", "visual.", name)


def _weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """A matrix that shows sizes of the model."""
    weight = checkpoint.weights.get(name)
    if weight is None or weight.ndim != 2:
        fault = "is missing" if weight is None else f"has the shape {list(weight.shape)}"
        raise ValueError(
            f"{checkpoint.file} is not a LoTLIP checkpoint: {name} {fault}, but it is a matrix in a BERT text tower"
        )
    return weight


def _text_config(checkpoint: Checkpoint, settings: Mapping[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The text encoder's configuration: sizes from the weights, the rest from the settings."""
    sizes = {size: _weight(checkpoint, _ENCODER + name).shape[dim] for size, (name, dim) in _SIZES.items()}
    sizes["num_hidden_layers"] = len({match[1] for name in checkpoint.weights if (match := _LAYER.match(name))})
    words, rows = tokenizer.vocabulary_size, sizes["vocab_size"]
    if not 0 <= rows - words <= MAX_CORNER_TOKENS:
        raise ValueError(
            f"{checkpoint.file} has {rows} rows of word embeddings, but the tokenizer {tokenizer.name} has {words} "
            f"words (0 to {MAX_CORNER_TOKENS} more rows would be corner tokens); set --tokenizer to the one that the "
            "checkpoint was trained with"
        )
    wrong = [
        f"{name} is {settings[name]} in --text-config, but {size} in the weights"
        for name, size in sizes.items()
        if settings.get(name, size) != size and (name, settings[name]) != ("vocab_size", words)
    ]
    if settings.get("pad_token_id", tokenizer.pad_id) != tokenizer.pad_id:
        wrong.append(
            f"pad_token_id is {settings['pad_token_id']} in --text-config, but {tokenizer.pad_id} in the tokenizer"
        )
    if wrong:
        raise ValueError(f"{checkpoint.file}: {'; '.join(wrong)}; correct these fields of the file, or remove them")
    width = sizes["hidden_size"]
    heads = settings.get("num_attention_heads", width / BERT_HEAD)
    if not isinstance(heads, int | float) or heads < 1 or heads % 1 or width % heads:
        raise ValueError(
            f"{checkpoint.file} has a text tower of width {width}, which cannot have {heads!r} attention heads (the "
            f"default is one per {BERT_HEAD} dimensions, as in BERT); set num_attention_heads in --text-config"
        )
    return {
        "model_type": "bert",
        "pad_token_id": tokenizer.pad_id,
        **settings,
        **sizes,
        "num_attention_heads": int(heads),
    }


def _check_fit(checkpoint: Checkpoint, model: LotlipModel) -> None:
    """Raises an error that lists every weight that is missing, surplus or of another shape."""
    expected = {_official_name(name): list(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: list(value.shape) for name, value in checkpoint.weights.items() if name != _POSITION_IDS}
    if shapes.get("logit_scale") == []:
        shapes["logit_scale"] = [1]
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is not in the model" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shape}, in the model {expected[name]}"
        for name, shape in shapes.items()
        if expected.get(name, shape) != shape
    ]
    if problems:
        spec, text = ImageTowerSpec.from_json(model.config.image_config), model.config.text_config
        towers = f"a {spec.model} for {spec.image_size} pixels and a {text.model_type}"
        remedy = "describe the model that it was trained as with --vision, --image-size and --text-config"
        listed = "\n  ".join(problems)
        raise WrongWeightsError(f"{checkpoint.file} does not contain {towers}; {remedy}. Mismatches:\n  {listed}")
