"""What becomes of an encoded image and its caption, whatever source they are from."""

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


def taken(image: bytes, caption: str | bytes = "a red dot", ending: str = "", **settings: object) -> ImageRecord:
    found = RecordValidator(ImagesConfig(**settings))("k", "file", image, caption, ending)
    assert isinstance(found, ImageRecord), found
    return found


def refused(image: bytes, caption: str | bytes = "a red dot", **settings: object) -> Failure:
    found = RecordValidator(ImagesConfig(**settings))("k", "file", image, caption)
    assert isinstance(found, Failure)
    assert (found.key, found.where) == ("k", "file")
    return found


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("HEIF", "JXL")])  # need plug-ins
def test_images_are_stored_as_they_are(form):
    data = encoded(form)
    found = taken(data, " a\n red\tdot ", ending=FORMATS[form][-1].upper())
    expected = ("k", data, FORMATS[form][0], "a red dot", 40, 30, hashlib.sha256(data).hexdigest())
    assert found == ImageRecord(*expected)


def test_a_file_that_is_not_what_its_name_says_is_called_what_it_is():
    found = taken(encoded("WEBP"), ending="jpg")
    (warning,) = found.warnings
    assert (found.extension, warning.kind, warning.where) == ("webp", "renamed", "file")
    assert "its name ends in .jpg, but it is a WEBP" in warning.reason
    assert taken(encoded("JPEG"), ending="jpeg").warnings == ()


def test_a_turned_picture_has_the_size_that_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = taken(encoded("JPEG", exif=exif))
    assert (found.width, found.height) == (30, 40)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_what_is_cut_off_is_unreadable(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form)
    data = file.getvalue()
    assert refused(data[: int(len(data) * share)]).kind == "unreadable"


@pytest.mark.parametrize("data", [b"", b"404", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_unreadable(data):
    assert refused(data).kind == "unreadable"


def test_a_bomb_is_refused_by_its_header():
    bomb = encoded(size=(300, 200))
    bomb = bomb[:16] + (100_000).to_bytes(4, "big") * 2 + bomb[24:]  # its sides; ten billion pixels
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    found = refused(bomb)
    assert found.kind == "bomb"
    assert "100000 × 100000 pixels are more than 100000000" in found.reason
    assert refused(encoded(), max_pixels=1199).kind == "bomb"
    assert taken(encoded(), max_pixels=1200)


def test_small_sides_and_large_files_are_refused():
    assert refused(encoded(), min_side=31).kind == "too-small"
    assert taken(encoded(), min_side=30)
    data = encoded()
    assert refused(data, max_bytes=len(data) - 1).kind == "too-large"
    assert taken(data, max_bytes=len(data))


@pytest.mark.parametrize(
    ("caption", "kind", "words"),
    [
        ("", "empty", "empty"),
        (b"\xef\xbb\xbf \n\t", "empty", "empty"),
        ("ein Käse".encode("latin-1"), "encoding", "at byte 5"),
        ("half a \ud83d", "encoding", "lone surrogate"),
    ],
)
def test_captions_that_cannot_be_used(caption, kind, words):
    found = refused(encoded(), caption)
    assert found.kind == kind and words in found.reason


@pytest.mark.parametrize("caption", ["...", "!?", "—", "🐕🐕", "</s>", ". . ."])
def test_a_caption_without_words_is_empty(caption):
    assert refused(encoded(), caption).kind == "empty"


@pytest.mark.parametrize("caption", ["a", "7", "狗", "สุนัข", "Ω", "🐕 a dog"])
def test_a_word_of_any_script_is_enough(caption):
    assert taken(encoded(), caption).short_caption == caption


def test_an_extremely_long_picture_is_a_failure_by_its_header():
    file = io.BytesIO()
    Image.new("RGB", (1, 10_000)).save(file, "PNG")
    found = refused(file.getvalue())
    assert found.kind == "aspect-ratio"
    assert "ingest.images.max_aspect_ratio" in found.reason
    assert taken(file.getvalue(), max_aspect_ratio=10_000).height == 10_000
    assert taken(encoded(size=(300, 10))).width == 300


@pytest.mark.parametrize(("encoding", "form"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_what_is_encoded_anew_is_what_a_viewer_shows(encoding, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "where I live"
    data = encoded("JPEG", exif=exif)
    found = taken(data, encoding=encoding)
    assert found.extension == FORMATS[form][0]
    assert found == taken(data, encoding=encoding)
    assert b"where I live" in data and b"where I live" not in found.image
    with Image.open(io.BytesIO(found.image)) as stored:
        assert (stored.format, stored.mode, stored.size) == (form, "RGB", (30, 40))
        assert not stored.getexif() and "icc_profile" not in stored.info
        difference = np.abs(np.asarray(stored, float) - np.asarray(decode_rgb(data), float))
    assert difference.mean() < (0.01 if form == "PNG" else 8)
    assert found.sha256 == hashlib.sha256(found.image).hexdigest()


def test_quality_decides_the_size():
    data = encoded("PNG", size=(200, 200))
    assert len(taken(data, encoding="jpeg", quality=20).image) < len(taken(data, encoding="jpeg", quality=95).image)


@pytest.mark.parametrize(("form", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "png")])
def test_larger_pictures_are_brought_down_and_smaller_ones_stay(form, ending):
    data = encoded(form)
    found = taken(data, shorter_side=15)
    assert (found.extension, found.width, found.height) == (ending, 20, 15)
    assert decode_rgb(found.image).size == (20, 15)
    for side in (30, 31, 500):
        assert taken(data, shorter_side=side).image == data


def test_a_picture_that_an_encoding_cannot_hold_is_a_failure():
    found = refused(encoded(size=(17000, 8)), encoding="webp", max_aspect_ratio=3000)
    assert found.kind == "too-large" and "cannot be stored as webp" in found.reason


def test_files_are_read_up_to_the_limit_only(tmp_path):
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
        found = validator.read("k", "a", target)
        assert isinstance(found, Failure) and found.kind == kind
