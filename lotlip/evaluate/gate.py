"""The gate after evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import pandas as pd

from lotlip.core.checks import Check, each_value, in_percent, one_value, run_gate
from lotlip.evaluate.config import EvaluateConfig
from lotlip.evaluate.score_names import MAIN

_LOSS_KEY = "evaluate.max_short_text_loss"
# Metrics that must exceed chance: the first of these families that a benchmark has.
_CHANCE_FAMILIES = ("short", "long", "classification")


def gate_evaluate(
    settings: EvaluateConfig,
    scores: pd.DataFrame,
    report: Path,
    start: Mapping[str, float] | None = None,
    learns_short: bool = True,
) -> list[Check]:
    """Checks that scores are fractions, that each benchmark's scores exceed chance, and that short texts still match.

    Short-text retrieval is compared with chance, because every working model that trains on short captions has learned
    it. Benchmarks without short texts, and models that train on long captions only, use long texts or classification.
    Such a model is not compared on a benchmark of short texts only.

    Args:
        settings: settings of the stage.
        scores: columns benchmark, seed, metric, value, chance; a row per score.
        report: scratch folder.
        start: benchmark → short-text R@1, the mean of both directions, of the model that training started from; used if
            `settings.max_short_text_loss` is set. None: training did not start from it.
        learns_short: whether the model was trained on short captions.

    Raises:
        GateFailed: a check fails.
        ValueError: a benchmark with short texts is not in `start`.
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
    families = _CHANCE_FAMILIES if learns_short else _CHANCE_FAMILIES[1:]
    metrics = {str(name): set(rows["metric"]) for name, rows in scores.groupby("benchmark")}
    compared = {name: _metrics_over_chance(found, families) for name, found in metrics.items()}
    pairs = zip(scores["benchmark"], scores["metric"], strict=True)
    over_chance = named[np.array([metric in compared[benchmark] for benchmark, metric in pairs], dtype=bool)]
    unmeasured = [name for name, found in metrics.items() if not _metrics_over_chance(found, _CHANCE_FAMILIES)]
    minimum = settings.min_score_over_chance
    which = "short text (or of long, or top-1)" if learns_short else "long text (or top-1)"
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
                f"R@1 of {which} is at least {minimum:g} times chance",
                minimum,
                key="evaluate.min_score_over_chance",
            )
        ],
    }
    limit = settings.max_short_text_loss
    if limit is not None and start is not None:
        tables["short_text_loss"] = losses = _short_text_losses(scores, start)
        tables["compared"] = pd.DataFrame([{"stage": "evaluate", "compared": len(losses)}])
        suites["compared"] = [
            one_value(
                "compared",
                "a benchmark has short texts to compare with the start; add one, or set the limit to null",
                low=1,
                key=_LOSS_KEY,
            )
        ]
        suites["short_text_loss"] = [
            each_value(
                "loss",
                f"R@1 of short text (mean of both directions) is at most {in_percent(limit)} below the start's; "
                "otherwise give short texts a larger share of the loss, lower the learning rate or train fewer steps",
                high=limit,
                percent=True,
                key=_LOSS_KEY,
            )
        ]
    return run_gate("evaluate", tables, suites, report)


def _short_text_losses(scores: pd.DataFrame, start: Mapping[str, float]) -> pd.DataFrame:
    """Returns a row for each benchmark and seed: both scores in words, and the share of the start's that is lost."""
    rows = []
    short = scores[scores["metric"].isin(MAIN["short"])]
    means = short.groupby(["benchmark", "seed"], as_index=False)["value"].mean()
    for benchmark, seed, trained in zip(means["benchmark"], means["seed"], means["value"], strict=True):
        if benchmark not in start:
            raise ValueError(
                f"benchmark {benchmark}: the scores of `start` do not include it; run `dvc repro baselines` first"
            )
        before = start[benchmark]
        model = f"{benchmark} seed {seed}: R@1 {in_percent(trained)}, start {in_percent(before)}"
        # rounded, because a loss equal to the limit must pass
        rows.append({"model": model, "loss": round(1 - trained / before, 9) if before else 0.0})
    return pd.DataFrame(rows, columns=["model", "loss"])


def _metrics_over_chance(metrics: Set[str], families: Sequence[str]) -> Sequence[str]:
    """Selects the metrics of a benchmark that must exceed chance: those of its first family."""
    return next((MAIN[family] for family in families if metrics & set(MAIN[family])), ())
