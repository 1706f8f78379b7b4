"""The measures that ablations are compared by: long-text retrieval, short-text retrieval, classification."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lotlip.evaluate.score_names import MAIN, RECALLS
from lotlip.figures.intervals import Estimate, estimate
from lotlip.report.inputs import Ablation, BenchmarkResult

NOTE = "Retrieval: the mean of R@1 image → text and text → image; classification: top-1."


@dataclass(frozen=True)
class Measure:
    """The mean of some metrics, in percent.

    Attributes:
        slug: name in files.
        label: name in the report.
        metrics: the metrics averaged. A benchmark without all of them does not have the measure.
    """

    slug: str
    label: str
    metrics: tuple[str, ...]

    def seeds(self, ablation: Ablation, benchmarks: Sequence[str]) -> dict[int, float]:
        """Returns seed → mean over `benchmarks` in percent, for the seeds with values on all of them."""
        return self.means([ablation.benchmarks[name] for name in benchmarks])

    def means(self, results: Sequence[BenchmarkResult]) -> dict[int, float]:
        """Returns seed → mean over results in percent, for the seeds with values in all of them."""
        means = {}
        for seed in sorted(set.intersection(*(set(result.seeds) for result in results)) if results else ()):
            values = [result.seeds[seed].get(metric, math.nan) for result in results for metric in self.metrics]
            if not any(math.isnan(value) for value in values):
                means[seed] = 100 * statistics.fmean(values)
        return means

    def estimate(self, ablation: Ablation, benchmark: str) -> Estimate | None:
        """Returns the measure on one benchmark in percent, with its interval; None if there is no value.

        The interval of a single seed is the mean of its metrics' bootstrap intervals. It is at least as long as the
        bootstrap interval of their mean.
        """
        if benchmark not in ablation.benchmarks:
            return None
        values = list(self.seeds(ablation, [benchmark]).values())
        return estimate(values, self._interval(ablation.benchmarks[benchmark])) if values else None

    def _interval(self, result: BenchmarkResult) -> tuple[float, float] | None:
        """The interval of a single seed, in percent."""
        intervals = [interval for metric in self.metrics if (interval := result.interval(metric))]
        if len(intervals) < len(self.metrics):
            return None
        low, high = (100 * statistics.fmean(bounds) for bounds in zip(*intervals, strict=True))
        return low, high

    def has(self, result: BenchmarkResult) -> bool:
        """Whether a seed has all metrics on a benchmark; one without classes has no top-1 accuracy."""
        return any(set(self.metrics) <= set(values) for values in result.seeds.values())

    def benchmarks(self, ablations: Sequence[Ablation]) -> list[str]:
        """Returns the benchmarks that have the measure for all ablations, in the order of the first ablation."""

        def has(ablation: Ablation, benchmark: str) -> bool:
            result = ablation.benchmarks.get(benchmark)
            return result is not None and self.has(result)

        return [name for a in ablations[:1] for name in a.benchmarks if all(has(one, name) for one in ablations)]


LONG = Measure("long", "long text", MAIN["long"])
SHORT = Measure("short", "short text", MAIN["short"])
TOP1 = Measure("classification", "classification", MAIN["classification"])
RECALL = Measure("recall", "long and short text", RECALLS)
MEASURES = (LONG, SHORT, TOP1)
