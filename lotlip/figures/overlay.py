"""Heat maps of relevance over an image, visible on dark and on light images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lotlip.data.images import seen_box

_SIDE = 288  # shorter side of a displayed image, in pixels
_GAP = 6
_HEAT = np.array([225, 29, 72], dtype=np.float32)
_MIN_PEAK = 3.0  # times uniform relevance; a map with a lower maximum is not scaled to full heat


def scale_to_page(picture: Image.Image) -> Image.Image:
    """Scales an RGB image to display size, uncropped."""
    scale = _SIDE / min(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def heat(picture: Image.Image, relevance: np.ndarray, resize: str = "crop", crop: float = 1.0) -> Image.Image:
    """Draws patch relevance in colour over a grey image; parts of the image that the model does not see are pale.

    The grey levels exclude black and white, so that the heat stands out from any image.

    Args:
        picture: RGB, at display size.
        relevance: relevance of the patches of the model's square input, [G, G']; sums to 1. Relevance of padding is
            not drawn.
        resize: how the model resizes images to its square input, one of `lotlip.data.images.RESIZES`.
        crop: share of the resized sides that the model sees.

    Returns:
        RGB, of the same size.
    """
    left, top, right, bottom = seen_box(*picture.size, resize, crop)
    # The intersection of the image and the square input, which is smaller than the square if there is padding.
    first, last = (max(left, 0), max(top, 0)), (min(right, picture.width), min(bottom, picture.height))
    across, down = relevance.shape[1] / (right - left), relevance.shape[0] / (bottom - top)
    part = ((first[0] - left) * across, (first[1] - top) * down, (last[0] - left) * across, (last[1] - top) * down)
    size = (last[0] - first[0], last[1] - first[1])
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32) * 0.6 + 60
    peak = max(float(relevance.max()), _MIN_PEAK / relevance.size)
    scaled = Image.fromarray((relevance / peak).astype(np.float32)).resize(size, Image.Resampling.BILINEAR, part)
    strength = np.zeros((picture.height, picture.width, 1), dtype=np.float32)
    inside = (slice(first[1], last[1]), slice(first[0], last[0]))
    strength[inside] = np.asarray(scaled)[..., None].clip(0, 1)
    coloured = grey + (_HEAT - grey) * 0.85 * strength
    pale = grey * 0.3 + 255 * 0.7
    pale[inside] = coloured[inside]
    return Image.fromarray(pale.round().astype(np.uint8))


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Joins two images of equal height side by side."""
    both = Image.new("RGB", (left.width + _GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP, 0))
    return both
