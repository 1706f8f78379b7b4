"""The gate after the image-tower stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lotlip.core.checks import Check, in_percent, one_value, run_gate
from lotlip.image_tower.config import ImageTowerConfig, SceneTowerConfig


def gate_image_tower(
    settings: ImageTowerConfig, accuracy: Mapping[str, float], features: np.ndarray, report: Path
) -> list[Check]:
    """Checks that features differ between images, and that the demo's tower has learned the attributes.

    Args:
        settings: the stage's settings.
        accuracy: attribute → accuracy on held-out scenes; empty for a tower that was not trained here.
        features: features of a few different images, [n, D].
        report: scratch folder.
    """
    spread = float(features.std(axis=0).max()) if np.isfinite(features).all() else None
    stage: dict[str, Any] = {"stage": "image_tower", "not_finite": int((~np.isfinite(features)).sum())}
    checks = [
        one_value("not_finite", "features have no NaN or infinity", high=0),
        one_value("spread", "features differ from image to image (largest standard deviation is above 0)", low=1e-6),
    ]
    if isinstance(settings, SceneTowerConfig):
        stage["accuracy"] = float(np.mean(list(accuracy.values()))) if accuracy else None
        detail = ", ".join(f"{name} {in_percent(value)}" for name, value in accuracy.items())
        what = f"mean accuracy over attributes is at least {in_percent(settings.min_accuracy)}"
        checks.append(
            one_value(
                "accuracy", what, low=settings.min_accuracy, percent=True, detail=detail, key="image_tower.min_accuracy"
            )
        )
    table = pd.DataFrame([{**stage, "spread": spread}])
    return run_gate("image_tower", {"stage": table}, {"stage": checks}, report)
