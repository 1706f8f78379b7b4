"""The gate after evaluation."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import pandas as pd

from lotlip.core.checks import Check, each_value, one_value, run_gate
from lotlip.evaluate.config import EvaluateConfig
from lotlip.evaluate.score_names import MAIN

# What is held against chance of a benchmark: the first of these that it has.
TOLD_APART = (MAIN["short"], MAIN["long"], MAIN["classification"])


def gate_evaluate(settings: EvaluateConfig, scores: pd.DataFrame, report: Path) -> list[Check]:
    """Scores are shares, and each benchmark's images are told apart better than by chance.

    By short text, since a model that learned anything knows it; by long text or classes where there is no short text.

    Args:
        settings: the stage's.
        scores: columns benchmark, seed, metric, value, chance; a row per score.
        report: scratch folder.
    """
    names = zip(scores["benchmark"], scores["metric"], scores["seed"], strict=True)
    named = pd.DataFrame(
        {
            "score": [f"{benchmark} {metric} seed {seed}" for benchmark, metric, seed in names],
            "value": scores["value"].astype(float),
            "unknown": scores["value"].isna().astype(int),
            "over_chance": scores["value"] / scores["chance"],
        }
    )
    held = {name: _told_apart(set(rows["metric"])) for name, rows in scores.groupby("benchmark")}
    pairs = zip(scores["benchmark"], scores["metric"], strict=True)
    told_apart = named[np.array([metric in held[benchmark] for benchmark, metric in pairs], dtype=bool)]
    unmeasured = [str(name) for name, metrics in held.items() if not metrics]
    lowest = settings.min_score_over_chance
    tables = {
        "stage": pd.DataFrame([{"stage": "evaluate", "scores": len(scores), "unmeasured": len(unmeasured)}]),
        "scores": named,
        "told_apart": told_apart,
    }
    suites = {
        "stage": [
            one_value("scores", "something was measured", low=1),
            one_value("unmeasured", "every benchmark has R@1 or top-1 accuracy", high=0, detail=", ".join(unmeasured)),
        ],
        "scores": [
            each_value("unknown", "every score is a number", high=0),
            each_value("value", "every score is from 0 to 1", 0, 1),
        ],
        "told_apart": [
            each_value(
                "over_chance",
                f"R@1 of short text (or of long, or top-1) is at least {lowest:g} times chance",
                lowest,
                key="evaluate.min_score_over_chance",
            )
        ],
    }
    return run_gate("evaluate", tables, suites, report)


def _told_apart(metrics: Set[str]) -> Sequence[str]:
    """Which of a benchmark's metrics are held against chance."""
    return next((family for family in TOLD_APART if metrics & set(family)), ())
