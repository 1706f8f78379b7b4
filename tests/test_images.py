"""Decoding of images as viewers show them, and pixels equal to the released code's."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from safetensors.numpy import load_file
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from lotlip.data.images import (
    MAX_PIXELS,
    RESIZES,
    TooManyPixels,
    _centre,
    decode_rgb,
    image_transform,
    open_image,
    random_box,
    resized,
    resized_side,
    seen_box,
    square,
    to_rgb,
    training_transform,
    without_ends,
)
from lotlip.image_tower.config import Resize
from lotlip.ingest.config import ImagesConfig
from lotlip.pretrain.config import AugmentationConfig
from tests.plugins import AVIF, HEIC, JXL

PARITY = Path(__file__).parent / "data" / "parity" / "m2"


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def test_pixels_equal_the_released_code() -> None:
    names = json.loads((PARITY / "case.json").read_text())["images"]
    transform = image_transform(160)
    pixels = np.stack([transform(decode_rgb((PARITY / name).read_bytes())) for name in names])
    expected = load_file(PARITY / "expected.safetensors")["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (50, 33), (224, 224), (1, 9)])
def test_images_of_any_size_become_square(size: tuple[int, int]) -> None:
    assert image_transform(64)(Image.new("RGB", size, "red")).shape == (3, 64, 64)


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = image_transform(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))(Image.fromarray(noise))
    expected = (noise.transpose(2, 0, 1) / 255 - 0.5) / np.array([0.25, 0.5, 1.0])[:, None, None]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_cropping_keeps_the_centre() -> None:
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    pixels = image_transform(30, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert pixels.min() == 1


# --- resize modes -------------------------------------------------------------------------------------------------

BLACK_AND_WHITE = ((0, 0, 0), (1, 1, 1))  # mean and standard deviation: pixels stay in 0..1


def with_coloured_ends(width: int, height: int) -> Image.Image:
    """A grey image with one red and one blue end."""
    image = Image.new("RGB", (width, height), "grey")
    end = max(width, height) // 10
    long = (end, height) if width > height else (width, end)
    image.paste("red", (0, 0, *long))
    image.paste("blue", (width - long[0], height - long[1], width, height))
    return image


def colours(pixels: np.ndarray) -> set[str]:
    red, green, blue = pixels
    return {name for name, mask in (("red", red - green > 0.6), ("blue", blue - green > 0.6)) if mask.any()}


def test_the_configuration_offers_every_resize_mode() -> None:
    assert get_args(Resize) == RESIZES


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_only_cropping_removes_the_ends_of_an_image(size: tuple[int, int]) -> None:
    image = with_coloured_ends(*size)
    assert colours(image_transform(32, *BLACK_AND_WHITE)(image)) == set()
    for resize in ("squash", "pad"):
        pixels = image_transform(32, *BLACK_AND_WHITE, resize)(image)
        assert pixels.shape == (3, 32, 32)
        assert colours(pixels) == {"red", "blue"}


def test_pad_fills_with_the_mean_colour_and_keeps_the_aspect_ratio() -> None:
    pixels = image_transform(32, resize="pad")(Image.new("RGB", (64, 32), "white"))
    np.testing.assert_allclose(pixels[:, [*range(8), *range(24, 32)]], 0, atol=0.01)  # in standard deviations
    assert pixels[:, 8:24].min() > 1


@pytest.mark.parametrize("side", [20, 32, 75])
def test_all_resize_modes_agree_on_square_images(side: int) -> None:
    expected = image_transform(32)(noise(side, side))
    for resize in RESIZES:
        assert np.array_equal(image_transform(32, resize=resize)(noise(side, side)), expected)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (50, 33), (33, 7), (1, 9), (9, 1), (3, 900)])
def test_the_default_resizes_the_shorter_side_and_crops_the_centre(size: tuple[int, int]) -> None:
    pixels = image_transform(64, *BLACK_AND_WHITE)(noise(*size))
    assert np.array_equal(pixels, image_transform(64, *BLACK_AND_WHITE, "crop")(noise(*size)))
    expected = np.asarray(_centre(resized(noise(*size), 64), 64)).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_allclose(pixels, expected, atol=0 if max(size) <= 8 * min(size) else 1.01 / 255)


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (3, 200), (200, 3)])
def test_resizing_a_very_long_image_needs_little_memory(resize: str, size: tuple[int, int]) -> None:
    original, areas = Image.Image.resize, []

    def watch(self: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        areas.append(size[0] * self.height)  # Pillow resizes rows first
        return original(self, size, *rest, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watch)
        pixels = image_transform(64, resize=resize)(Image.new("RGB", size, "red"))
    assert pixels.shape == (3, 64, 64)
    assert max(areas) <= max(size[0] * size[1], 64 * 64)


def test_an_unknown_resize_mode_is_an_error() -> None:
    for make in (image_transform, training_transform):
        with pytest.raises(ValueError, match="unknown resize mode 'stretch'"):
            make(32, resize="stretch")


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (31, 200)])
def test_seen_box_is_the_part_that_becomes_the_square(resize: str, size: tuple[int, int]) -> None:
    """Pillow crops the box, filling black outside the image, and resizes it."""
    x, y = np.meshgrid(np.linspace(50, 250, size[0]), np.linspace(50, 250, size[1]))
    image = Image.fromarray(np.dstack([x, y, y]).astype(np.uint8))
    box = seen_box(*size, resize)
    expected = image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(square(image, 64, resize, (0, 0, 0)), float) - np.asarray(expected, float))
    assert np.quantile(difference, 0.9) < 8


def test_exif_rotation_is_followed() -> None:
    image = Image.new("RGB", (8, 4), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_rgb(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    decoded = decode_rgb(encoded(image))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def test_transparent_palette_entries_become_white() -> None:
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


GREYS = {
    # mode → value of mid-grey and of white, as Pillow stores them
    "L": (128, 255),
    "P": (128, 255),
    "LA": ((128, 255), (255, 255)),
    "La": ((128, 255), (255, 255)),
    "PA": ((128, 255), (255, 255)),
    "RGB": ((128,) * 3, (255,) * 3),
    "RGBA": ((*(128,) * 3, 255), (255,) * 4),
    "RGBX": ((*(128,) * 3, 255), (255,) * 4),
    "RGBa": ((*(128,) * 3, 255), (255,) * 4),
    "CMYK": ((127,) * 3 + (0,), (0,) * 4),
    "YCbCr": ((128,) * 3, (255, 128, 128)),
    "HSV": ((0, 0, 128), (0, 0, 255)),
    "LAB": ((137, 128, 128), (255, 128, 128)),
    "I;16": (32896, 65535),
    "I;16L": (32896, 65535),
    "I;16B": (32896, 65535),
}


@pytest.mark.parametrize("mode", GREYS)
def test_grey_and_white_keep_their_brightness_in_every_mode(mode: str) -> None:
    for value, brightness in zip(GREYS[mode], (128, 255), strict=True):
        if mode in ("P", "PA"):
            image = Image.new(mode.replace("P", "L"), (3, 2), value).convert(mode)  # type: ignore[arg-type]
        else:
            image = Image.new(mode, (3, 2), value)  # type: ignore[arg-type]
        shown = to_rgb(image)
        np.testing.assert_allclose(shown.getpixel((1, 1)), (brightness,) * 3, atol=1, err_msg=mode)
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        (np.float32, 1),
        (np.float32, 255),
        (np.float32, 4095),
        (np.float32, 65535),
        (np.uint16, 4095),
        (np.uint16, 65535),
        (np.int32, 255),
        (np.int32, 4095),
        (np.int32, 65535),
    ],
)
@pytest.mark.parametrize("height", [2, 3000])
def test_the_range_of_deep_pixels_decides_the_white_value(dtype: type, white: float, height: int) -> None:
    pixels = np.full((height, 1500), white, dtype)
    pixels[0, 0] = dtype(white / 2)
    pixels[1, 0] = 0
    shown = decode_rgb(encoded(Image.fromarray(pixels), "TIFF"))
    values = [shown.getpixel((0, 0))[0], shown.getpixel((0, 1))[0], shown.getpixel((1499, height - 1))[0]]
    np.testing.assert_allclose(values, [127.5, 0, 255], atol=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1e6])
def test_deep_pixels_of_an_unknown_range_are_an_error(bad: float) -> None:
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[2, 2] = bad
    with pytest.raises(ValueError, match="mode F"):
        decode_rgb(encoded(Image.fromarray(pixels), "TIFF"))
    if np.isfinite(bad):
        with pytest.raises(ValueError, match="mode I"):
            decode_rgb(encoded(Image.fromarray(np.full((4, 4), bad * 10, np.int32)), "TIFF"))


def test_a_tiff_of_twelve_bits_is_scaled_from_twelve_bits() -> None:
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 1)]
    tags.append((279, 4, len(packed)))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = struct.pack("<2sHI", b"II", 42, 12) + packed + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    shown = decode_rgb(data)
    assert [shown.getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(("white", "shown"), [(4095, 255), (4096, 16), (3000, 187)])
def test_twelve_bits_in_sixteen_are_scaled_from_twelve_bits(form: str, white: int, shown: int) -> None:
    """As cameras and microscopes store them."""
    grey = Image.fromarray(np.array([[white, 0]], np.uint16))
    assert [decode_rgb(encoded(grey, form)).getpixel((x, 0))[0] for x in (0, 1)] == [shown, 0]


def test_a_dark_portable_graymap_of_sixteen_bits_stays_dark() -> None:
    assert decode_rgb(b"P5 1 1 65535\n" + bytes([0, 200])).getpixel((0, 0)) == (1, 1, 1)


def test_transparent_pixels_of_sixteen_bits_become_white() -> None:
    grey = Image.fromarray(np.array([[1000, 0]], np.uint16))
    shown = decode_rgb(encoded(grey, transparency=1000))
    assert [shown.getpixel((x, 0))[0] for x in (0, 1)] == [255, 0]


@pytest.mark.parametrize(
    "change", [{254: 1}, {50706: b"\x01\x04\0\0"}], ids=["a reduced picture first", "a digital negative"]
)
def test_a_raw_file_of_a_camera_is_an_error(change: dict[int, object]) -> None:
    data = encoded(Image.new("RGB", (4, 4), "red"), "TIFF", tiffinfo=change)
    with pytest.raises(ValueError, match="raw file"):
        decode_rgb(data)


@pytest.mark.parametrize(
    ("data", "package"), [(HEIC, "pillow-heif"), (JXL, "pillow-jxl-plugin"), (AVIF, "pillow-avif")]
)
def test_a_format_without_its_plug_in_is_an_error(data: bytes, package: str, no_plugins: None) -> None:
    with pytest.raises(ValueError, match=f"pip install {package}"):
        decode_rgb(data)


def test_a_format_with_its_plug_in_is_read(heif_plugin: None) -> None:
    assert decode_rgb(HEIC).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read_where_pillow_can() -> None:
    np.testing.assert_allclose(
        decode_rgb(encoded(Image.new("RGB", (8, 8), "red"), "AVIF")).getpixel((4, 4)), (255, 0, 0), atol=8
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (7, 3001), (3001, 8), (64, 2000)])
def test_cropping_a_very_long_image_needs_little_memory(size: tuple[int, int]) -> None:
    """The result is compared with the centre of the fully resized image."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, sides = Image.fromarray(noise), []
    expected = _centre(resized(image, 64), 64)
    original = Image.Image.resize

    def watch(self: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        sides.append(max(size))
        return original(self, size, *rest, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watch)
        pixels = image_transform(64, (0, 0, 0), (1, 1, 1))(image)
    assert max(sides, default=0) <= 64
    np.testing.assert_allclose(pixels * 255, np.asarray(expected).transpose(2, 0, 1), atol=1.01)


def test_without_ends_shortens_very_long_images_on_both_sides() -> None:
    assert without_ends(Image.new("RGB", (3, 1001))).size == (3, 25)
    assert without_ends(Image.new("RGB", (80, 10))).size == (80, 10)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", encoded(Image.new("RGB", (64, 64)))[:60]])
def test_a_broken_image_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"not a readable image.*{len(data)} bytes"):
        decode_rgb(data)


