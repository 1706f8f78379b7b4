"""Partitions for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lotlip.partitions import write_partitions
from lotlip.records import Failure, ImageRecord, Unit, UnitReport


def write_partition(unit: Unit, items: Iterable[ImageRecord | Failure], folder: Path) -> UnitReport:
    """The one partition of a unit that has a split."""
    (report,) = write_partitions(unit, items, folder, split_of=str)
    return report
