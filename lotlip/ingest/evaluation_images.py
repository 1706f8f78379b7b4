"""Evaluation images, which must not be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lotlip.data.index import INDEX_FILE
from lotlip.data.inspection import held_out_images
from lotlip.data.partitions import stored_images, unit_names
from lotlip.data.records import ImageRecord
from lotlip.ingest.config import ImagesConfig
from lotlip.ingest.perceptual import perceptual_hash
from lotlip.ingest.record_validation import RecordValidator
from lotlip.ingest.sources.folder import find_images

_REMEDY = "name folders of images that must not be trained on, or none"


def image_hashes(folders: Iterable[Path], images: ImagesConfig) -> dict[str, str]:
    """The sha256 of each image, both as it is and as ingest would store it → where it is.

    Args:
        folders: of images; or outputs of an ingest stage, whose images outside the train split are used.
        images: how ingest stores images: resized or re-encoded images have other bytes.

    Raises:
        ValueError: a folder does not exist, or has no image.
    """
    validator = RecordValidator(images)
    hashes: dict[str, str] = {}
    for folder in folders:
        if (folder / INDEX_FILE).is_file():
            hashes |= dict.fromkeys(held_out_images(folder, unit_names(folder)), str(folder))
            continue
        for name in find_images(folder, _REMEDY):
            data = (folder / name).read_bytes()
            stored = validator(name, name, data, caption="none")
            hashes[hashlib.sha256(data).hexdigest()] = str(folder / name)
            if isinstance(stored, ImageRecord):
                hashes[stored.sha256] = str(folder / name)
    return hashes


def perceptual_hashes(folders: Iterable[Path]) -> dict[str, int]:
    """Where each image is → its perceptual hash; images that cannot be decoded are skipped.

    Args and errors are those of `image_hashes`.
    """

    def hashed(image: tuple[str, Callable[[], bytes]]) -> tuple[str, int] | None:
        try:
            return image[0], int(perceptual_hash(image[1]()))
        except ValueError:  # an image that cannot be decoded has no copy that can be decoded
            return None

    with ThreadPoolExecutor() as pool:
        return dict(filter(None, pool.map(hashed, _images(folders))))


def _images(folders: Iterable[Path]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Where each image is, and a function that reads its bytes."""
    for folder in folders:
        if (folder / INDEX_FILE).is_file():
            names = [name for name in unit_names(folder) if not name.startswith("train/")]
            yield from ((f"{folder}: {key}", read) for key, _, read in stored_images(folder, names))
        else:
            yield from ((str(folder / name), (folder / name).read_bytes) for name in find_images(folder, _REMEDY))
