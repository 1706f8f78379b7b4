"""A directory of images, each with a `.txt` of the same stem that holds its short caption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lotlip.core.files import sha256_json
from lotlip.core.listing import files_below
from lotlip.data.keys import key_of, printable
from lotlip.data.paths import file_state, find_images
from lotlip.data.records import SPLITS, Failure, ImageRecord, Unit
from lotlip.ingest.config import FolderSourceConfig, ImagesConfig
from lotlip.ingest.record_validation import Intake
from lotlip.ingest.split import split_of


class FolderSource:
    """Reads a directory and its subdirectories; links to directories are not followed.

    A sample's key is its path by `key_of`. Its split depends on nothing but key and seed, so new files leave the others
    where they are. Hidden files, and files that are neither pictures nor captions, are left alone. An item that cannot
    be used becomes a `Failure`: of one of the kinds of `Intake`, "missing" (an image without a `.txt`, or a `.txt`
    without an image) or "duplicate" (an earlier file, in sorted order, has the same key).

    Raises:
        ValueError: the directory is not there, or has no image.
    """

    def __init__(self, settings: FolderSourceConfig, images: ImagesConfig) -> None:
        self._settings = settings
        self._intake = Intake(images)
        self._root = settings.path
        self._items = _find_items(self._root)  # paths below the root
        self._duplicates = _duplicates(self._items)

    def units(self, partition_size: int) -> list[Unit]:
        """The sorted items of each split, `partition_size` at a time."""
        items: dict[str, list[str]] = {split: [] for split in SPLITS}
        for item in self._items:
            items[self.split(key_of(item))].append(item)
        return [
            Unit(split, index, tuple(items[split][start : start + partition_size]))
            for split in SPLITS
            for index, start in enumerate(range(0, len(items[split]), partition_size))
        ]

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """Each item's image, decoded once to be sure that it can be, and its caption."""
        for item in unit.items:
            yield self._read(item)

    def state(self, unit: Unit) -> str:
        """Of the items' images, captions and rivals for their keys."""
        return sha256_json([unit.split, *map(self._state, unit.items)])

    def _state(self, item: str) -> list[Any]:
        path = self._root / item
        captions = [file_state(path.with_suffix(ending)) for ending in _CAPTION]
        return [item, file_state(path), *captions, self._duplicates.get(item)]

    def split(self, key: str) -> str:
        """By chance, which depends on the key and the seed."""
        return split_of(key, self._settings)

    def _read(self, item: str) -> ImageRecord | Failure:
        key, where = key_of(item), printable(item)
        if item in self._duplicates:
            first = printable(self._duplicates[item])
            return Failure(key, where, f"its key {key!r} is taken by {first}; rename one of them", "duplicate")
        path = self._root / item
        if path.suffix.lower() == ".txt":
            reason = "there is no image for the caption beside it; add the image or move the text out of the folder"
            return Failure(key, where, reason, "missing")
        image = self._intake.read(key, where, path)
        if isinstance(image, Failure):
            return image
        beside = next((file for file in map(path.with_suffix, _CAPTION) if file.exists()), path.with_suffix(".txt"))
        caption = self._intake.read(key, printable(beside.relative_to(self._root).as_posix()), beside)
        if isinstance(caption, Failure):
            if caption.kind != "missing":
                return caption
            return Failure(key, caption.where, "there is no caption for the image beside it", "missing")
        return self._intake(key, where, image, caption, path.suffix[1:])


REMEDY = "set ingest.source.path in params.yaml to a folder of images, each with a .txt of the same stem"


_CAPTION = (".txt", ".TXT")
_NO_CAPTIONS = {"readme", "license", "licence", "notice"}  # names of texts that come with data sets


def _find_items(root: Path) -> list[str]:
    """Paths of all that should be a sample: of images, pictures of other formats, and captions without either."""
    from lotlip.data.images import ENDINGS, OTHER_PICTURES

    find_images(root, REMEDY)  # raises where there is none
    pictures, texts = set(), set()
    for file in files_below(root):
        ending = file.suffix[1:].lower()
        if ending in ENDINGS or ending in OTHER_PICTURES:
            pictures.add(file)
        elif ending == "txt" and file.stem.lower() not in _NO_CAPTIONS:
            texts.add(file)
    captions = {picture.with_suffix(ending) for picture in pictures for ending in _CAPTION}
    return sorted(file.relative_to(root).as_posix() for file in pictures | (texts - captions))


def _duplicates(items: list[str]) -> dict[str, str]:
    """Items whose key another one has → that other one.

    The first in sorted order has a key, but a format that Pillow reads goes before one that takes a plug-in, and before
    pictures of other formats: phones leave `a.heic` beside `a.jpg`.
    """
    from lotlip.data.images import ENDINGS, PLUGINS

    def readable(item: str) -> bool:
        return ENDINGS.get(Path(item).suffix[1:].lower(), next(iter(PLUGINS))) not in PLUGINS

    first: dict[str, str] = {}
    for item in sorted(items, key=lambda item: (not readable(item), item)):
        first.setdefault(key_of(item), item)
    return {item: owner for item in items if (owner := first[key_of(item)]) != item}
