"""Decodes images and turns them into the image tower's normalised pixels, with Pillow and NumPy only."""

from __future__ import annotations

import importlib
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageFile

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform


# Of the released models, which took them from CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Encoded image and random number generator → pixels [3, H, W] float32.
Transform = Callable[[bytes, random.Random], np.ndarray]

Box = tuple[int, int, int, int]  # left, top, right, bottom, as in Pillow

# How a picture is made square. `Resize` of lotlip.image_tower.config has the same names; this module does not import
# configuration.
RESIZES = ("crop", "squash", "pad")
# Pillow's filters for resizing; all but "nearest" are antialiased.
INTERPOLATIONS = tuple(sorted(filter_.name.lower() for filter_ in Image.Resampling))

# The formats that are decoded, with their file endings; the first ending is the one that is written. Pillow reads more
# formats, some by starting other programs (PostScript), which is not safe for pictures from outside.
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
    "HEIF": ("heic", "heif", "hif"),
    "JXL": ("jxl",),
}
ENDINGS = {ending: name for name, endings in FORMATS.items() for ending in endings}
# Endings of pictures that are never read. They are counted, so that the user learns that they were skipped.
# fmt: off
OTHER_PICTURES = frozenset((
    "3fr", "ai", "arw", "bpg", "cr2", "cr3", "cur", "dcr", "dds", "dng", "emf", "eps", "exr", "hdp", "hdr", "icns",
    "ico", "iiq", "jng", "jxr", "kdc", "mrw", "nef", "nrw", "orf", "pcx", "pef", "psb", "psd", "qoi", "raf", "ras",
    "raw", "rw2", "rwl", "sgi", "sr2", "srw", "svg", "svgz", "tga", "wdp", "wmf", "x3f", "xcf",
))
# fmt: on
# Formats that Pillow reads only with a plug-in (AVIF: if it was built without support) → module and package.
PLUGINS = {
    "AVIF": ("pillow_avif", "pillow-avif-plugin"),
    "HEIF": ("pillow_heif", "pillow-heif"),
    "JXL": ("pillow_jxl", "pillow-jxl-plugin"),
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
# Pictures with a larger aspect ratio are cropped before resizing: resizing 1 × 10,000 pixels would take gigabytes.
_EXTREME_RATIO = 8
MAX_PIXELS = 2**28  # 0.8 GB as RGB; the upper limit of `ingest.images.max_pixels`

_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _DNG_VERSION = 254, 258, 50706  # tags of TIFF

# EXIF orientation → the transposition that turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Mode of single-channel pictures → values that white may have, of 8, 12 and 16 bits.
_WHITES = {"I;16": (4095.0, 65535.0), "I": (255.0, 4095.0, 65535.0), "F": (1.0, 255.0, 4095.0, 65535.0)}

# Pillow warns about broken metadata with a different text for each picture, so that every warning would be printed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class TooManyPixels(ValueError):
    """The header declares more pixels than allowed: a decompression bomb, or a very large picture."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Opens an image and reads its header: `format` (one of `FORMATS`, or "MPO" for some JPEGs) and `size` are known.

    Unlike Image.open, it does not depend on Pillow's process-wide pixel limit, which other code may lift, and does not
    warn below it.

    Raises:
        TooManyPixels: the image has more than `max_pixels`; nothing was decoded.
        ValueError: the bytes are not an image of one of `FORMATS`.
    """
    Image.init()
    plugin = _needs_plugin(data)
    if plugin and not _opener(plugin, data):
        _load_plugin(plugin)
    for name in FORMATS:
        factory = _opener(name, data)
        if factory is None:
            continue
        try:
            image = factory(io.BytesIO(data), "")
        except Exception as error:  # Pillow's headers raise many types on broken files
            raise ValueError(f"its {name} header is broken: {error}") from error
        if image.width * image.height > max_pixels:
            raise TooManyPixels(f"{image.width} × {image.height} pixels are more than {max_pixels}")
        if name == "TIFF" and _is_raw(image, data):
            raise ValueError(
                "it is a camera's raw file, of which only a preview can be read; convert it to PNG or JPEG"
            )
        return image
    if plugin:
        raise ValueError(
            f"it is {plugin}, which Pillow reads only with a plug-in; run `pip install {PLUGINS[plugin][1]}`"
        )
    raise ValueError(f"it is none of {', '.join(FORMATS)}")


def is_encoded(data: bytes) -> bool:
    """Whether the data begins as an image of one of `FORMATS` does."""
    Image.init()
    return _needs_plugin(data) is not None or any(_opener(name, data) for name in FORMATS)


def _opener(name: str, data: bytes) -> Callable[..., Any] | None:
    """Pillow's opener for a format; None if Pillow has none or the data is of another format."""
    factory, accepts = Image.OPEN.get(name, (None, None))
    # Pillow built without a format returns a message instead of True
    return None if factory is None or (accepts and accepts(data[:16]) is not True) else factory


def _needs_plugin(data: bytes) -> str | None:
    """The format of `PLUGINS` that the data has, judged by its first bytes; None for other formats."""
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def _load_plugin(name: str) -> None:
    """Registers a format's plug-in with Pillow if it is installed."""
    try:
        module = importlib.import_module(PLUGINS[name][0])
    except ImportError:
        return
    if name == "HEIF":  # the others register themselves
        module.register_heif_opener()


def _is_raw(image: Any, data: bytes) -> bool:
    """Whether a TIFF is a camera's raw file: a DNG, a Canon CR2, or one whose first picture is a reduced one."""
    return image.tag_v2.get(_NEW_SUBFILE_TYPE) == 1 or _DNG_VERSION in image.tag_v2 or data[8:10] == b"CR"


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image to RGB as a viewer shows it (see `to_rgb`); an animation gives its first picture.

    Raises:
        TooManyPixels: the image has more than `max_pixels`; nothing was decoded.
        ValueError: the bytes are not a complete image of one of `FORMATS`.
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
    """Converts a picture to a new RGB image as a viewer shows it.

    It is turned as its EXIF data says and converted from its colour profile to sRGB. Deeper pixels become 8 bits, and
    transparent parts are shown on white.

    Raises:
        ValueError: the brightness scale of its pixels is unknown.
    """
    profile = image.info.get("icc_profile")
    turned = _upright(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        turned = _from_deep_grey(turned, _white(image), image.info.get("transparency"))
    shown = _as_seen(turned, profile)
    shown.info.clear()  # it is upright and in sRGB now; the old metadata must not be applied again
    return shown


def _as_seen(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "La":  # Pillow converts it only to LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    image = image.convert("RGBA")
    shown = _in_srgb(image.convert("RGB"), profile)
    shown.putalpha(image.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data is ignored
        return image
    return image if turn is None else image.transpose(turn)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts to RGB, using the colour profile if it is usable and not already sRGB."""
    conversion = _transform_of(profile) if profile else None
    if conversion is None or (conversion[0] == "CMYK") != (image.mode == "CMYK"):
        return image.convert("RGB")
    from PIL import ImageCms

    mode, transform = conversion
    return ImageCms.applyTransform(image.convert(mode), transform) or image.convert("RGB")


@lru_cache(maxsize=16)
def _transform_of(profile: bytes) -> tuple[str, ImageCmsTransform] | None:
    """The mode that a colour profile applies to and its transform to sRGB; None if it is sRGB itself, or broken."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        return mode, ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # also if Pillow was built without ImageCms
        return None


def _white(image: Image.Image) -> float:
    """The pixel value of white in a single-channel picture with more than 8 bits, from its header or else its pixels.

    Deep pixels often hold narrower values, such as a camera's 12 bits in 16, so white is the largest value of the
    smallest range of `_WHITES` that fits them all. Floating-point pixels that are at most 1 are fractions of white.

    Raises:
        ValueError: a pixel is negative or not a number, or the pixels fit none of these ranges.
    """
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    mode = image.mode[:4]  # without the order of bytes
    if mode == "I;16" and bits < 16:
        return float(2**bits - 1)
    if image.format == "PPM":  # Pillow has scaled its pixels from the header's range to 16 bits
        return 65535.0
    extremes = [(pixels.min(), pixels.max()) for pixels in map(np.asarray, _strips(image))]
    low, high = np.min(extremes), np.max(extremes)  # NaN if a pixel is
    white = next((white for white in _WHITES[mode] if 0 <= low <= high <= white), None)
    if white is None:
        raise ValueError(
            f"its pixels, of mode {image.mode}, are from {low} to {high}, so the value of white is unknown; "
            "convert it to 8 or 16 bits"
        )
    return white


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """A picture in strips of full rows, so that float copies of its pixels stay small."""
    rows = max(2**22 // image.width, 1)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _from_deep_grey(image: Image.Image, white: float, transparent: Any) -> Image.Image:
    """Scales grey pixels to 8 bits. Pillow would clip values at 255, which turns the picture white.

    Args:
        image: with one channel of 16 or 32 bits.
        white: the pixel value of white.
        transparent: the pixel value that is transparent; None for none.
    """
    mode = "LA" if isinstance(transparent, int) else "L"
    grey, top = Image.new(mode, image.size), 0
    for strip in _strips(image):
        pixels = np.asarray(strip, dtype=np.float64)
        part = (pixels.clip(0, white) * (255 / white)).round().astype(np.uint8)
        if mode == "LA":
            part = np.dstack([part, np.where(pixels == transparent, 0, 255).astype(np.uint8)])
        grey.paste(Image.fromarray(part), (0, top))
        top += strip.height
    return grey


def image_transform(
    image_size: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    resize: str = "crop",
    interpolation: str = "bicubic",
    crop: float = 1.0,
) -> Callable[[Image.Image], np.ndarray]:
    """A function from an RGB image to the tower's input, float32 [3, image_size, image_size].

    The picture is made square (see `square`), scaled to 0..1 and normalised. With the mode `crop`, the pixels equal
    those of torchvision, and so those of the released code and of timm.

    Raises:
        ValueError: `resize`, `interpolation` or `crop` is not a possible value.
    """
    check_resize(resize, interpolation, crop)
    normalise = _normalisation(mean, std)
    return lambda image: normalise(square(image, image_size, resize, mean, interpolation, crop))


class RandomCrop(Protocol):
    """Limits of a random crop: its share of the picture's area, and its aspect ratio (width / height)."""

    @property
    def scale(self) -> tuple[float, float]: ...

    @property
    def ratio(self) -> tuple[float, float]: ...


def training_transform(
    image_size: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    augmentation: RandomCrop | None = None,
    resize: str = "crop",
    interpolation: str = "bicubic",
    crop: float = 1.0,
) -> Transform:
    """A function from an encoded image to the tower's input in training, float32 [3, image_size, image_size].

    Without augmentation its output equals that of evaluation bit for bit. With it, the output is a random crop, drawn
    as torchvision's RandomResizedCrop draws it (antialiased), whatever `resize` and `crop` are. The transform raises
    ValueError as `decode_rgb` does.

    Raises:
        ValueError: `resize`, `interpolation` or `crop` is not a possible value.
    """
    check_resize(resize, interpolation, crop)
    if augmentation is None:
        as_evaluated = image_transform(image_size, mean, std, resize, interpolation, crop)
        return lambda data, _: as_evaluated(decode_rgb(data))
    normalise, size = _normalisation(mean, std), (image_size, image_size)

    def transform(data: bytes, rng: random.Random) -> np.ndarray:
        image = decode_rgb(data)
        piece = image.crop(random_box(image.width, image.height, augmentation, rng))
        return normalise(piece.resize(size, _filter(interpolation)))

    return transform


def random_box(width: int, height: int, augmentation: RandomCrop, rng: random.Random) -> Box:
    """A random crop, drawn as torchvision's RandomResizedCrop draws it.

    Its share of the area is uniform, and so is the logarithm of its ratio. If ten crops in a row do not fit into the
    picture, the centre is used, cut to the nearest allowed ratio.
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


def resized(image: Image.Image, shorter: int, interpolation: str = "bicubic") -> Image.Image:
    """The whole picture, resized so that its shorter side has this length."""
    width, height = image.size
    if min(width, height) == shorter:
        return image
    # The longer side is truncated to whole pixels, not rounded, as in torchvision.
    size = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    return image.resize(size, _filter(interpolation))


def check_resize(resize: str, interpolation: str = "bicubic", crop: float = 1.0) -> None:
    """Checks the settings by which a picture becomes a square.

    Raises:
        ValueError: `resize` is not one of `RESIZES`, `interpolation` not one of `INTERPOLATIONS`, or `crop` not in
            0.1..1.
    """
    if resize not in RESIZES:
        raise ValueError(f"unknown resize mode {resize!r}; use one of {', '.join(RESIZES)}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}; use one of {', '.join(INTERPOLATIONS)}")
    if not 0.1 <= crop <= 1:
        raise ValueError(f"crop is {crop}; it is the share of a side that is kept, from 0.1 to 1")


def square(
    image: Image.Image,
    side: int,
    resize: str = "crop",
    mean: Sequence[float] = MEAN,
    interpolation: str = "bicubic",
    crop: float = 1.0,
) -> Image.Image:
    """Makes an RGB picture square. All modes agree on square pictures where `crop` is 1.

    Args:
        image: RGB.
        side: pixels per side.
        resize: `crop` resizes the shorter side and keeps the centre; `squash` resizes both sides, which changes the
            aspect ratio; `pad` resizes the longer side and fills the rest.
        mean: colour of the padding, in 0..1, rounded to 8 bits.
        interpolation: filter, one of `INTERPOLATIONS`.
        crop: share of the resized sides that is kept, from their centre (timm's `crop_pct`); `pad` keeps all.
    """
    if resize == "squash":
        return _centre(_squashed(image, resized_side(side, crop), interpolation), side)
    if resize == "pad":
        return _padded(image, side, mean, interpolation)
    return _cropped(image, side, resized_side(side, crop), interpolation)


def resized_side(side: int, crop: float) -> int:
    """The pixels of a side before the crop, of which `side` are kept; a crop of `side / n` gives n again."""
    return math.floor(side / crop + 1e-9)


def seen_box(width: int, height: int, resize: str = "crop", crop: float = 1.0) -> Box:
    """The part of a picture that becomes the square, in the picture's pixels; with `pad`, it extends beyond them."""
    if resize == "pad":
        seen_width = seen_height = max(width, height)
    elif resize == "squash":
        seen_width, seen_height = round(width * crop), round(height * crop)
    else:
        seen_width = seen_height = round(min(width, height) * crop)
    left, top = (width - seen_width) // 2, (height - seen_height) // 2
    return left, top, left + seen_width, top + seen_height


def _filter(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def _squashed(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    if image.height > max(_EXTREME_RATIO * image.width, side):
        # Pillow resizes rows first, so a narrow picture would reach the square's width at its full height
        image = image.resize((image.width, side), _filter(interpolation))
    return image.resize((side, side), _filter(interpolation))


def _padded(image: Image.Image, side: int, mean: Sequence[float], interpolation: str) -> Image.Image:
    longer = max(image.size)
    size = tuple(max(1, round(length * side / longer)) for length in image.size)
    whole = Image.new("RGB", (side, side), tuple(round(255 * min(max(value, 0), 1)) for value in mean))
    whole.paste(
        image.resize(size, _filter(interpolation)),  # type: ignore[arg-type]
        ((side - size[0]) // 2, (side - size[1]) // 2),
    )
    return whole


def _cropped(image: Image.Image, side: int, shorter: int, interpolation: str) -> Image.Image:
    """The centre `side` × `side` pixels of the picture, after its shorter side was resized to `shorter`."""
    width, height = image.size
    if min(width, height) == shorter or max(width, height) <= _EXTREME_RATIO * min(width, height):
        return _centre(resized(image, shorter, interpolation), side)
    whole = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    starts, ends, box = [0, 0], [0, 0], [0.0, 0.0, 0.0, 0.0]
    for axis, length in enumerate(image.size):
        scale = length / whole[axis]
        first = round((whole[axis] - side) / 2) * scale
        last = min(first + side * scale, length)
        # The cropped part must include the neighbouring pixels that the filter reads.
        reach = math.ceil(3 * max(scale, 1)) + 1
        starts[axis] = max(math.floor(first) - reach, 0)
        ends[axis] = min(math.ceil(last) + reach, length)
        box[axis], box[axis + 2] = first - starts[axis], last - starts[axis]
    part = image.crop((starts[0], starts[1], ends[0], ends[1]))
    return part.resize((side, side), _filter(interpolation), tuple(box))  # type: ignore[arg-type]


def without_ends(image: Image.Image) -> Image.Image:
    """Crops an extremely long picture to its central part; returns any other picture unchanged.

    For transforms that resize the whole picture and then crop the centre, which would need gigabytes for pictures that
    are a few pixels by thousands.
    """
    width, height = image.size
    longest = _EXTREME_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, width - left, height - top))


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
