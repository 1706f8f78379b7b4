"""The LoTLIP authors' checkpoints, turned into models of this project."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lotlip.core.files import ForeignFileError, atomic_write, check_free, check_replaceable, write_record
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import save_model
from lotlip.models.vision.image_tower import ImageTowerSpec

RELEASED_IMAGE_TOWER = ImageTowerSpec("vit_base_patch16_224", 224)  # of LoTLIP-ViT-B-16
MAX_CORNER_TOKENS = 16  # more extra rows than this are another tokenizer's words
BERT_LIKE = ("bert", "roberta", "xlm-roberta")  # encoders whose weights have BERT's names
BERT_HEAD = 64  # width of an attention head in every BERT that was published

# Sizes of a BERT encoder: the weight that shows each, and in which of its dimensions.
_SIZES = {
    "vocab_size": ("embeddings.word_embeddings.weight", 0),
    "hidden_size": ("embeddings.word_embeddings.weight", 1),
    "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
    "intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0),
}
_ENCODER, _PROJECTION = "text.transformer.", "text.proj.weight"
_LAYER = re.compile(r"text\.transformer\.encoder\.layer\.(\d+)\.")
# A buffer 0, 1, 2, … that transformers used to save.
_POSITION_IDS = "text.transformer.embeddings.position_ids"


class WrongWeightsError(ValueError):
    """Weights are not those of the model that was described; the message has a line for each that does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """What an authors' checkpoint holds.

    Attributes:
        file: where it was read.
        weights: by the released code's names, without `module.`, fp32.
        about: its `epoch`, and its name as `official_name`, as far as it has them.
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
    """Writes the authors' checkpoint as a model in Hugging Face layout; the folder is whole or not there.

    Args:
        file: their `model.pt`.
        out: folder to write.
        image: the image tower that the checkpoint was made with.
        text_config: JSON of the text encoder's configuration or of some of its fields, for what the weights do not
            tell; without it, as BERT's.
        tokenizer: whose word pieces the text tower reads: a bundled name, a `tokenizer.json` or its folder.
        context_length: most tokens in a text.
        force: an `out` with an imported model in it is replaced; one with other files never is.

    Returns:
        The model's configuration, and the keys of `text_config` that are no fields of an encoder's configuration.

    Raises:
        ValueError: `file` is no such checkpoint, what was said of the model contradicts its weights, or `out` is taken.
    """
    inputs = [Path(path).resolve() for path in (file, text_config, tokenizer) if path]
    _check_free(out, inputs, force)
    checkpoint = read_checkpoint(file)
    given, ignored = read_text_config(text_config) if text_config else ({}, [])
    config, weights, words = convert(checkpoint, image, given, tokenizer, context_length)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    config.provenance = {"name": out.resolve().name, "source": f"{file.name}, sha256 {digest}", **checkpoint.about}
    with atomic_write(out.resolve()) as partial:
        save_model(config, weights, words, partial, image_tower=None)
        write_record(partial, Path(out.resolve().name))
    return config, ignored


def describe(config: LotlipConfig) -> list[str]:
    """A line for each part of a model that was read."""
    text, image = config.text_config, config.image_config
    words = text.vocab_size - config.corner_tokens
    size = f"{text.num_hidden_layers} layers, {text.hidden_size} wide, {text.num_attention_heads} heads"
    tables = f"{text.max_position_embeddings} positions, {text.type_vocab_size} token types"
    return [
        f"text tower: {text.model_type}, {size}, {text.intermediate_size} inside, {tables}",
        f"vocabulary: {words} words and {config.corner_tokens} corner tokens; texts of {config.context_length} tokens",
        f"image tower: {image['timm_model']}, {image['image_size']} pixels, features {config.embed_dim} wide",
    ]


def _check_free(out: Path, inputs: list[Path], force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder that is not there yet")
    inside = [path for path in inputs if path.is_relative_to(out.resolve()) and path.exists()]
    if inside:  # the folder is replaced as a whole
        raise ValueError(f"--out {out} has {inside[0]} in it, which is read; name another folder")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; name another folder, or replace an imported model with --force")
    try:
        check_replaceable(out.resolve())
    except ForeignFileError as error:
        raise ForeignFileError(f"--out {out} cannot be replaced: {error}") from error
    check_free(out.resolve() / "config.json", lambda _: True)


# --- reading ------------------------------------------------------------------------------------------------------


def read_checkpoint(file: Path) -> Checkpoint:
    """Reads `{"epoch", "name", "state_dict"}` or a bare state dict, without running any code that may be in it.

    Raises:
        ValueError: the file is not there, is no torch checkpoint, or holds more than tensors and plain values.
    """
    content = _load(file)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file} holds a {type(state).__name__} where weights by name are needed; give a model.pt")
    strange = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(
            f"{file} holds no weights under {', '.join(strange)}; give a checkpoint with the entry 'state_dict', or "
            "one that is nothing but weights by name"
        )
    weights = {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }
    about = {"epoch": content.get("epoch"), "official_name": content.get("name")}
    return Checkpoint(file, weights, {key: value for key, value in about.items() if isinstance(value, int | str)})


def _load(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"there is no checkpoint {file}; give the path of the authors' model.pt")
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch is unsure of here ends in an error below
            # a file in torch's older format, which is no zip file, cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # torch raises many types on what it cannot read
        needed = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if isinstance(error, UnpicklingError) and needed:
            raise ValueError(
                f"{file} needs {needed[1]} beside its weights, which takes running code from the file to read; if "
                "you trust it, load it with torch.load(…, weights_only=False) and save its 'state_dict' alone"
            ) from error
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is no torch checkpoint that is safe to read, or not whole; "
            "give the authors' model.pt, and download it again if it was cut short"
        ) from error


def read_text_config(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields of a BERT-family configuration, and which keys of the file are none.

    What transformers notes of every model (its version, the weights' type) is left out without a word.

    Raises:
        ValueError: the file is not there, no JSON object, or of a model whose weights are laid out unlike BERT's.
    """
    if not file.is_file():
        raise ValueError(f"--text-config {file} is not there")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--text-config {file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"--text-config {file} holds a {type(data).__name__}; it needs an object of the config's fields"
        )
    kind = data.pop("model_type", "bert")
    if kind not in BERT_LIKE:
        raise ValueError(
            f"--text-config {file} is of a {kind!r}; weights are read in BERT's layout, that of {', '.join(BERT_LIKE)}"
        )
    of_all = {field.name for field in fields(PretrainedConfig)}  # type: ignore[arg-type]
    known = {field.name for field in fields(CONFIG_MAPPING[kind])} - of_all
    chosen = {"model_type": kind, **{name: data[name] for name in data if name in known}}
    return chosen, sorted(data.keys() - known - of_all)


