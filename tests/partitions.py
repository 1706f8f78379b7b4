"""Partitions for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lotlip.data.partitions import write_partitions
from lotlip.data.records import Failure, ImageRecord, Unit, UnitReport


def write_partition(unit: Unit, items: Iterable[ImageRecord | Failure], folder: Path) -> UnitReport:
    """Writes the only partition of a unit that has a split."""
    (report,) = write_partitions(unit, items, folder, split_of=str)
    return report


def ingested(folder: Path, images: dict[str, bytes]) -> Path:
    """Writes ingested PNG images: the last third is the split `test`, the others are two units of `train`."""
    third = len(images) // 3
    keys = list(images)
    for split, index, part in (
        ("train", 0, keys[:third]),
        ("train", 1, keys[third : 2 * third]),
        ("test", 0, keys[2 * third :]),
    ):
        records = [ImageRecord(key, images[key], "png", f"short caption of {key}", 16, 16, "") for key in part]
        write_partition(Unit(split, index, tuple(part)), records, folder)
    return folder
