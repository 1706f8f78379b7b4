"""Decoding as a viewer shows it, and pixels equal to the released code's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lotlip.data.images import decode_rgb, image_transform

PARITY = Path(__file__).parent / "data" / "parity" / "m2"


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def test_pixels_are_those_of_the_released_code() -> None:
    names = json.loads((PARITY / "case.json").read_text())["images"]
    transform = image_transform(160)
    pixels = np.stack([transform(decode_rgb((PARITY / name).read_bytes())) for name in names])
    expected = load_file(PARITY / "expected.safetensors")["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (50, 33), (224, 224), (1, 9)])
def test_any_size_becomes_a_square(size: tuple[int, int]) -> None:
    assert image_transform(64)(Image.new("RGB", size, "red")).shape == (3, 64, 64)


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = image_transform(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))(Image.fromarray(noise))
    expected = (noise.transpose(2, 0, 1) / 255 - 0.5) / np.array([0.25, 0.5, 1.0])[:, None, None]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_the_centre_is_kept() -> None:
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    pixels = image_transform(30, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert pixels.min() == 1


def test_exif_rotation_is_followed() -> None:
    image = Image.new("RGB", (8, 4), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode_rgb(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    decoded = decode_rgb(encoded(image))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def test_transparent_palettes_are_white_too() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    decoded = decode_rgb(encoded(image, transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("1", 1), ("CMYK", (0, 0, 0, 0)), ("P", 0)])
def test_every_mode_becomes_rgb(mode: str, value: object) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_rgb(encoded(Image.new(mode, (3, 3), value), form)).mode == "RGB"  # type: ignore[arg-type]


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert decode_rgb(encoded(grey)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", encoded(Image.new("RGB", (64, 64)))[:60]])
def test_a_broken_image_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"not a readable image.*{len(data)} bytes"):
        decode_rgb(data)
