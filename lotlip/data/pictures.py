"""Named pictures on disk: those of a folder, or of ingest's partitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lotlip.core.listing import files_below
from lotlip.data.images import ENDINGS, OTHER_PICTURES


@dataclass(frozen=True)
class Pictures:
    """Pictures that are read from disk on demand.

    Attributes:
        source: the folder with the pictures.
        readers: name of each → a function that returns its encoded bytes. Only these names are read, so a name cannot
            lead to a file outside the folder.
    """

    source: Path
    readers: dict[str, Callable[[], bytes]]

    @property
    def names(self) -> list[str]:
        """In order: files by path, partitions as ingest read them."""
        return list(self.readers)

    def read(self, name: str) -> bytes:
        """The encoded bytes of a picture.

        Raises:
            ValueError: there is no picture with that name, or it cannot be read.
        """
        if name not in self.readers:
            raise ValueError(f"{self.source} has no picture {name!r}")
        try:
            return self.readers[name]()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error


def open_pictures(source: Path, split: str | None = None) -> Pictures:
    """The pictures of a folder, named by their paths in it, or of ingest's partitions, named by their keys.

    Args:
        source: a folder of images, searched with its subfolders except hidden ones; or the ingest stage's output.
        split: only this split of ingest's partitions.

    Raises:
        ValueError: it is not a folder, or has no picture or no such split.
    """
    from lotlip.data.partitions import unit_names  # imports pandas, which is slow

    if not source.is_dir():
        raise ValueError(f"{source} is not a folder of images")
    if units := [unit for unit in unit_names(source) if (source / f"{unit}.tar").is_file()]:
        readers = _in_partitions(source, units, split)
    elif split is not None:
        raise ValueError(f"{source} is not ingest's output, and only that has splits; remove --split")
    else:
        readers = _in_folder(source)
    if not readers:
        raise ValueError(f"{source} has no image ({', '.join(f'.{ending}' for ending in ENDINGS)})")
    return Pictures(source, readers)


def printable(name: str) -> str:
    """A name as text that can be encoded as UTF-8, whatever bytes it has on disk."""
    return name.encode("utf-8", "backslashreplace").decode()


def _in_folder(root: Path) -> dict[str, Callable[[], bytes]]:
    endings = {*ENDINGS, *OTHER_PICTURES}  # unsupported formats are included, so that they count as failures
    images = sorted(file for file in files_below(root) if file.suffix.lower().removeprefix(".") in endings)
    return {printable(file.relative_to(root).as_posix()): file.read_bytes for file in images}


def _in_partitions(folder: Path, units: list[str], split: str | None) -> dict[str, Callable[[], bytes]]:
    from lotlip.data.partitions import stored_images

    splits = sorted({unit.split("/")[0] for unit in units})
    if split not in (None, *splits):
        raise ValueError(f"{folder} has no split {split!r} (it has {', '.join(splits)})")

    selected = (unit for unit in units if split in (None, unit.split("/")[0]))
    return {key: read for key, _, read in stored_images(folder, selected)}
