"""Training on a subset of the images: nested subsets of an exact size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.order import ExactOrder, ResampledOrder, subset_counts

counts = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(np.array)


@pytest.mark.slow
@given(counts=counts, data=st.data())
def test_subsets_have_the_exact_size_and_are_nested(counts: Any, data: Any) -> None:
    total = int(counts.sum())
    small = data.draw(st.integers(1, total))
    large = data.draw(st.integers(small, total))
    first, second = subset_counts(counts, small), subset_counts(counts, large)
    assert (first.sum(), second.sum()) == (small, large)
    assert (first <= second).all()
    assert (second <= counts).all()


def test_a_fraction_is_spread_over_the_shards() -> None:
    equal = np.full(100, 1000)
    counts = subset_counts(equal, 0.125)
    assert counts.sum() == 12_500
    assert set(counts.tolist()) <= {124, 125, 126}
    assert subset_counts(equal, 1e-9).sum() == 1
    assert subset_counts(equal, None) is equal


def test_more_samples_than_available_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"pretrain\.samples is 11, but the shards have 10 training samples"):
        subset_counts(np.array([4, 6]), 11)


class Shards:
    """Three shards with keys."""

    counts = (5, 3, 8)

    def __getitem__(self, number: int) -> Any:
        import pyarrow as pa

        return type("Tar", (), {"keys": pa.array([f"k{number}/{row}" for row in range(self.counts[number])])})()


@pytest.mark.parametrize("resampled", [False, True])
def test_an_epoch_has_samples_of_the_subset_only(resampled: bool) -> None:
    shards: Any = Shards()
    counts = subset_counts(np.array(shards.counts), 6)
    order = ResampledOrder(shards, 0, 600, {"k0": 2.0}, 6) if resampled else ExactOrder(shards, 0, 6)
    samples = [(at.shard, at.row) for epoch in range(2) for at in order.locations(epoch, 0, order.samples)]
    expected = {(shard, row) for shard, number in enumerate(counts) for row in range(number)}
    assert set(samples) == expected
    if not resampled:
        assert order.samples == 6
        assert sorted(samples) == sorted([*expected, *expected])


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0])
def test_invalid_sizes_are_errors(value: float) -> None:
    with pytest.raises(ValueError, match="samples"):
        PretrainConfig(samples=value)
    assert PretrainConfig(samples=0.5).samples == 0.5
    assert PretrainConfig(samples=1).samples == 1
