"""The parity cases: tiny models in the layout of the authors' checkpoints, and results of the released code."""

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
    """Weights under the authors' names; embeddings of unused words are zero."""
    with np.load(PARITY / case / "weights.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def write_checkpoint(case: str, folder: Path) -> Path:
    """Writes `model.pt` in the authors' format."""
    torch.save({"epoch": 1, "name": "parity", "state_dict": state_dict(case)}, folder / "model.pt")
    return folder / "model.pt"


def write_text_config(case: str, folder: Path, **more: Any) -> Path:
    """Writes the sizes of the case's text encoder."""
    text = json.loads((PARITY / case / "case.json").read_text())["text"]
    (folder / "text.json").write_text(json.dumps({**text, **more}))
    return folder / "text.json"