# An image without symmetry, and its stored pixels for each EXIF orientation.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]], [[0, 0, 0], [255, 255, 255]]], np.uint8)
STORED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1),
    6: np.rot90(CORNERS, 1),
    7: CORNERS[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(CORNERS, -1),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_upright_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), form, exif=exif, **options)
    shown = decode_rgb(data)
    np.testing.assert_array_equal(np.asarray(shown), CORNERS)
    np.testing.assert_array_equal(np.asarray(to_rgb(shown)), CORNERS)


@pytest.mark.integration
def test_broken_exif_data_is_ignored_silently() -> None:
    """A separate process is used, because pytest captures warnings."""
    data = encoded(Image.new("RGB", (8, 4), "blue"), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01")
    code = (
        "import sys; from lotlip.data.images import decode_rgb; "
        "print(decode_rgb(sys.stdin.buffer.read()).getpixel((0, 0))[2] > 250)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"True\n", b"")


def test_the_limit_of_pixels_replaces_pillows_warning() -> None:
    """Pillow's own warning, from 89 million pixels, is never printed."""
    data = encoded(Image.new("1", (10000, 9000)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_image(data).size == (10000, 9000)
    assert not caught
    with pytest.raises(TooManyPixels, match="10000 × 9000 pixels are more than 89999999"):
        decode_rgb(data, max_pixels=89_999_999)
    assert ImagesConfig.model_fields["max_pixels"].metadata[-1].le == MAX_PIXELS


def test_formats_that_start_other_programs_are_not_decoded() -> None:
    with pytest.raises(ValueError, match="none of JPEG, PNG"):
        decode_rgb(encoded(Image.new("RGB", (4, 4)), "EPS"))


RED, GREY = (200, 30, 60), 90


def profile(swapped: bool) -> bytes:
    """The colour profile of sRGB, or one with red and blue swapped and another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if not swapped:
        return data
    data = data.replace("sRGB".encode("utf-16-be"), "RBGs".encode("utf-16-be"))
    return data.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")


@pytest.mark.parametrize(("form", "tolerance"), [("PNG", 2), ("JPEG", 6), ("WEBP", 6), ("TIFF", 2)])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_embedded_colour_profile_decides_the_colours(form: str, tolerance: int, swapped: bool) -> None:
    shown = decode_rgb(encoded(Image.new("RGB", (16, 16), RED), form, icc_profile=profile(swapped)))
    np.testing.assert_allclose(shown.getpixel((8, 8)), RED[::-1] if swapped else RED, atol=tolerance)
    assert to_rgb(shown).getpixel((8, 8)) == shown.getpixel((8, 8))


def test_an_image_with_alpha_keeps_its_profile() -> None:
    shown = decode_rgb(encoded(Image.new("RGBA", (2, 2), (*RED, 255)), icc_profile=profile(True)))
    np.testing.assert_allclose(shown.getpixel((0, 0)), RED[::-1], atol=2)
    assert decode_rgb(encoded(Image.new("RGBA", (2, 2), (*RED, 0)), icc_profile=profile(True))).getpixel((0, 0)) == (
        255, 255, 255,
    )  # fmt: skip


@pytest.mark.parametrize("data", [b"no profile", b"", profile(True)[:200]])
def test_a_broken_profile_does_not_change_the_colours(data: bytes) -> None:
    assert decode_rgb(encoded(Image.new("RGB", (4, 4), RED), icc_profile=data)).getpixel((0, 0)) == RED


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    shown = decode_rgb(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", icc_profile=profile(True)))
    assert shown.getpixel((0, 0)) == (255, 0, 0)


def test_inverted_cmyk_jpegs_are_decoded_correctly() -> None:
    """Adobe's programs and Pillow store inverted values with a marker."""
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    np.testing.assert_allclose(decode_rgb(data).getpixel((8, 8)), (255, 0, 0), atol=4)


def deep_png(samples: list[int], kind: int) -> bytes:
    """A PNG of one pixel with 16 bits per sample: grey (kind 0), RGB (2), grey (4) or RGB (6) with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixel = struct.pack(f">{len(samples)}H", *samples)
    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" + pixel)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("samples", "kind", "shown"),
    [
        ([0x8000], 0, (128, 128, 128)),
        ([200], 0, (12, 12, 12)),  # of 12 bits
        ([0xFFFF, 0x8080, 0x0101], 2, (255, 128, 1)),
        ([0x4040, 0xFFFF], 4, (64, 64, 64)),
        ([0x4040, 0], 4, (255, 255, 255)),
        ([0xFFFF, 0x8080, 0x0101, 0xFFFF], 6, (255, 128, 1)),
        ([0xFFFF, 0x8080, 0x0101, 0], 6, (255, 255, 255)),
    ],
)
def test_sixteen_bits_are_reduced_to_eight(samples: list[int], kind: int, shown: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(decode_rgb(deep_png(samples, kind)).getpixel((0, 0)), shown, atol=1)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_decoded(form: str) -> None:
    later = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "green")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.new("RGB", (16, 16), "red"), form, save_all=True, append_images=later, **options)
    assert decode_rgb(data).getpixel((8, 8)) == (255, 0, 0)


def test_one_bit_images_and_grey_with_alpha_are_decoded() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert [decode_rgb(encoded(image)).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    for alpha, shown in ((255, GREY), (0, 255), (128, 172)):
        pixel = decode_rgb(encoded(Image.new("LA", (1, 1), (GREY, alpha)))).getpixel((0, 0))
        np.testing.assert_allclose(pixel, (shown,) * 3, atol=1)


def test_partly_transparent_palette_entries_blend_with_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    for place in range(3):
        image.putpixel((place, 0), place)
    shown = decode_rgb(encoded(image, transparency=bytes([255, 0, 128])))
    values = [shown.getpixel((x, 0)) for x in range(3)]
    np.testing.assert_allclose(values, [(255, 0, 0), (255, 255, 255), (127, 127, 127)], atol=1)


# --- training transforms ------------------------------------------------------------------------------------------


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 40), (50, 33), (32, 32)])
def test_training_without_augmentation_equals_evaluation(size: tuple[int, int]) -> None:
    data = encoded(noise(*size))
    pixels = training_transform(32)(data, random.Random(0))
    assert np.array_equal(pixels, image_transform(32)(decode_rgb(data)))


@pytest.mark.parametrize("resize", RESIZES)
def test_training_equals_evaluation_in_every_resize_mode(resize: str) -> None:
    data = encoded(noise(50, 33))
    pixels = training_transform(32, resize=resize)(data, random.Random(0))
    assert np.array_equal(pixels, image_transform(32, resize=resize)(decode_rgb(data)))


@pytest.mark.parametrize("resize", RESIZES)
def test_augmentation_does_not_depend_on_the_resize_mode(resize: str) -> None:
    augmentation, data = AugmentationConfig(scale=(0.3, 1.0)), encoded(noise(50, 33))
    expected = training_transform(32, augmentation=augmentation)(data, random.Random(5))
    pixels = training_transform(32, augmentation=augmentation, resize=resize)(data, random.Random(5))
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("side", [20, 32, 75])
def test_augmentation_with_the_full_square_equals_evaluation(side: int) -> None:
    augmentation = AugmentationConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    data = encoded(noise(side, side))
    pixels = training_transform(32, augmentation=augmentation)(data, random.Random(0))
    assert np.array_equal(pixels, image_transform(32)(decode_rgb(data)))


def test_augmentation_depends_on_the_random_numbers() -> None:
    transform = training_transform(32, augmentation=AugmentationConfig(scale=(0.3, 1.0)))
    data = encoded(noise(60, 40))
    first = transform(data, random.Random(1))
    assert first.shape == (3, 32, 32) and first.dtype == np.float32
    assert np.array_equal(transform(data, random.Random(1)), first)
    assert not np.array_equal(transform(data, random.Random(2)), first)


def test_random_crops_are_resized_like_torchvisions() -> None:
    augmentation = AugmentationConfig(scale=(0.3, 0.6))
    image = noise(90, 60)
    left, top, right, bottom = random_box(90, 60, augmentation, random.Random(3))
    reference = RandomResizedCrop(32, interpolation=InterpolationMode.BICUBIC)
    reference.get_params = lambda *_: (top, left, bottom - top, right - left)  # type: ignore[method-assign]
    pixels = training_transform(32, (0, 0, 0), (1, 1, 1), augmentation)(encoded(image), random.Random(3))
    assert np.array_equal((pixels * 255).round().transpose(1, 2, 0), np.asarray(reference(image)))


def test_random_crops_are_distributed_like_torchvisions() -> None:
    augmentation = AugmentationConfig(scale=(0.2, 0.9), ratio=(0.5, 3.0))
    rng = random.Random(0)
    boxes = np.array([random_box(200, 100, augmentation, rng) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (200, 100)).all()
    image = Image.new("RGB", (200, 100))
    parameters = [RandomResizedCrop.get_params(image, [0.2, 0.9], [0.5, 3.0]) for _ in range(4000)]
    reference = np.array([(left, top, left + w, top + h) for top, left, h, w in parameters])
    np.testing.assert_allclose(boxes.mean(0), reference.mean(0), atol=5)  # of 200 pixels
    np.testing.assert_allclose(boxes.std(0), reference.std(0), atol=5)


@pytest.mark.parametrize(
    ("size", "box"), [((300, 10), (143, 0, 156, 10)), ((10, 300), (0, 143, 10, 156)), ((40, 36), (0, 0, 40, 36))]
)
def test_random_box_is_the_centre_when_no_crop_fits(size: tuple[int, int], box: tuple[int, ...]) -> None:
    """The aspect ratio rarely fits in ten draws; images are too wide, too narrow, or between."""
    assert random_box(*size, AugmentationConfig(scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3)), Always(0.0)) == box


class Always(random.Random):
    """A generator of constant numbers, for crops that never fit."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def test_resized_side_inverts_the_crop_fraction():
    for side in (32, 224, 518):
        assert all(resized_side(side, side / before) == before for before in range(side, 3 * side))
    assert [resized_side(224, crop) for crop in (0.875, 0.9, 0.95, 1.0)] == [256, 248, 235, 224]  # as timm
