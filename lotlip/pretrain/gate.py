"""The gate after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lotlip.core.checks import Check, each_value, in_percent, one_value, run_gate


def gate_pretrain(
    seeds: Sequence[int], limit: float, history: pd.DataFrame, chance_loss: float, report: Path
) -> list[Check]:
    """Checks that every logged step is valid, and that training has reduced the loss.

    Args:
        seeds: the configured seeds.
        limit: `compute.training.max_final_loss_share`.
        history: columns seed, step, loss, temperature, learning_rate, samples_per_second; one row per logged step.
        chance_loss: loss of guessing.
        report: scratch folder.
    """
    places = zip(history["seed"], history["step"], strict=True)
    steps = history.assign(place=[f"seed {seed} step {step}" for seed, step in places])
    steps["not_finite"] = (~np.isfinite(history[["loss", "temperature"]].astype(float))).sum(axis=1)
    steps["advance"] = history.groupby("seed")["step"].diff()
    trained = [seed for seed in seeds if (history["seed"] == seed).any()]
    final = [_final_loss(history.loc[history["seed"] == seed, "loss"]) / chance_loss for seed in trained]
    shares = pd.DataFrame({"seed": [f"seed {seed}" for seed in trained], "final_share": final})
    tables = {
        "stage": pd.DataFrame([{"stage": "pretrain", "untrained": len(seeds) - len(trained)}]),
        "steps": steps[["place", "not_finite", "advance", "temperature"]],
        "seeds": shares,
    }
    lowest = f"mean loss of a seed's last 10 % of rows is at most {in_percent(limit)} of guessing's ({chance_loss:.4g})"
    suites = {
        "stage": [one_value("untrained", "every seed has a curve", high=0)],
        "steps": [
            each_value("not_finite", "loss and temperature are numbers at every step", high=0),
            each_value("advance", "steps go up", low=1),
            each_value("temperature", "the temperature is above 0 and at most 100", np.nextafter(0, 1), 100),
        ],
        "seeds": [
            each_value("final_share", lowest, high=limit, percent=True, key="compute.training.max_final_loss_share")
        ],
    }
    return run_gate("pretrain", tables, suites, report)


def _final_loss(losses: pd.Series) -> float:
    return float(losses.tail(max(len(losses) // 10, 1)).mean())
