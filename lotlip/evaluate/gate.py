"""The gate after evaluation."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import pandas as pd

from lotlip.core.checks import Check, each_value, one_value, run_gate
from lotlip.evaluate.config import EvaluateConfig
from lotlip.evaluate.score_names import MAIN

# Metrics that must exceed chance: the first of these families that a benchmark has.
_CHANCE_FAMILIES = (MAIN["short"], MAIN["long"], MAIN["classification"])


def gate_evaluate(settings: EvaluateConfig, scores: pd.DataFrame, report: Path) -> list[Check]:
    """Checks that scores are fractions and that each benchmark's scores exceed chance.

    Short-text retrieval is compared with chance, because every working model has learned it. Benchmarks without short
    texts use long texts or classification.

    Args:
        settings: settings of the stage.
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
    compared = {name: _metrics_over_chance(set(rows["metric"])) for name, rows in scores.groupby("benchmark")}
    pairs = zip(scores["benchmark"], scores["metric"], strict=True)
    over_chance = named[np.array([metric in compared[benchmark] for benchmark, metric in pairs], dtype=bool)]
    unmeasured = [str(name) for name, metrics in compared.items() if not metrics]
    minimum = settings.min_score_over_chance
    tables = {
        "stage": pd.DataFrame([{"stage": "evaluate", "scores": len(scores), "unmeasured": len(unmeasured)}]),
        "scores": named,
        "over_chance": over_chance,
    }
    suites = {
        "stage": [
            one_value("scores", "there are scores", low=1),
            one_value("unmeasured", "every benchmark has R@1 or top-1 accuracy", high=0, detail=", ".join(unmeasured)),
        ],
        "scores": [
            each_value("unknown", "every score is a number", high=0),
            each_value("value", "every score is from 0 to 1", 0, 1),
        ],
        "over_chance": [
            each_value(
                "over_chance",
                f"R@1 of short text (or of long, or top-1) is at least {minimum:g} times chance",
                minimum,
                key="evaluate.min_score_over_chance",
            )
        ],
    }
    return run_gate("evaluate", tables, suites, report)


def _metrics_over_chance(metrics: Set[str]) -> Sequence[str]:
    """Selects the metrics of a benchmark that must exceed chance."""
    return next((family for family in _CHANCE_FAMILIES if metrics & set(family)), ())
