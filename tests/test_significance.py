"""Paired t tests, Holm's correction and power: values computed by hand, and by integrals written out here."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotlip.figures.intervals import estimate
from lotlip.report.significance import ALPHA, half_interval, holm, p_value, power, smallest_detectable


def test_the_p_value_of_three_seeds_has_a_closed_form():
    # with two degrees of freedom p = 1 − t / √(t² + 2); here t = (13 / 3) / (√(121 / 3) / √3) = 13 / 11
    t = 13 / 11
    assert p_value([8, 8, -3]) == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    assert p_value([-8, -8, 3]) == pytest.approx(p_value([8, 8, -3]))


def test_the_p_value_of_two_seeds_has_a_closed_form():
    # with one degree of freedom p = 1 − 2 atan(t) / π; here t = 2 / (√2 / √2) = 2
    assert p_value([1, 3]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_differences_without_spread():
    assert p_value([2.0, 2.0, 2.0]) == 0
    assert p_value([0.0, 0.0, 0.0]) == 1


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12).filter(lambda values: statistics.stdev(values) > 1e-3))
def test_p_is_below_5_percent_where_the_95_percent_interval_excludes_0(values):
    found = estimate(values)
    if min(abs(found.low), abs(found.high)) > 1e-6:
        assert (p_value(values) < ALPHA) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        # by hand: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which may not be below the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.4, 0.6, 0.9], [1.0, 1.0, 1.0]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(given_values, expected):
    assert holm(given_values) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_between_no_correction_and_bonferroni(values):
    for one, corrected in zip(values, holm(values), strict=True):
        assert one <= corrected <= min(1.0, len(values) * one) + 1e-12


def test_intervals_at_another_level():
    values = [1.0, 4.0, 2.5, 3.0]
    assert half_interval(statistics.stdev(values), 4, ALPHA) == pytest.approx(estimate(values).half)
    # t of two degrees of freedom at 99 % is 9.9248
    assert half_interval(2.0, 3, 0.01) == pytest.approx(9.9248 * 2 / math.sqrt(3), rel=1e-4)


def integrated_power(effect, count, critical):
    """P(|Z + shift| > critical × s) for a normal Z and the sample deviation s, whose square is χ² / degrees."""
    degrees, shift = count - 1, effect * math.sqrt(count)
    normal = statistics.NormalDist()
    constant = 2 ** (1 - degrees / 2) / math.gamma(degrees / 2)
    steps, longest = 40_000, math.sqrt(degrees) + 9
    total = 0.0
    for i in range(1, steps):
        chi = longest * i / steps
        bound = critical * chi / math.sqrt(degrees)
        outside = normal.cdf(shift - bound) + normal.cdf(-bound - shift)
        total += constant * chi ** (degrees - 1) * math.exp(-(chi**2) / 2) * outside
    return total * longest / steps


@pytest.mark.parametrize(
    ("count", "alpha", "critical"),
    # quantiles of the t distribution from a printed table
    [(3, 0.05, 4.30265), (10, 0.05, 2.26216), (10, 0.01, 3.24984), (20, 0.05, 2.09302)],
)
def test_power_is_the_integral(count, alpha, critical):
    for effect in (0.0, 0.5, 1.5):
        assert power(3 * effect, 3, count, alpha) == pytest.approx(integrated_power(effect, count, critical), abs=2e-5)


def test_power_of_published_examples():
    # G*Power's manual, paired t test: effect 0.5, 34 pairs, two-sided, α = 0.05 have power 0.808
    assert power(0.5, 1, 34) == pytest.approx(0.8078, abs=1e-3)
    assert smallest_detectable(1, 34) < 0.5 < smallest_detectable(1, 33)


def test_the_smallest_detectable_difference_has_the_wanted_power():
    for count in (2, 3, 10):
        for alpha in (ALPHA, ALPHA / 28):
            found = smallest_detectable(2.5, count, alpha)
            assert power(found, 2.5, count, alpha) == pytest.approx(0.8, abs=1e-6)
            assert smallest_detectable(5.0, count, alpha) == pytest.approx(2 * found)
    assert smallest_detectable(1, 10) < smallest_detectable(1, 3)
    assert smallest_detectable(1, 10) < smallest_detectable(1, 10, ALPHA / 28)
    assert smallest_detectable(0.0, 3) == 0
