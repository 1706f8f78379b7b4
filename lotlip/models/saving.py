"""Folders in Hugging Face layout: configuration, weights, processor and model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

from lotlip.core.files import read_json
from lotlip.data.text import as_sentence_ends
from lotlip.data.tokenizer import TextTokenizer, saved_sentence_ends
from lotlip.data.weights import check_finite, check_weights, read_weights
from lotlip.models.card import model_card
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.processing import LotlipProcessor


def save_model(
    config: LotlipConfig,
    weights: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    folder: Path,
    image_tower: Path | None,
) -> None:
    """Writes a whole model, which needs nothing else: processor, both towers, card.

    Args:
        config: of the model.
        weights: as trained, fp32.
        tokenizer: of the model.
        folder: where to write.
        image_tower: folder of the frozen tower, as `save_image_tower` left it, when its weights are not in `weights`.
    """
    frozen = read_weights(image_tower / "model.safetensors") if image_tower else {}
    image = {f"image.{name}": weight for name, weight in frozen.items()}
    # a trained module may be rounded to bf16, and its config would tell readers to round the weights, too
    with without_bars():
        LotlipModel(config, image_tower=False).save_pretrained(folder, state_dict={**image, **weights})
    LotlipProcessor.build(tokenizer, config).save_pretrained(folder)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers' progress bars are for files of many GB; whoever wants them elsewhere keeps them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(folder: Path) -> tuple[LotlipModel, TextTokenizer]:
    """A saved model, ready to evaluate, and its tokenizer.

    Raises:
        ValueError: the folder has no model, weights are missing in it, left over, damaged or not finite, or its
            configuration and its tokenizer split sentences differently.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model: config.json is not there")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != LotlipConfig.model_type:
        raise ValueError(f"{folder} has a model of type {kind!r}, not a {LotlipConfig.model_type} model")
    check_weights(folder)
    with without_bars():
        loaded: Any = LotlipModel.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False, weights_only=True
        )
    model, info = loaded
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"{folder} does not hold this model's weights: {wrong}")
    check_finite(model.named_parameters(), f"in {folder}")
    config = model.config
    ends = as_sentence_ends(config.sentence_ends, str(folder / "config.json"))
    tokenizer = TextTokenizer(str(folder), config.context_length, config.corner_tokens, config.register_tokens, ends)
    saved = saved_sentence_ends(folder)
    if saved not in (None, ends):
        raise ValueError(
            f"{folder}: sentence_ends is {ends!r} in config.json, but tokenizer.json splits sentences as {saved!r}; "
            "restore the two files of one model"
        )
    return model.eval(), tokenizer


def copy_with_provenance(folder: Path, out: Path, more: Mapping[str, Any]) -> None:
    """Copies a saved model and tells more of where it comes from, such as its scores; weights stay as they are."""
    shutil.copytree(folder, out)
    config = LotlipConfig.from_pretrained(folder, trust_remote_code=False)
    config.provenance = {**(config.provenance or {}), **more}
    config.save_pretrained(out)
    (out / "README.md").write_text(model_card(config), encoding="utf-8")
