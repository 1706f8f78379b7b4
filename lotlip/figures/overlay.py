"""Relevance as heat over a picture, which shows on dark pictures and on light ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lotlip.data.images import seen_box

_SIDE = 288  # pixels of the shorter side, as pictures are shown
_GAP = 6
_HEAT = np.array([225, 29, 72], dtype=np.float32)
_LEAST_PEAK = 3.0  # times the even share: a map whose highest patch has less is not stretched to full heat


def shown(picture: Image.Image) -> Image.Image:
    """An RGB picture, atomic_write, in the size in which the page shows it."""
    scale = _SIDE / min(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def heat(picture: Image.Image, relevance: np.ndarray, resize: str = "crop") -> Image.Image:
    """A picture in grey with the relevance of its patches in colour; what the model does not see of it is pale.

    Grey is kept from black and white, so that heat is told apart from any picture below it.

    Args:
        picture: RGB, in the size in which it is shown.
        relevance: of patches of the square that the model sees, [G, G']; sums to 1. Relevance of padding is not drawn.
        resize: how the model makes the square of the picture, one of `lotlip.data.images.RESIZES`.

    Returns:
        RGB, as large.
    """
    left, top, right, bottom = seen_box(*picture.size, resize)
    # what is both in the picture and in the square; with padding, that is less than the square
    first, last = (max(left, 0), max(top, 0)), (min(right, picture.width), min(bottom, picture.height))
    across, down = relevance.shape[1] / (right - left), relevance.shape[0] / (bottom - top)
    part = ((first[0] - left) * across, (first[1] - top) * down, (last[0] - left) * across, (last[1] - top) * down)
    size = (last[0] - first[0], last[1] - first[1])
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32) * 0.6 + 60
    peak = max(float(relevance.max()), _LEAST_PEAK / relevance.size)
    seen = Image.fromarray((relevance / peak).astype(np.float32)).resize(size, Image.Resampling.BILINEAR, part)
    strength = np.zeros((picture.height, picture.width, 1), dtype=np.float32)
    inside = (slice(first[1], last[1]), slice(first[0], last[0]))
    strength[inside] = np.asarray(seen)[..., None].clip(0, 1)
    coloured = grey + (_HEAT - grey) * 0.85 * strength
    pale = grey * 0.3 + 255 * 0.7
    pale[inside] = coloured[inside]
    return Image.fromarray(pale.round().astype(np.uint8))


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one height, side by side."""
    both = Image.new("RGB", (left.width + _GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP, 0))
    return both
