"""Saves and loads models in the Hugging Face layout: configuration, weights, processor and model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from lotlip.core.files import atomic_write, read_json
from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.data.text import as_sentence_ends
from lotlip.data.tokenizer import TextTokenizer, saved_sentence_ends
from lotlip.data.weights import check_finite, check_weights, read_weights
from lotlip.models.card import model_card
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.processing import LotlipProcessor

_LISTED = 5  # of wrong weights


def save_model(
    config: LotlipConfig,
    weights: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    folder: Path,
    image_tower: Path | None,
) -> None:
    """Writes a self-contained model: processor, both towers and card.

    Args:
        config: the model's configuration.
        weights: trained weights, fp32.
        tokenizer: the model's tokenizer.
        folder: where to write.
        image_tower: folder of the frozen tower, written by `save_image_tower`; None if `weights` include the tower.
    """
    frozen = read_weights(image_tower / "model.safetensors") if image_tower else {}
    image = {f"image.{name}": weight for name, weight in frozen.items()}
    # a trained module may be in bf16, and its config would then make readers round the fp32 weights
    with without_progress_bars():
        LotlipModel(config, image_tower=False).save_pretrained(folder, state_dict={**image, **weights})
    LotlipProcessor.build(tokenizer, config).save_pretrained(folder)


def save_whole_model(model: LotlipModel, tokenizer: TextTokenizer, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Writes a model with both towers; the folder appears only when it is complete.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: where to write.
        provenance: origin of the weights, for the model card; entries that the model has already are kept.
    """
    config = copy(model.config)
    config.provenance = {**provenance, **(config.provenance or {})}
    with atomic_write(folder) as partial:
        partial.mkdir()
        save_model(config, model.state_dict(), tokenizer, partial, image_tower=None)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disables the progress bars of transformers, which suit files of many GB, and restores them afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Disables the warnings of transformers, and restores them afterwards."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def wrong_weights(info: Mapping[str, Any]) -> str:
    """Lists what `from_pretrained` reports as missing, left over or of another shape; empty if all weights fit."""
    parts = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # a mismatched one comes with its shapes
        names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        if names:
            parts.append(f"{kind.replace('_', ' ')}: {', '.join(names[:_LISTED])}{more}")
    return "; ".join(parts)


def load_model(folder: Path) -> tuple[LotlipModel, TextTokenizer]:
    """Loads a saved model in evaluation mode and fp32, whatever precision it was saved in, and its tokenizer.

    Raises:
        ValueError: the folder has no model; its configuration is not valid; weights are missing, unexpected, of another
            shape, damaged or not finite; or the configuration and the tokenizer split sentences differently.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model: config.json is missing")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != LotlipConfig.model_type:
        raise ValueError(f"{folder} has a model of type {kind!r}, not a {LotlipConfig.model_type} model")
    check_weights(folder)
    options: dict[str, Any] = {"weights_only": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with without_progress_bars(), without_warnings():  # what they say is in the error below
            loaded: Any = LotlipModel.from_pretrained(
                folder, trust_remote_code=False, ignore_mismatched_sizes=True, **options
            )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers and torch raise many types on a value that a configuration cannot have
        reason = shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …")
        raise ValueError(
            f"the model in {folder} cannot be built from its config.json, or its weights cannot be read ({reason}); "
            "restore the files of one model"
        ) from error
    model, info = loaded
    if wrong := wrong_weights(info):
        raise ValueError(f"the weights in {folder} do not fit its config.json: {wrong}; restore the files of one model")
    check_finite(model.named_parameters(), f"in {folder}")
    config = model.config
    ends = as_sentence_ends(config.sentence_ends, str(folder / "config.json"))
    tokenizer = open_tokenizer(str(folder), config.context_length, config.corner_tokens, config.register_tokens, ends)
    saved = saved_sentence_ends(folder)
    if saved not in (None, ends):
        raise ValueError(
            f"{folder}: sentence_ends is {ends!r} in config.json, but tokenizer.json splits sentences as {saved!r}; "
            "restore both files of the same model"
        )
    return model.eval(), tokenizer


def copy_with_provenance(folder: Path, out: Path, entries: Mapping[str, Any]) -> None:
    """Copies a saved model and adds entries to its provenance, such as its scores. The weights do not change."""
    shutil.copytree(folder, out)
    config = LotlipConfig.from_pretrained(folder, trust_remote_code=False)
    config.provenance = {**(config.provenance or {}), **entries}
    config.save_pretrained(out)
    (out / "README.md").write_text(model_card(config), encoding="utf-8")
