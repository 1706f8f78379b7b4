"""Images of evaluation sets are found by their bytes, as given or as stored, and by perceptual hashes."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from lotlip.data.duplicates import unique_partitions
from lotlip.data.index import UnitIndex, write_index
from lotlip.data.partitions import write_partitions
from lotlip.ingest.config import FolderSourceConfig, ImagesConfig, IngestConfig
from lotlip.ingest.evaluation_images import image_hashes, perceptual_hashes
from lotlip.ingest.perceptual import HashIndex, near_copies, perceptual_hash, write_hashes
from lotlip.ingest.sources import open_source


def write_image(path: Path, seed: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_a_folder_of_images_is_hashed(tmp_path):
    data = write_image(tmp_path / "urban" / "image" / "7.png", 1)
    (tmp_path / "urban" / "image" / "8.jpg").write_bytes(b"broken, but it may be in the training set as it is")
    hashes = image_hashes([tmp_path / "urban"], ImagesConfig())
    assert hashes[hashlib.sha256(data).hexdigest()] == str(tmp_path / "urban/image/7.png")
    assert len(hashes) == 2


@pytest.mark.parametrize(
    "images", [ImagesConfig(), ImagesConfig(shorter_side=20, encoding="webp", quality=80)], ids=["kept", "webp"]
)
def test_evaluation_images_are_dropped_from_training_however_stored(tmp_path, images):
    for number in range(4):
        write_image(tmp_path / "raw" / f"{number}.png", number)
        (tmp_path / "raw" / f"{number}.txt").write_text(f"number {number}")
    write_image(tmp_path / "benchmark" / "a.png", 2)
    settings = FolderSourceConfig(kind="folder", path=tmp_path / "raw", val_share=0, test_share=0)
    source = open_source(settings, images)
    (unit,) = source.units(10)
    reports = write_partitions(unit, source.read(unit), tmp_path / "units", source.split)
    evaluation = image_hashes([tmp_path / "benchmark"], images)
    (report,) = unique_partitions(tmp_path / "units", reports, tmp_path / "out", evaluation)
    assert [(failure.key, failure.kind) for failure in report.failures] == [("2", "evaluation")]
    assert report.failures[0].reason == f"it is in an evaluation set: {tmp_path / 'benchmark/a.png'}"


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no image; name folders of images that must not be trained on"):
        image_hashes([tmp_path], ImagesConfig())


# --- resized and re-encoded copies ----------------------------------------------------------------------------------

DISTANCE = IngestConfig.model_fields["max_evaluation_hash_distance"].default


def photo(name: str) -> Image.Image:
    """A photograph of scikit-learn, 640 × 427."""
    return Image.open(Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg")


def encoded(image: Image.Image, scale: float = 1, encoding: str = "jpeg", **options: int) -> bytes:
    file = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(file, encoding, **options)
    return file.getvalue()


def differing_bits(one: bytes, other: bytes) -> int:
    return int(np.bitwise_count(perceptual_hash(one) ^ perceptual_hash(other)))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("quality", [30, 60, 90])
@pytest.mark.parametrize("name", ["china", "flower"])
def test_hashes_of_copies_differ_in_few_bits(name, quality, scale):
    original = encoded(photo(name), encoding="png")
    assert differing_bits(original, encoded(photo(name), scale, quality=quality)) <= DISTANCE
    assert differing_bits(original, encoded(photo(name), scale, "webp", quality=quality)) <= DISTANCE


@pytest.mark.slow
def test_hashes_of_different_images_differ_in_many_bits():
    photos = {name: photo(name) for name in ("china", "flower")}
    pieces = [
        encoded(image.crop((x, y, x + 213, y + 213)), encoding="png")
        for image in photos.values()
        for x in (0, 213, 426)
        for y in (0, 213)
    ]
    hashes = [int(perceptual_hash(piece)) for piece in pieces]
    nearest = min((one ^ other).bit_count() for one, other in combinations(hashes, 2))
    assert nearest > 2 * DISTANCE


@pytest.mark.parametrize("distance", [0, 3, 4, 6, 8, 11])
def test_the_hash_index_agrees_with_comparing_all_pairs(distance):
    rng = np.random.default_rng(distance)
    known = rng.integers(0, 2**64, 300, dtype=np.uint64)
    queries = np.append(known.repeat(4), rng.integers(0, 2**64, 300, dtype=np.uint64))
    for row in range(1200):  # flips 0 to 14 bits
        for bit in rng.choice(64, rng.integers(15), replace=False):
            queries[row] ^= np.uint64(1) << np.uint64(bit)
    bits = np.bitwise_count(queries[:, None] ^ known[None])
    expected = [[row, each.argmin(), each.min()] for row, each in enumerate(bits) if each.min() <= distance]
    assert 20 < len(expected) < 1200
    assert HashIndex(known, distance).nearest(queries).tolist() == expected


def test_an_empty_index_and_empty_queries_find_nothing():
    none, some = np.empty(0, np.uint64), np.array([7], np.uint64)
    for known, queries in ((none, some), (some, none), (none, none)):
        assert HashIndex(known, 6).nearest(queries).tolist() == []


@pytest.mark.slow
def test_near_copies_are_dropped_from_the_training_split_only(tmp_path):
    raw, benchmark = tmp_path / "raw", tmp_path / "benchmark"
    raw.mkdir(), benchmark.mkdir()
    (benchmark / "china.jpg").write_bytes(encoded(photo("china"), quality=95))
    (benchmark / "broken.jpg").write_bytes(b"broken")
    files = {
        "copy": encoded(photo("china"), 0.4, quality=50),
        "exact": (benchmark / "china.jpg").read_bytes(),
        "other": encoded(photo("flower")),
    }
    for name, data in files.items():
        (raw / f"{name}.jpg").write_bytes(data)
        (raw / f"{name}.txt").write_text(name)
    source = open_source(FolderSourceConfig(kind="folder", path=raw, val_share=0, test_share=0), ImagesConfig())
    (unit,) = source.units(10)
    evaluation = image_hashes([benchmark], ImagesConfig())
    for split, expected in (("train", ["near-evaluation", "evaluation"]), ("test", [])):
        units, hashes, out = (tmp_path / split / folder for folder in ("units", "hashes", "out"))
        reports = write_partitions(replace(unit, split=split), source.read(unit), units, source.split)
        write_hashes(units, reports[0].name, hashes)
        near = near_copies(hashes, perceptual_hashes([benchmark]), DISTANCE)
        failures = [
            failure
            for report in unique_partitions(units, reports, out, evaluation, near)
            for failure in report.failures
        ]
        assert [failure.kind for failure in failures] == expected
        if expected:
            reason = f"it resembles an image of an evaluation set: {benchmark / 'china.jpg'} ("
            assert failures[0].key == "copy" and failures[0].reason.startswith(reason)
    # ingested data can be an evaluation set: its images outside the split train
    write_index(tmp_path / "test/out", [], UnitIndex)
    assert sorted(perceptual_hashes([tmp_path / "test/out"])) == [f"{tmp_path / 'test/out'}: {name}" for name in files]
