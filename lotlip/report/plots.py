"""Tables for `dvc plots show` (see `plots` in dvc.yaml): training curves, and main scores of all models."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from lotlip.evaluate.score_names import Metric
from lotlip.report.inputs import ReportInputs
from lotlip.report.results import baseline_label, main_metrics, metric_names

CURVES = ("loss", "in_batch_recall")


def write_plots(inputs: ReportInputs, out: Path) -> None:
    """Writes `curves.csv`, a row per ablation, seed and step, and `scores.csv`, a row per model and metric.

    Scores are means over seeds, in percent.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write(
        out / "curves.csv",
        ("ablation", "seed", "step", *CURVES),
        (
            (ablation.name, seed, int(point["step"]), *(point.get(name, "") for name in CURVES))
            for ablation in inputs.ablations
            for seed, history in ablation.history.items()
            for point in history
        ),
    )
    baselines = [
        (baseline_label(baseline.model), f"{benchmark}.{metric}", round(100 * result.scores[metric], 4))
        for baseline in inputs.baselines
        for benchmark, result in baseline.benchmarks.items()
        for metric in main_metrics(Metric)
        if metric in result.scores
    ]
    _write(
        out / "scores.csv",
        ("ablation", "metric", "percent"),
        [
            *(
                (ablation.name, f"{benchmark}.{metric}", round(100 * fmean(values), 4))
                for ablation in inputs.ablations
                for benchmark, result in ablation.benchmarks.items()
                for metric in main_metrics(metric_names([ablation], benchmark))
                if (values := result.values(metric))
            ),
            *baselines,
        ],
    )


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
