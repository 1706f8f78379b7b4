"""The captioner's benchmark runs, and tells of both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads() -> Iterator[int]:
    """As many as torch has; the benchmark sets them for its process."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.integration
def test_both_ways_write_the_same_and_are_measured(threads):
    from benchmarks.caption import measure, table

    measured = measure(model=None, images=6, batch=3, tokens=4, threads=threads, rounds=1)
    assert set(measured["images_per_second"]) == set(measured["tokens_per_second"]) == {"ours", "loop"}
    assert measured["ours_over_loop"] > 0
    assert 1 <= measured["tokens_per_image"] <= 4
    assert all(f"| {way} |" in table(measured) for way in ("ours", "loop"))
