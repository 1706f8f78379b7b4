"""Encoded images to normalised pixels, as the image tower wants them: Pillow and NumPy only."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from lotlip.config import Augmentation

# Of the released models, and of CLIP's before them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Encoded image, and where chance comes from → pixels [3, H, W] float32.
Transform = Callable[[bytes, random.Random], np.ndarray]

Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow has it


def decode_rgb(data: bytes) -> Image.Image:
    """Decodes an image to RGB as a viewer shows it: turned as its EXIF data says, transparent parts on white.

    Raises:
        ValueError: the bytes are not a whole image that Pillow can read.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            return to_rgb(file)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it: turned as its EXIF data says, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    # Pillow would cut 16-bit grey off at 255, which turns the picture white.
    pixels = np.asarray(image, dtype=np.float64)
    top = 255.0 if pixels.max(initial=0) <= 255 else 65535.0
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")


def image_transform(
    image_size: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Callable[[Image.Image], np.ndarray]:
    """What turns an RGB image into the tower's input, float32 [3, image_size, image_size].

    The shorter side is resized (bicubic, antialiased), the centre cut out, pixels scaled to 0..1 and normalised: as
    the released code does with torchvision.
    """
    normalise = _normalisation(mean, std)
    return lambda image: normalise(_centre(_resized(image, image_size), image_size))


def training_transform(
    image_size: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    augmentation: Augmentation | None = None,
) -> Transform:
    """What turns an encoded image into the tower's input in training, float32 [3, image_size, image_size].

    Without augmentation that is what evaluation sees, bit for bit; with it, a random piece of the picture, as
    torchvision's RandomResizedCrop draws it (bicubic, antialiased). It raises ValueError as `decode_rgb` does.
    """
    if augmentation is None:
        centre = image_transform(image_size, mean, std)
        return lambda data, _: centre(decode_rgb(data))
    normalise, size = _normalisation(mean, std), (image_size, image_size)

    def transform(data: bytes, rng: random.Random) -> np.ndarray:
        image = decode_rgb(data)
        piece = image.crop(random_box(image.width, image.height, augmentation, rng))
        return normalise(piece.resize(size, Image.Resampling.BICUBIC))

    return transform


def random_box(width: int, height: int, augmentation: Augmentation, rng: random.Random) -> Box:
    """A piece of a picture, drawn as torchvision's RandomResizedCrop does.

    Its share of the area is uniform, the logarithm of its ratio too. Where ten such pieces do not fit into the picture,
    the centre is taken, cut to the nearest ratio that is allowed.
    """
    low, high = augmentation.ratio
    for _ in range(10):
        area = width * height * rng.uniform(*augmentation.scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], np.ndarray]:
    """An RGB image to pixels, float32 [3, H, W]."""
    shift = np.asarray(mean, dtype=np.float32)[:, None, None]
    scale = np.asarray(std, dtype=np.float32)[:, None, None]

    def normalise(image: Image.Image) -> np.ndarray:
        pixels = np.empty((3, image.height, image.width), dtype=np.float32)
        np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(255), out=pixels)
        pixels -= shift
        pixels /= scale
        return pixels

    return normalise


def _resized(image: Image.Image, shorter: int) -> Image.Image:
    width, height = image.size
    if min(width, height) == shorter:
        return image
    # The longer side is cut down to whole pixels, not rounded: as torchvision does.
    size = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    return image.resize(size, Image.Resampling.BICUBIC)


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
