"""The three numbers by which ablations are compared: long retrieval, short retrieval, classification."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lotlip.evaluate.score_names import MAIN
from lotlip.figures.intervals import Estimate, estimate
from lotlip.report.inputs import Ablation, Benchmark

NOTE = "Retrieval: the mean of R@1 image → text and text → image; classification: top-1."


@dataclass(frozen=True)
class Measure:
    """The mean of some metrics, in percent.

    Attributes:
        slug: its name in files.
        label: its name for a person.
        metrics: whose mean it is; a benchmark has it that has all of them.
    """

    slug: str
    label: str
    metrics: tuple[str, ...]

    def seeds(self, ablation: Ablation, benchmarks: Sequence[str]) -> dict[int, float]:
        """Seed → percent, the mean over `benchmarks`, for the seeds that have a number on all of them."""
        results = [ablation.benchmarks[name] for name in benchmarks]
        found = {}
        for seed in sorted(set.intersection(*(set(result.seeds) for result in results)) if results else ()):
            values = [result.seeds[seed].get(metric, math.nan) for result in results for metric in self.metrics]
            if not any(math.isnan(value) for value in values):
                found[seed] = 100 * statistics.fmean(values)
        return found

    def estimate(self, ablation: Ablation, benchmark: str) -> Estimate | None:
        """In percent on one benchmark, with its interval; None where that has no number.

        A lone seed's interval is the mean of its metrics' bootstrap intervals, which is no shorter than their mean's.
        """
        if benchmark not in ablation.benchmarks:
            return None
        values = list(self.seeds(ablation, [benchmark]).values())
        return estimate(values, self._interval(ablation.benchmarks[benchmark])) if values else None

    def _interval(self, result: Benchmark) -> tuple[float, float] | None:
        """Of a lone seed's mean, in percent."""
        found = [interval for metric in self.metrics if (interval := result.interval(metric))]
        if len(found) < len(self.metrics):
            return None
        low, high = (100 * statistics.fmean(ends) for ends in zip(*found, strict=True))
        return low, high

    def benchmarks(self, ablations: Sequence[Ablation]) -> list[str]:
        """Those that have the measure for all of the ablations, in the first one's order."""

        def has(ablation: Ablation, benchmark: str) -> bool:
            result = ablation.benchmarks.get(benchmark)
            return result is not None and any(set(self.metrics) <= set(values) for values in result.seeds.values())

        return [name for a in ablations[:1] for name in a.benchmarks if all(has(one, name) for one in ablations)]


LONG = Measure("long", "long text", MAIN["long"])
SHORT = Measure("short", "short text", MAIN["short"])
TOP1 = Measure("classification", "classification", MAIN["classification"])
MEASURES = (LONG, SHORT, TOP1)
