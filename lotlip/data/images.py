"""Encoded images to normalised pixels, as the image tower wants them: Pillow and NumPy only."""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageFile

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

    from lotlip.config import Augmentation

# Of the released models, and of CLIP's before them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Encoded image, and where chance comes from → pixels [3, H, W] float32.
Transform = Callable[[bytes, random.Random], np.ndarray]

Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow has it

# What is decoded, and how such files' names end; the first ending is the one that is written. Pillow reads more, some
# of it by starting other programs (PostScript): nothing for pictures that come from outside.
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif", "avifs"),
    "JPEG2000": ("jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
ENDINGS = {ending: name for name, endings in FORMATS.items() for ending in endings}
MAX_PIXELS = 2**28  # 0.8 GB as RGB; `ingest.images.max_pixels` is at most this

# EXIF's orientation → how the picture is turned to be seen.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of broken metadata, in words that differ from picture to picture, so that each would be printed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class TooManyPixels(ValueError):
    """An image whose header promises more pixels than are allowed: a decompression bomb, or a very large picture."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """An image with its header read: `format` (one of `FORMATS`, or "MPO" for some JPEGs) and `size` are known.

    As Image.open does it, without what there belongs to the whole process: a limit of pixels that others may lift, and
    a warning below that limit.

    Raises:
        TooManyPixels: it has more than `max_pixels`; nothing was decoded.
        ValueError: the bytes are no image of one of `FORMATS`.
    """
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None or (accepts and accepts(data[:16]) is not True):
            continue
        try:
            image = factory(io.BytesIO(data), "")
        except Exception as error:  # Pillow's headers raise many types on broken files
            raise ValueError(f"its {name} header is broken: {error}") from error
        if image.width * image.height > max_pixels:
            raise TooManyPixels(f"{image.width} × {image.height} pixels are more than {max_pixels}")
        return image
    raise ValueError(f"it is none of {', '.join(FORMATS)}")


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image to RGB as a viewer shows it: see `to_rgb`; of an animation, the first picture.

    Raises:
        TooManyPixels: it has more than `max_pixels`; nothing was decoded.
        ValueError: the bytes are not a whole image of one of `FORMATS`.
    """
    try:
        with open_image(data, max_pixels) as file:
            file.load()
            return to_rgb(file)
    except TooManyPixels:
        raise
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, as an RGB image of its own.

    Turned as its EXIF data says, its colours brought from the profile that it carries to sRGB, 16 bits cut to 8,
    transparent parts on white.
    """
    shown = _as_seen(_upright(image))
    shown.info.clear()  # it is turned, and its colours are sRGB's: nobody shall do so again
    return shown


def _as_seen(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _from_deep_grey(image)
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    image = image.convert("RGBA")
    shown = _in_srgb(image.convert("RGB"), profile)
    shown.putalpha(image.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data hides no picture
        return image
    return image if turn is None else image.transpose(turn)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """As RGB; by its colour profile where it carries one that can be used and is not sRGB already."""
    found = _transform_of(profile) if profile else None
    if found is None or (found[0] == "CMYK") != (image.mode == "CMYK"):
        return image.convert("RGB")
    from PIL import ImageCms

    mode, transform = found
    return ImageCms.applyTransform(image.convert(mode), transform) or image.convert("RGB")


@lru_cache(maxsize=16)
def _transform_of(profile: bytes) -> tuple[str, ImageCmsTransform] | None:
    """The mode that a colour profile is for, and its way to sRGB; None where it is sRGB itself, or broken."""
    try:
        from PIL import ImageCms

        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(given):
            return None
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[given.profile.xcolor_space.strip()]
        return mode, ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # Pillow may be built without it, too
        return None


def _from_deep_grey(image: Image.Image) -> Image.Image:
    # Pillow would cut 16-bit grey off at 255, which turns the picture white.
    pixels = np.asarray(image, dtype=np.float64)
    # How much is white is known for 16 bits only; other pixels tell by the largest of them.
    small = not image.mode.startswith("I;16") and pixels.max(initial=0) <= 255
    top = 255.0 if small else 65535.0
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))


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
    return lambda image: normalise(_centre(resized(image, image_size), image_size))


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


def resized(image: Image.Image, shorter: int) -> Image.Image:
    """The whole picture with its shorter side so long, bicubic and antialiased."""
    width, height = image.size
    if min(width, height) == shorter:
        return image
    # The longer side is cut down to whole pixels, not rounded: as torchvision does.
    size = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    return image.resize(size, Image.Resampling.BICUBIC)


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
