"""Perceptual hashes of images: those of resized or re-encoded copies differ in few bits, of other images in half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from lotlip.core.files import atomic_write
from lotlip.data.images import decode_rgb
from lotlip.data.partitions import stored_images

BITS = 64
PARTS = 4  # of 16 bits


def perceptual_hash(image: bytes) -> np.uint64:
    """ImageHash's pHash of an encoded image, decoded as a viewer shows it: the signs of its 8 × 8 lowest frequencies.

    Raises:
        ValueError: the image cannot be decoded.
    """
    import imagehash

    return np.packbits(imagehash.phash(decode_rgb(image)).hash).view(np.uint64)[0]


def write_hashes(units: Path, name: str, out: Path) -> None:
    """Writes the perceptual hashes of a partition's images to `<out>/<name>.npy`, uint64 [rows].

    Args:
        units: folder of the partition.
        name: of the partition.
        out: the folder of the hashes.
    """
    hashes = [perceptual_hash(read()) for _, _, read in stored_images(units, [name])]
    with atomic_write(out / f"{name}.npy") as partial, partial.open("wb") as file:
        np.save(file, np.array(hashes, dtype=np.uint64))


def near_copies(hashes: Path, evaluation: Mapping[str, int], distance: int) -> Callable[[str], dict[int, str]]:
    """Returns a function that finds a partition's images that resemble an evaluation image.

    Args:
        hashes: folder that `write_hashes` filled.
        evaluation: where an image is → its perceptual hash.
        distance: bits that may differ.

    Returns:
        A partition's name → row → why its image counts as a copy.
    """
    places, index = list(evaluation), HashIndex(np.fromiter(evaluation.values(), np.uint64, len(evaluation)), distance)

    def find(name: str) -> dict[int, str]:
        return {
            row: f"it resembles an image of an evaluation set: {places[image]} ({bits} of {BITS} bits differ)"
            for row, image, bits in index.nearest(np.load(hashes / f"{name}.npy", allow_pickle=False)).tolist()
        }

    return find


class HashIndex:
    """Finds similar hashes without comparing all pairs.

    If two hashes differ in at most d bits, one of their four parts differs in at most d // 4 bits. A table for each
    part therefore maps each of its 65,536 values to the hashes whose part is that similar; only these are compared.

    Args:
        hashes: uint64 [n].
        distance: d. Time and memory grow with the number of 16-bit values that differ in up to d // 4 bits: 1, 17, 137.
    """

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        self._hashes, self._distance = hashes, distance
        flips = [sum(bits) for n in range(distance // PARTS + 1) for bits in combinations(1 << np.arange(16), n)]
        self._tables = []
        for part in _parts(hashes).T:
            near = (part[:, None] ^ np.array(flips, dtype=np.uint16)).ravel()
            ends = np.cumsum(np.bincount(near, minlength=2**16))
            rows = (np.argsort(near, kind="stable") // len(flips)).astype(np.int32)
            self._tables.append((np.append(0, ends), rows))

    def nearest(self, hashes: np.ndarray) -> np.ndarray:
        """Similar pairs [m, 3]: row in `hashes`, row of the nearest hash in the index, number of differing bits.

        Hashes without a similar one are omitted. Of equally near ones, the first is used.
        """
        candidates = []
        for part, (ends, rows) in zip(_parts(hashes).T, self._tables, strict=True):
            starts, counts = ends[part], ends[part.astype(np.int64) + 1] - ends[part]
            queries = np.repeat(np.arange(len(part)), counts)
            known = rows[np.arange(len(queries)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)]
            bits = np.bitwise_count(hashes[queries] ^ self._hashes[known]).astype(np.int64)
            candidates.append(np.stack([queries, known, bits], axis=1)[bits <= self._distance])
        pairs = np.concatenate(candidates)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 2], pairs[:, 0]))]
        return pairs[np.unique(pairs[:, 0], return_index=True)[1]]


def _parts(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(np.uint16).reshape(-1, PARTS)
