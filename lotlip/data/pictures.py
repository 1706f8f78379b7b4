"""Named pictures that can be read again: those of a folder, or of the partitions that ingest left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lotlip.core.listing import files_below
from lotlip.data.images import ENDINGS, OTHER_PICTURES


@dataclass(frozen=True)
class Pictures:
    """Pictures that stay on disk.

    Attributes:
        source: the folder that they are in.
        places: name of each → what gives its encoded bytes. A name that is not there leads nowhere, and so to no file
            outside the folder.
    """

    source: Path
    places: dict[str, Callable[[], bytes]]

    @property
    def names(self) -> list[str]:
        """In order: of files by path, of partitions as ingest read them."""
        return list(self.places)

    def read(self, name: str) -> bytes:
        """The encoded bytes of a picture.

        Raises:
            ValueError: there is no picture of that name, or it cannot be read.
        """
        if name not in self.places:
            raise ValueError(f"{self.source} has no picture {name!r}")
        try:
            return self.places[name]()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error


def open_pictures(source: Path, split: str | None = None) -> Pictures:
    """The pictures of a folder, named by their paths below it; or of ingest's partitions, named by their keys.

    Args:
        source: a folder, whose folders are searched too, hidden ones not; or what the ingest stage left.
        split: only this split of ingest's partitions.

    Raises:
        ValueError: it is no folder, has no picture or no such split.
    """
    from lotlip.data.partitions import unit_names  # which takes pandas to import

    if not source.is_dir():
        raise ValueError(f"{source} is not a folder of images")
    if units := [unit for unit in unit_names(source) if (source / f"{unit}.tar").is_file()]:
        places = _in_partitions(source, units, split)
    elif split is not None:
        raise ValueError(f"{source} is not what ingest left, and only that has splits: leave --split out")
    else:
        places = _in_folder(source)
    if not places:
        raise ValueError(f"{source} has no image ({', '.join(f'.{ending}' for ending in ENDINGS)})")
    return Pictures(source, places)


def printable(name: str) -> str:
    """A name as text that can be written as UTF-8, whatever bytes it has on disk."""
    return name.encode("utf-8", "backslashreplace").decode()


def _in_folder(root: Path) -> dict[str, Callable[[], bytes]]:
    endings = {*ENDINGS, *OTHER_PICTURES}  # what cannot be read is to be counted
    images = sorted(file for file in files_below(root) if file.suffix.lower().removeprefix(".") in endings)
    return {printable(file.relative_to(root).as_posix()): file.read_bytes for file in images}


def _in_partitions(folder: Path, units: list[str], split: str | None) -> dict[str, Callable[[], bytes]]:
    from lotlip.data.partitions import stored_images

    splits = sorted({unit.split("/")[0] for unit in units})
    if split not in (None, *splits):
        raise ValueError(f"{folder} has no split {split!r} (it has {', '.join(splits)})")

    wanted = (unit for unit in units if split in (None, unit.split("/")[0]))
    return {key: read for key, _, read in stored_images(folder, wanted)}
