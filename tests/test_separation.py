"""Whether features of an image tower separate images better than pixels do."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotlip.data.index import ShardIndex, read_index
from lotlip.data.separation import SMALLEST, Separation, separation
from tests.conftest import TinySample, write_shards

KINDS = ("a red dog runs", "a blue cat sleeps", "two green houses", "the old boat")


def shards(folder: Path, number: int, by_feature: bool, by_pixel: bool) -> ShardIndex:
    """Images of four kinds that features or pixels separate, or images of noise."""
    rng = np.random.default_rng(0)
    samples = []
    for row in range(number):
        kind = row % len(KINDS)
        noise = rng.normal(size=16)
        feature = np.eye(16)[kind] * 20 + noise if by_feature else noise
        pixels = np.full((16, 16, 3), 40 * kind + rng.integers(8)) if by_pixel else rng.integers(0, 255, (16, 16, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
        info = {"raw": KINDS[kind], "captions": {"llava": [f"a sentence about {KINDS[kind]}"]}, "sha256": "0"}
        samples.append(TinySample(f"{row:04}", file.getvalue(), feature.astype(np.float32), info))
    write_shards(folder, samples, 2)
    return read_index(folder, ShardIndex)


@pytest.mark.parametrize(("by_feature", "by_pixel"), [(True, False), (False, True)])
def test_separation_counts_neighbours_with_equal_captions(tmp_path, by_feature, by_pixel):
    result = separation(tmp_path, shards(tmp_path, 80, by_feature, by_pixel))
    assert result is not None and result.pictures == 80
    good, bad = (result.tower, result.pixels) if by_feature else (result.pixels, result.tower)
    assert good == pytest.approx(1, abs=1e-5)
    assert bad < 0.6 and result.chance < 0.6
    assert bool(result.warning) is not by_feature


def test_few_images_have_no_separation(tmp_path):
    assert separation(tmp_path, shards(tmp_path, SMALLEST - 1, True, False)) is None


def test_the_warning_states_numbers_and_a_remedy():
    warning = Separation(100, 0.1, 0.2, 0.05).warning
    assert (
        "0.100 by its features, 0.200 by 8 × 8 pixels and 0.050 at random" in warning
        and "docs/image-towers.md" in warning
    )
