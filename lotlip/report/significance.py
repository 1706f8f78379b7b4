"""Paired t tests over seeds: p values, Holm's correction, intervals at any level, power and what it can detect."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

ALPHA = 0.05  # probability of a false verdict
POWER = 0.8  # probability of detecting a difference, for which the smallest detectable difference is stated


def p_value(differences: Sequence[float], mean: float = 0.0) -> float:
    """Returns the two-sided p value of the t test that the true mean of paired differences is `mean`.

    Args:
        differences: one for each seed, at least 2.
        mean: the mean that is tested.
    """
    from scipy.special import stdtr  # the t distribution; scipy.stats takes seconds to import

    excess, spread = statistics.fmean(differences) - mean, statistics.stdev(differences)
    if spread == 0:
        return 1.0 if excess == 0 else 0.0
    return float(2 * stdtr(len(differences) - 1, -abs(excess) / spread * math.sqrt(len(differences))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values that are corrected for their number by Holm's method, in the same order.

    If each corrected value below α is a verdict, the probability of any false verdict is at most α.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def half_interval(spread: float, count: int, alpha: float) -> float:
    """Returns half the length of the 1 − α t interval of a mean.

    Args:
        spread: sample standard deviation.
        count: number of values, at least 2.
        alpha: probability that the interval misses the true mean.
    """
    return _critical(count - 1, alpha) * spread / math.sqrt(count)


def power(difference: float, spread: float, count: int, alpha: float = ALPHA) -> float:
    """Returns the probability that a two-sided paired t test finds a true difference.

    Args:
        difference: the true mean of the paired differences.
        spread: their standard deviation over seeds, above 0.
        count: number of seeds, at least 2.
        alpha: level of the test.
    """
    return _power(abs(difference) / spread, count, alpha)


def smallest_detectable(spread: float, count: int, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """Returns the smallest true difference that a two-sided paired t test finds with the wanted power.

    Args:
        spread: standard deviation of the paired differences over seeds.
        count: number of seeds, at least 2.
        alpha: level of the test.
        wanted: the power.
    """
    return spread * _smallest_effect(count, alpha, wanted)


def _critical(degrees: int, alpha: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 1 - alpha / 2))


def _power(effect: float, count: int, alpha: float) -> float:
    """Power for a difference in units of its spread: the tails of the noncentral t distribution.

    They are integrated here, because scipy's nctdtr returns NaN for some arguments in the usual range. Given the mean
    of the differences, which is normal, the test decides if their variance, which is chi-squared, is small enough.
    """
    import numpy as np
    from scipy.special import gammainc

    degrees, critical = count - 1, _critical(count - 1, alpha)
    normal = np.linspace(-9, 9, 3601)
    density = np.exp(-(normal**2) / 2) / math.sqrt(2 * math.pi)
    largest_variance = ((normal + effect * math.sqrt(count)) / critical) ** 2
    decided = gammainc(degrees / 2, degrees * largest_variance / 2)  # the chi-squared distribution
    return float((density * decided).sum() * (normal[1] - normal[0]))


@lru_cache(maxsize=4096)
def _smallest_effect(count: int, alpha: float, wanted: float) -> float:
    """The smallest difference, in units of its spread, that is found with the wanted power."""
    low, high = 0.0, 1.0
    while _power(high, count, alpha) < wanted:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _power(middle, count, alpha) < wanted else (low, middle)
    return high
