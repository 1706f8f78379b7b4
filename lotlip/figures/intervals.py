"""How sure a number is: over seeds where there are several, over pictures where there is one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
OVER_SEEDS = "±: half of the 95 % t interval over seeds (degrees of freedom: one fewer than seeds)."
OVER_PICTURES = "Brackets: 95 % bootstrap interval of a single seed, over pictures."


@dataclass(frozen=True)
class Estimate:
    """A value and how sure it is.

    Attributes:
        value: of the one seed, or the mean of several.
        low, high: ends of the 95 % confidence interval; None where there is none.
        spread: standard deviation over seeds; None where there is one seed.
    """

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None

    @property
    def half(self) -> float:
        """Of the interval's length; 0 where there is none."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Sequence[float], alone: tuple[float | None, float | None] | None = None) -> Estimate:
    """The mean of a value for each seed, with its t interval; of one seed, `alone` is its interval."""
    if len(values) == 1:
        return Estimate(values[0], *(alone or (None, None)))
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = half_t_interval(spread, len(values))
    return Estimate(mean, mean - half, mean + half, spread)


def half_t_interval(spread: float, count: int) -> float:
    """Half of the length of a mean's 95 % t interval.

    Args:
        spread: sample standard deviation.
        count: of values, 2 at least.
    """
    from scipy.special import stdtrit  # t's quantiles; scipy.stats has them too, and takes a second to import

    return float(stdtrit(count - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(count)
