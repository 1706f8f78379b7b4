"""Images that are evaluated on: found by their bytes, as they are and as ingest stores them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotlip.data.duplicates import unique_partitions
from lotlip.data.partitions import write_partitions
from lotlip.ingest.config import FolderSourceConfig, ImagesConfig
from lotlip.ingest.evaluation_images import image_hashes
from lotlip.ingest.sources import open_source


def picture(path: Path, seed: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_a_folder_of_images_is_hashed(tmp_path):
    data = picture(tmp_path / "urban" / "image" / "7.png", 1)
    (tmp_path / "urban" / "image" / "8.jpg").write_bytes(b"broken, but it may be in the training set as it is")
    found = image_hashes([tmp_path / "urban"], ImagesConfig())
    assert found[hashlib.sha256(data).hexdigest()] == str(tmp_path / "urban/image/7.png")
    assert len(found) == 2


@pytest.mark.parametrize(
    "images", [ImagesConfig(), ImagesConfig(shorter_side=20, encoding="webp", quality=80)], ids=["kept", "webp"]
)
def test_what_is_evaluated_on_is_not_trained_on_however_it_is_stored(tmp_path, images):
    for number in range(4):
        picture(tmp_path / "raw" / f"{number}.png", number)
        (tmp_path / "raw" / f"{number}.txt").write_text(f"number {number}")
    picture(tmp_path / "benchmark" / "a.png", 2)
    settings = FolderSourceConfig(kind="folder", path=tmp_path / "raw", val_share=0, test_share=0)
    source = open_source(settings, images)
    (unit,) = source.units(10)
    reports = write_partitions(unit, source.read(unit), tmp_path / "units", source.split)
    evaluation = image_hashes([tmp_path / "benchmark"], images)
    (report,) = unique_partitions(tmp_path / "units", reports, tmp_path / "out", evaluation)
    assert [(failure.key, failure.kind) for failure in report.failures] == [("2", "evaluation")]
    assert report.failures[0].reason == f"it is in an evaluation set: {tmp_path / 'benchmark/a.png'}"


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no image; name folders of images that must not be trained on"):
        image_hashes([tmp_path], ImagesConfig())
