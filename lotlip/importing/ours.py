"""Starting models that are models of this project."""

from __future__ import annotations

from pathlib import Path

from lotlip.importing.start import StartingModel
from lotlip.models.saving import load_model


def open_start(folder: Path) -> StartingModel:
    """Opens a saved model.

    Raises:
        ValueError: see `load_model`.
    """
    model, tokenizer = load_model(folder)
    return StartingModel(str(folder), model.config, tokenizer, model.state_dict)