# --- converting ---------------------------------------------------------------------------------------------------


def convert(
    checkpoint: Checkpoint,
    image: ImageTowerSpec,
    text_config: Mapping[str, Any],
    tokenizer: str = "bert-base-uncased",
    context_length: int = 128,
) -> tuple[LotlipConfig, dict[str, Tensor], TextTokenizer]:
    """The configuration, the weights by this project's names and the tokenizer; arguments as in `import_official`.

    Raises:
        ValueError: names or sizes of the weights are not those of the model that was described; where it would be many
            lines, it is a `WrongWeightsError`.
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
        with torch.device("meta"):  # names and shapes alone
            model = LotlipModel(config)
    except (StrictDataclassError, KeyError) as error:  # a field's type, a function's name
        raise ValueError(
            f"--text-config has what a {text['model_type']} cannot have: {error}; mend or leave out the field"
        ) from error
    _check_fit(checkpoint, model)
    if model.image_tower.width != config.embed_dim:
        raise ValueError(
            f"{checkpoint.file}: the text's features are {config.embed_dim} wide, those of {image.timm_model} "
            f"{model.image_tower.width}; name with --vision the ViT that the checkpoint was made with"
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
    """A matrix that sizes are read from."""
    weight = checkpoint.weights.get(name)
    if weight is None or weight.ndim != 2:
        found = "is missing" if weight is None else f"has the shape {list(weight.shape)}"
        raise ValueError(
            f"{checkpoint.file} is no LoTLIP checkpoint: {name} {found}, which a BERT text tower has as a matrix"
        )
    return weight


def _text_config(checkpoint: Checkpoint, given: Mapping[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The text encoder's configuration: its sizes from the weights, all else as given."""
    read = {size: _weight(checkpoint, _ENCODER + name).shape[dim] for size, (name, dim) in _SIZES.items()}
    read["num_hidden_layers"] = len({found[1] for name in checkpoint.weights if (found := _LAYER.match(name))})
    words, rows = tokenizer.vocabulary_size, read["vocab_size"]
    if not 0 <= rows - words <= MAX_CORNER_TOKENS:
        raise ValueError(
            f"{checkpoint.file} has {rows} rows of word embeddings, but the tokenizer {tokenizer.name} has {words} "
            f"words, and 0 to {MAX_CORNER_TOKENS} rows more are corner tokens; name with --tokenizer the one that the "
            "checkpoint was trained with"
        )
    wrong = [
        f"{name} is {given[name]} in --text-config, but {size} in the weights"
        for name, size in read.items()
        if given.get(name, size) != size and (name, given[name]) != ("vocab_size", words)
    ]
    if given.get("pad_token_id", tokenizer.pad_id) != tokenizer.pad_id:
        wrong.append(
            f"pad_token_id is {given['pad_token_id']} in --text-config, but {tokenizer.pad_id} in the tokenizer"
        )
    if wrong:
        raise ValueError(f"{checkpoint.file}: {'; '.join(wrong)}; correct the file, or leave these fields out of it")
    heads = given.get("num_attention_heads", read["hidden_size"] / BERT_HEAD)
    if not isinstance(heads, int | float) or heads < 1 or heads % 1 or read["hidden_size"] % heads:
        raise ValueError(
            f"{checkpoint.file} has a text tower {read['hidden_size']} wide, which cannot have {heads!r} attention "
            f"heads (unless told, one for each {BERT_HEAD}, as in BERT); set num_attention_heads in --text-config"
        )
    return {"model_type": "bert", "pad_token_id": tokenizer.pad_id, **given, **read, "num_attention_heads": int(heads)}


def _check_fit(checkpoint: Checkpoint, model: LotlipModel) -> None:
    """Raises an error with every weight that is missing, left over or of another shape."""
    wanted = {_official_name(name): list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in checkpoint.weights.items() if name != _POSITION_IDS}
    if found.get("logit_scale") == []:
        found["logit_scale"] = [1]
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    problems += [
        f"{name} is {shape}, in the model {wanted[name]}"
        for name, shape in found.items()
        if wanted.get(name, shape) != shape
    ]
    if problems:
        spec, text = model.config.image_config, model.config.text_config
        towers = f"a {spec['timm_model']} for {spec['image_size']} pixels and a {text.model_type}"
        remedy = "describe with --vision, --image-size and --text-config what it was made with"
        listed = "\n  ".join(problems)
        raise WrongWeightsError(f"{checkpoint.file} does not hold {towers}; {remedy}. What does not fit:\n  {listed}")
