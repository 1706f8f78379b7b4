"""Published scores, shown next to measured ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lotlip.evaluate.score_names import MAIN

# Where a model's scores were published, unless its row names a source of its own.
README = "README of github.com/wuw2019/LoTLIP"


@dataclass(frozen=True)
class Reference:
    """The published scores of one model.

    Attributes:
        model: name, and number of training images.
        scores: benchmark → metric, as in `Scores` → fraction from 0 to 1.
        source: where they were published.
    """

    model: str
    scores: Mapping[str, Mapping[str, float]]
    source: str = README


def sources(references: Iterable[Reference]) -> str:
    """States where the scores of some models were published, each source once with its models."""
    models: dict[str, list[str]] = {}
    for reference in references:
        models.setdefault(reference.source, []).append(reference.model)
    named = "; ".join(f"{source} ({', '.join(of)})" for source, of in models.items())
    return f"zero-shot scores that were not measured here: {named}"


_SHORT = ("coco", "coco-val2017")


def _reference(model: str, source: str = README, **percent: tuple[float | None, float | None]) -> Reference:
    """Builds a reference from R@1 in percent (image → text, text → image) by benchmark, with `_` for `-` in names.

    None is a score that was not published. COCO's texts are short, the others' are long.
    """
    scores: dict[str, dict[str, float]] = {}
    for name, values in percent.items():
        benchmark = name.replace("_", "-")
        metrics = MAIN["short" if benchmark in _SHORT else "long"]
        scores[benchmark] = {
            metric: round(value / 100, 4) for metric, value in zip(metrics, values, strict=True) if value is not None
        }
    return Reference(model, scores, source)


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
    # Later methods, and LoTLIP on the benchmarks that its README does not have. Whether COCO is Karpathy's test split
    # or val2017 is known of HiMo-CLIP only, by its released script.
    _reference(
        "LoTLIP B/16, 100M, by others",
        "comparisons in later papers",
        docci=(73.2, 71.6),
        coco=(59.6, 38.1),
    ),
    _reference(
        "SmartCLIP B/16",
        "arXiv 2507.22264",
        urban_1k=(90.0, 87.4),
        dci=(64.9, 64.0),
        docci=(77.4, 78.0),
        coco=(61.9, 42.4),
    ),
    _reference(
        "HiMo-CLIP B/16",
        "arXiv 2511.06653",
        urban_1k=(89.2, 89.6),
        docci=(77.8, 79.9),
        coco_val2017=(60.6, 40.8),
    ),
    _reference("FIX-CLIP B/16, 30M", "arXiv 2507.10095", urban_1k=(90.8, None), dci=(70.7, 70.7)),
    _reference("FIX-CLIP B/16, 1M", "arXiv 2507.10095", coco=(60.9, 44.8)),
    _reference(
        "DeBias-CLIP B/16",
        "arXiv 2602.22419",
        urban_1k=(93.1, 93.0),
        dci=(68.5, 67.6),
        docci=(79.7, 80.0),
        coco=(61.3, 43.0),
    ),
    _reference("FLAIR B/16, 30M", "arXiv 2412.03561", coco=(68.0, 53.3)),
    _reference("FG-CLIP 2 B/16", "arXiv 2510.10921", dci=(64.5, 64.9), coco=(72.1, 54.5)),
)
