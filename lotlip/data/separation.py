"""Measures whether the image tower separates the pictures of a data set better than their raw pixels do.

Two pictures with similar features should have similar captions. So each picture's nearest neighbour is found by the
tower's features and, as a baseline, by thumbnails of 8 × 8 pixels, and the captions of both pictures are compared.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from lotlip.data.images import decode_rgb
from lotlip.data.index import ShardIndex
from lotlip.data.tars import TarSamples

SAMPLED = 1000
SMALLEST = 50  # with fewer pictures, the nearest neighbours say nothing
_SIDE = 8
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Separation:
    """Mean similarity of a picture's caption and that of its nearest neighbour, in 0..1.

    Attributes:
        pictures: number of pictures.
        tower: neighbours by the image tower's features.
        pixels: neighbours by raw pixels.
        chance: of random pairs.
    """

    pictures: int
    tower: float
    pixels: float
    chance: float

    @property
    def warning(self) -> str:
        """What to do if the tower is no better than raw pixels; else "" ."""
        if self.tower > self.pixels:
            return ""
        return (
            "the image tower separates these pictures no better than raw pixels do: captions of nearest neighbours "
            f"have a similarity of {self.tower:.3f} by its features, {self.pixels:.3f} by {_SIDE} × {_SIDE} pixels and "
            f"{self.chance:.3f} at random ({self.pictures} pictures); use another image_tower "
            "(docs/image-towers.md)"
        )


def separation(folder: Path, index: ShardIndex) -> Separation | None:
    """Compares features and pixels on the first training samples, which the shards have in random order.

    Args:
        folder: of shards with stored features.
        index: their index.json.

    Returns:
        None if there are fewer than `SMALLEST` pictures.
    """
    samples = list(islice(_samples(folder, index), SAMPLED))
    if len(samples) < SMALLEST:
        return None
    features, thumbnails, texts = zip(*samples, strict=True)
    similarity = _text_similarity(texts)
    rows = np.arange(len(texts))
    others = len(texts) * (len(texts) - 1)
    unit = np.stack(features)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return Separation(
        len(texts),
        float(similarity[rows, _nearest(unit)].mean()),
        float(similarity[rows, _nearest(np.stack(thumbnails))].mean()),
        float((similarity.sum() - np.trace(similarity)) / others),
    )


def _samples(folder: Path, index: ShardIndex) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Feature, thumbnail and words of each training sample; damaged ones are the gate's concern."""
    for shard in index.splits["train"].shards if "train" in index.splits else []:
        tar = TarSamples(folder / f"{shard.name}.tar")
        for row in range(len(tar)):
            with suppress(ValueError, KeyError):
                raw = tar.read(row, ("json", "npy", "image"))
                feature = np.load(io.BytesIO(raw["npy"]), allow_pickle=False).astype(np.float32).ravel()
                picture = decode_rgb(raw["image"]).resize((_SIDE, _SIDE), Image.Resampling.BOX)
                content = json.loads(raw["json"])
                text = " ".join([content["raw"], *(part for parts in content["captions"].values() for part in parts)])
                yield feature, np.asarray(picture, np.float32).ravel(), _WORD.findall(text.lower())


def _nearest(points: np.ndarray) -> np.ndarray:
    """The index of each point's nearest other point, [n]."""
    squares = (points**2).sum(1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(1)


def _text_similarity(texts: Sequence[list[str]]) -> np.ndarray:
    """Cosine of TF-IDF vectors, [n, n]."""
    documents = Counter(word for words in texts for word in set(words))
    column = {word: number for number, word in enumerate(sorted(documents))}
    vectors = np.zeros((len(texts), len(column)), np.float32)
    for row, words in enumerate(texts):
        for word, count in Counter(words).items():
            vectors[row, column[word]] = count * np.log(len(texts) / documents[word])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors @ vectors.T
