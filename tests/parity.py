"""The parity vectors: tiny models laid out as the authors' checkpoints, and what the released code makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lotlip.models.vision.spec import ImageTowerSpec

PARITY = Path(__file__).parent / "data" / "parity"
IMAGE_TOWER = ImageTowerSpec("test_vit", 160)


def state_dict(case: str) -> dict[str, Tensor]:
    """Weights by the authors' names; word embeddings that no caption uses are zero."""
    with np.load(PARITY / case / "weights.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def write_checkpoint(case: str, folder: Path) -> Path:
    """Writes `model.pt` as the authors do."""
    torch.save({"epoch": 1, "name": "parity", "state_dict": state_dict(case)}, folder / "model.pt")
    return folder / "model.pt"


def write_text_config(case: str, folder: Path, **more: Any) -> Path:
    """Writes the text encoder's sizes, as the vectors come with them."""
    text = json.loads((PARITY / case / "case.json").read_text())["text"]
    (folder / "text.json").write_text(json.dumps({**text, **more}))
    return folder / "text.json"
