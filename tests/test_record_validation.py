"""Validation of an encoded image and its caption, the same for every source."""

from __future__ import annotations

import hashlib
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lotlip.data.images import FORMATS, decode_rgb
from lotlip.data.records import Failure, ImageRecord
from lotlip.ingest.config import ImagesConfig
from lotlip.ingest.record_validation import RecordValidator


def encoded(form: str = "PNG", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((2, 2, size[0] // 2, size[1] - 2), fill="red")
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def accepted(image: bytes, caption: str | bytes = "a red dot", ending: str = "", **settings: object) -> ImageRecord:
    record = RecordValidator(ImagesConfig(**settings))("k", "file", image, caption, ending)
    assert isinstance(record, ImageRecord), record
    return record


def rejected(image: bytes, caption: str | bytes = "a red dot", **settings: object) -> Failure:
    failure = RecordValidator(ImagesConfig(**settings))("k", "file", image, caption)
    assert isinstance(failure, Failure)
    assert (failure.key, failure.where) == ("k", "file")
    return failure


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("HEIF", "JXL")])  # these need plug-ins
def test_images_are_stored_unchanged(form):
    data = encoded(form)
    record = accepted(data, " a\n red\tdot ", ending=FORMATS[form][-1].upper())
    expected = ("k", data, FORMATS[form][0], "a red dot", 40, 30, hashlib.sha256(data).hexdigest())
    assert record == ImageRecord(*expected)


def test_a_wrong_file_extension_is_corrected_with_a_warning():
    record = accepted(encoded("WEBP"), ending="jpg")
    (warning,) = record.warnings
    assert (record.extension, warning.kind, warning.where) == ("webp", "renamed", "file")
    assert "its name ends in .jpg, but it is a WEBP" in warning.reason
    assert accepted(encoded("JPEG"), ending="jpeg").warnings == ()


def test_exif_rotation_swaps_width_and_height():
    exif = Image.Exif()
    exif[0x0112] = 6
    record = accepted(encoded("JPEG", exif=exif))
    assert (record.width, record.height) == (30, 40)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_images_are_unreadable(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form)
    data = file.getvalue()
    assert rejected(data[: int(len(data) * share)]).kind == "unreadable"


@pytest.mark.parametrize("data", [b"", b"404", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_other_files_are_unreadable(data):
    assert rejected(data).kind == "unreadable"


def test_a_decompression_bomb_is_rejected_by_its_header():
    bomb = encoded(size=(300, 200))
    bomb = bomb[:16] + (100_000).to_bytes(4, "big") * 2 + bomb[24:]  # width and height: ten billion pixels
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    failure = rejected(bomb)
    assert failure.kind == "bomb"
    assert "100000 × 100000 pixels are more than 100000000" in failure.reason
    assert rejected(encoded(), max_pixels=1199).kind == "bomb"
    assert accepted(encoded(), max_pixels=1200)


def test_small_images_and_large_files_are_rejected():
    assert rejected(encoded(), min_side=31).kind == "too-small"
    assert accepted(encoded(), min_side=30)
    data = encoded()
    assert rejected(data, max_bytes=len(data) - 1).kind == "too-large"
    assert accepted(data, max_bytes=len(data))


@pytest.mark.parametrize(
    ("caption", "kind", "words"),
    [
        ("", "empty", "empty"),
        (b"\xef\xbb\xbf \n\t", "empty", "empty"),
        ("ein Käse".encode("latin-1"), "encoding", "at byte 5"),
        ("half a \ud83d", "encoding", "lone surrogate"),
    ],
)
def test_unusable_captions_are_rejected(caption, kind, words):
    failure = rejected(encoded(), caption)
    assert failure.kind == kind and words in failure.reason


@pytest.mark.parametrize("caption", ["...", "!?", "—", "🐕🐕", "</s>", ". . ."])
def test_a_caption_without_words_is_empty(caption):
    assert rejected(encoded(), caption).kind == "empty"


@pytest.mark.parametrize("caption", ["a", "7", "狗", "สุนัข", "Ω", "🐕 a dog"])
def test_a_word_of_any_script_is_accepted(caption):
    assert accepted(encoded(), caption).short_caption == caption


def test_an_extreme_aspect_ratio_is_rejected_by_the_header():
    file = io.BytesIO()
    Image.new("RGB", (1, 10_000)).save(file, "PNG")
    failure = rejected(file.getvalue())
    assert failure.kind == "aspect-ratio"
    assert "ingest.images.max_aspect_ratio" in failure.reason
    assert accepted(file.getvalue(), max_aspect_ratio=10_000).height == 10_000
    assert accepted(encoded(size=(300, 10))).width == 300


@pytest.mark.parametrize(("encoding", "form"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_a_reencoded_image_looks_like_the_original(encoding, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "where I live"
    data = encoded("JPEG", exif=exif)
    record = accepted(data, encoding=encoding)
    assert record.extension == FORMATS[form][0]
    assert record == accepted(data, encoding=encoding)
    assert b"where I live" in data and b"where I live" not in record.image
    with Image.open(io.BytesIO(record.image)) as stored:
        assert (stored.format, stored.mode, stored.size) == (form, "RGB", (30, 40))
        assert not stored.getexif() and "icc_profile" not in stored.info
        difference = np.abs(np.asarray(stored, float) - np.asarray(decode_rgb(data), float))
    assert difference.mean() < (0.01 if form == "PNG" else 8)
    assert record.sha256 == hashlib.sha256(record.image).hexdigest()


def test_quality_decides_the_file_size():
    data = encoded("PNG", size=(200, 200))
    assert len(accepted(data, encoding="jpeg", quality=20).image) < len(
        accepted(data, encoding="jpeg", quality=95).image
    )


@pytest.mark.parametrize(("form", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "png")])
def test_shorter_side_reduces_larger_images_only(form, ending):
    data = encoded(form)
    record = accepted(data, shorter_side=15)
    assert (record.extension, record.width, record.height) == (ending, 20, 15)
    assert decode_rgb(record.image).size == (20, 15)
    for side in (30, 31, 500):
        assert accepted(data, shorter_side=side).image == data


def test_an_image_too_large_for_the_encoding_is_rejected():
    failure = rejected(encoded(size=(17000, 8)), encoding="webp", max_aspect_ratio=3000)
    assert failure.kind == "too-large" and "cannot be stored as webp" in failure.reason


def test_only_regular_files_within_the_limit_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert RecordValidator(ImagesConfig(max_bytes=5)).read("k", "a", path) == b"12345"
    for validator, target, kind in [
        (RecordValidator(ImagesConfig(max_bytes=4)), path, "too-large"),
        (RecordValidator(ImagesConfig()), tmp_path / "b", "missing"),
        (RecordValidator(ImagesConfig()), tmp_path, "unreadable"),
        (RecordValidator(ImagesConfig()), tmp_path / ("x" * 300), "unreadable"),
        (RecordValidator(ImagesConfig(max_bytes=4)), Path("/dev/zero"), "unreadable"),
    ]:
        failure = validator.read("k", "a", target)
        assert isinstance(failure, Failure) and failure.kind == kind
