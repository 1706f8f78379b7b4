"""The files of a unit of work, for workers that have none of the project's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lotlip.data.records import UnitReport

Ranges = Sequence[tuple[int, int]]  # offset and size, in bytes

# Writes a unit with the object that knows how, here or on another machine.
Write = Callable[[Any, Any], list[UnitReport]]


@dataclass(frozen=True)
class UnitFiles:
    """The files of a unit. Those that it reads may be missing.

    Attributes:
        reads: a file or folder → the parts of the file that the unit reads; None: all.
        writes: files that the unit may write, in this order: its reports come last.
        common: files and folders that all units read, such as a model.
    """

    reads: Mapping[Path, Ranges | None]
    writes: Sequence[Path]
    common: Sequence[Path] = ()


def write_here(work: Any, unit: Any) -> list[UnitReport]:
    """Writes a unit in this process."""
    return work.write(unit)
