"""Where an import or export writes its model, and what an import prints about it."""

from __future__ import annotations

from pathlib import Path

from lotlip.core.files import ForeignFileError, check_free, check_replaceable
from lotlip.models.configuration import LotlipConfig
from lotlip.models.vision.spec import ImageTowerSpec


def describe(config: LotlipConfig) -> list[str]:
    """One line for each part of an imported model."""
    text, image = config.text_config, ImageTowerSpec.from_json(config.image_config)
    words = text.vocab_size - config.corner_tokens - config.register_tokens
    size = f"{text.num_hidden_layers} layers, {text.hidden_size} wide, {text.num_attention_heads} heads"
    tables = f"{text.max_position_embeddings} positions"
    # OpenAI's layout does not show it
    activation = f", {text.hidden_act}" if text.model_type == "clip_text_model" else ""
    if types := getattr(text, "type_vocab_size", None):
        tables += f", {types} token types"
    return [
        f"text tower: {text.model_type}, {size}, feed-forward width {text.intermediate_size}{activation}, {tables}",
        f"vocabulary: {words} words and {config.corner_tokens} corner tokens; texts of {config.context_length} tokens",
        f"image tower: {image.model}, {image.image_size} pixels, {config.embed_dim}-dimensional features",
    ]


def check_out(out: Path, inputs: list[Path], force: bool) -> None:
    """Checks that an import or export may write a folder.

    Args:
        out: the folder.
        inputs: files and folders that are read.
        force: whether a model of this project in `out` may be replaced.

    Raises:
        ValueError: it may not.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder that does not exist yet")
    inside = [path for path in inputs if path.is_relative_to(out.resolve()) and path.exists()]
    if inside:  # the folder is replaced as a whole
        raise ValueError(f"--out {out} contains the input {inside[0]}; name another folder")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {out} is not empty; name another folder, or use --force to replace a model that this command wrote"
        )
    try:
        check_replaceable(out.resolve())
    except ForeignFileError as error:
        raise ForeignFileError(f"--out {out} cannot be replaced: {error}") from error
    check_free(out.resolve() / "config.json", lambda _: True)
