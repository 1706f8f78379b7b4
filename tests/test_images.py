"""Decoding as a viewer shows it, and pixels equal to the released code's."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from lotlip.config import Augmentation
from lotlip.data.images import decode_rgb, image_transform, random_box, training_transform

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


# --- in training --------------------------------------------------------------------------------------------------


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 40), (50, 33), (32, 32)])
def test_without_augmentation_training_sees_what_evaluation_sees(size: tuple[int, int]) -> None:
    data = encoded(noise(*size))
    pixels = training_transform(32)(data, random.Random(0))
    assert np.array_equal(pixels, image_transform(32)(decode_rgb(data)))


@pytest.mark.parametrize("side", [20, 32, 75])
def test_augmentation_that_takes_all_of_a_square_changes_nothing(side: int) -> None:
    augmentation = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    data = encoded(noise(side, side))
    pixels = training_transform(32, augmentation=augmentation)(data, random.Random(0))
    assert np.array_equal(pixels, image_transform(32)(decode_rgb(data)))


def test_augmentation_follows_its_chance() -> None:
    transform = training_transform(32, augmentation=Augmentation(scale=(0.3, 1.0)))
    data = encoded(noise(60, 40))
    first = transform(data, random.Random(1))
    assert first.shape == (3, 32, 32) and first.dtype == np.float32
    assert np.array_equal(transform(data, random.Random(1)), first)
    assert not np.array_equal(transform(data, random.Random(2)), first)


def test_a_piece_is_cut_out_and_resized_as_torchvision_does() -> None:
    augmentation = Augmentation(scale=(0.3, 0.6))
    image = noise(90, 60)
    left, top, right, bottom = random_box(90, 60, augmentation, random.Random(3))
    reference = RandomResizedCrop(32, interpolation=InterpolationMode.BICUBIC)
    reference.get_params = lambda *_: (top, left, bottom - top, right - left)  # type: ignore[method-assign]
    pixels = training_transform(32, (0, 0, 0), (1, 1, 1), augmentation)(encoded(image), random.Random(3))
    assert np.array_equal((pixels * 255).round().transpose(1, 2, 0), np.asarray(reference(image)))


def test_pieces_are_distributed_as_torchvision_s() -> None:
    augmentation = Augmentation(scale=(0.2, 0.9), ratio=(0.5, 3.0))
    rng = random.Random(0)
    boxes = np.array([random_box(200, 100, augmentation, rng) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (200, 100)).all()
    image = Image.new("RGB", (200, 100))
    drawn = [RandomResizedCrop.get_params(image, [0.2, 0.9], [0.5, 3.0]) for _ in range(4000)]
    reference = np.array([(left, top, left + w, top + h) for top, left, h, w in drawn])
    np.testing.assert_allclose(boxes.mean(0), reference.mean(0), atol=5)  # of 200 pixels
    np.testing.assert_allclose(boxes.std(0), reference.std(0), atol=5)


@pytest.mark.parametrize(
    ("size", "box"), [((300, 10), (143, 0, 156, 10)), ((10, 300), (0, 143, 10, 156)), ((40, 36), (0, 0, 40, 36))]
)
def test_where_no_piece_fits_it_is_the_centre(size: tuple[int, int], box: tuple[int, ...]) -> None:
    """A ratio that ten draws hardly meet, and pictures that are too wide, too narrow, and between."""
    assert random_box(*size, Augmentation(scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3)), Always(0.0)) == box


class Always(random.Random):
    """Draws that are always the lowest or the highest, for pieces that never fit."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value
