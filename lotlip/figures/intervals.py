"""Confidence intervals: over seeds if there are several, else over images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
OVER_SEEDS = "±: half of the 95 % t interval over seeds (degrees of freedom: number of seeds minus 1)."
OVER_IMAGES = "Brackets: 95 % bootstrap interval of a single seed, over images."


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value: the value of a single seed, or the mean of several.
        low, high: bounds of the 95 % confidence interval; None if there is none.
        spread: standard deviation over seeds; None for a single seed.
    """

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None

    @property
    def half(self) -> float:
        """Half the length of the interval; 0 if there is none."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Sequence[float], single: tuple[float | None, float | None] | None = None) -> Estimate:
    """Returns the mean over seeds with its t interval; for a single seed, the value with the interval `single`."""
    if len(values) == 1:
        return Estimate(values[0], *(single or (None, None)))
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = half_t_interval(spread, len(values))
    return Estimate(mean, mean - half, mean + half, spread)


def half_t_interval(spread: float, count: int) -> float:
    """Returns half the length of a mean's 95 % t interval.

    Args:
        spread: sample standard deviation.
        count: number of values, at least 2.
    """
    from scipy.special import stdtrit  # the t distribution's quantiles; scipy.stats takes a second to import

    return float(stdtrit(count - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(count)
