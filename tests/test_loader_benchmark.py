"""The loader's benchmark runs, and tells of every way."""

from __future__ import annotations

import pytest


@pytest.mark.integration
def test_every_way_is_measured():
    from benchmarks.loader import PAIRS, measure, table

    measured = measure(samples=48, shards=2, image_size=32, workers=0, batch=16, step_ms=1.0, rounds=1, images=True)
    ways = {way for pair in PAIRS.values() for way in pair}
    assert set(measured["samples_per_second"]) == set(measured["waiting_share"]) == ways
    assert all(rate > 0 for rate in measured["samples_per_second"].values())
    assert all(0 < share < 1 for share in measured["waiting_share"].values())
    assert set(measured["ours_over_open_clip"]) == set(PAIRS)
    assert all(f"| {way} |" in table(measured, 1.0) for way in ways)
