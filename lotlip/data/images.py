"""Encoded images to normalised pixels, as the image tower wants them: Pillow and NumPy only."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps

# Of the released models, and of CLIP's before them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


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
    shift = np.asarray(mean, dtype=np.float32)[:, None, None]
    scale = np.asarray(std, dtype=np.float32)[:, None, None]

    def transform(image: Image.Image) -> np.ndarray:
        cut = _centre(_resized(image, image_size), image_size)
        pixels = np.asarray(cut, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
        return np.ascontiguousarray((pixels - shift) / scale)

    return transform


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
