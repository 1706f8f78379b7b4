"""A saved tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lotlip.core.files import read_json
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import save_model
from tests.conftest import TEXT


def save_tiny_model(folder: Path, image_tower: Path, seed: int = 1, **changes: Any) -> Path:
    """Writes a model with the tiny image tower and a random text tower, and returns its folder."""
    config = LotlipConfig(
        text_config={**TEXT, "vocab_size": 30524},
        image_config=read_json(image_tower / "config.json"),
        **{"embed_dim": 32, "context_length": 32, **changes},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = LotlipModel(config, image_tower=False).state_dict()
    save_model(config, weights, TextTokenizer("bert-base-uncased", 32, 2), folder, image_tower)
    return folder
