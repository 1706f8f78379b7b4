"""Published scores, shown next to measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lotlip.evaluate.score_names import Metric

SOURCE = "published in the README of the method's authors' release; zero-shot, not measured here"


@dataclass(frozen=True)
class Reference:
    """The published scores of one model.

    Attributes:
        model: name, and number of training images.
        scores: benchmark → metric, as in `Scores` → fraction from 0 to 1.
    """

    model: str
    scores: Mapping[str, Mapping[str, float]]


def _reference(model: str, **percent: tuple[float, float]) -> Reference:
    """Builds a reference from R@1 in percent (image → text, text → image) by benchmark, with `_` for `-` in names."""
    scores: dict[str, dict[str, float]] = {
        benchmark.replace("_", "-"): {
            Metric.LONG_IMAGE_TO_TEXT_R1: round(to_text / 100, 4),
            Metric.LONG_TEXT_TO_IMAGE_R1: round(to_image / 100, 4),
        }
        for benchmark, (to_text, to_image) in percent.items()
    }
    return Reference(model, scores)


REFERENCE: tuple[Reference, ...] = (
    _reference(
        "CLIP B/32, 400M",
        dci=(43.06, 40.32),
        iiw=(86.76, 84.15),
        sharegpt4v_10k=(58.08, 51.77),
        urban_1k=(60.90, 47.00),
    ),
    _reference(
        "CLIP B/16, 400M",
        dci=(45.45, 43.01),
        iiw=(88.24, 87.58),
        sharegpt4v_10k=(60.22, 56.16),
        urban_1k=(67.10, 52.9),
    ),
    _reference(
        "Long-CLIP B/16, 400M",
        dci=(51.68, 57.28),
        iiw=(89.61, 93.20),
        sharegpt4v_10k=(79.24, 77.06),
        urban_1k=(78.90, 79.50),
    ),
    _reference(
        "LoTLIP B/32, 100M",
        dci=(59.90, 56.36),
        iiw=(93.14, 91.83),
        sharegpt4v_10k=(83.76, 78.97),
        urban_1k=(84.10, 81.80),
    ),
    _reference(
        "LoTLIP B/16, 100M",
        dci=(64.11, 62.63),
        iiw=(94.28, 92.65),
        sharegpt4v_10k=(88.40, 82.72),
        urban_1k=(88.80, 84.80),
    ),
)
