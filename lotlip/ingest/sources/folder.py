"""A folder of images, each with a `.txt` file of the same stem that contains its short caption."""

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
from lotlip.ingest.record_validation import RecordValidator
from lotlip.ingest.split import split_of


class FolderSource:
    """Reads a folder and its subfolders; links to folders are not followed.

    A sample's key is its path by `key_of`. Its split depends only on key and seed, so new files do not move others.
    Hidden files, and files that are neither pictures nor captions, are ignored. An item that cannot be used becomes a
    `Failure`, with a kind of `RecordValidator`, "missing" (an image without a `.txt`, or a `.txt` without an image) or
    "duplicate" (an earlier file, in sorted order, has the same key).

    Raises:
        ValueError: the folder does not exist, or has no image.
    """

    def __init__(self, settings: FolderSourceConfig, images: ImagesConfig) -> None:
        self._settings = settings
        self._validator = RecordValidator(images)
        self._root = settings.path
        self._items = _find_items(self._root)  # paths relative to the root
        self._duplicates = _duplicates(self._items)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_items": []}  # `read` does not use them

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
        """Each item's image, decoded once to check it, and its caption."""
        for item in unit.items:
            yield self._read(item)

    def state(self, unit: Unit) -> str:
        """A hash of the items' images, captions and key conflicts."""
        return sha256_json([unit.split, *map(self._state, unit.items)])

    def files(self, unit: Unit) -> Iterator[Path]:
        """The items and their captions."""
        for item in unit.items:
            path = self._root / item
            yield from (path, *map(path.with_suffix, CAPTIONS))

    def _state(self, item: str) -> list[Any]:
        path = self._root / item
        captions = [file_state(path.with_suffix(ending)) for ending in CAPTIONS]
        return [item, file_state(path), *captions, self._duplicates.get(item)]

    def split(self, key: str) -> str:
        """A random split that depends only on the key and the seed."""
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
        image = self._validator.read(key, where, path)
        if isinstance(image, Failure):
            return image
        file = next((file for file in map(path.with_suffix, CAPTIONS) if file.exists()), path.with_suffix(".txt"))
        caption = self._validator.read(key, printable(file.relative_to(self._root).as_posix()), file)
        if isinstance(caption, Failure):
            if caption.kind != "missing":
                return caption
            return Failure(key, caption.where, "there is no caption for the image beside it", "missing")
        return self._validator(key, where, image, caption, path.suffix[1:])


REMEDY = "set ingest.source.path in params.yaml to a folder of images, each with a .txt of the same stem"


CAPTIONS = (".txt", ".TXT")
_NO_CAPTIONS = {"readme", "license", "licence", "notice"}  # stems of text files that come with data sets


def _find_items(root: Path) -> list[str]:
    """Paths of everything that should be a sample: images, unsupported pictures, and captions without a picture."""
    from lotlip.data.images import ENDINGS, OTHER_PICTURES

    find_images(root, REMEDY)  # raises if there is none
    pictures, texts = set(), set()
    for file in files_below(root):
        ending = file.suffix[1:].lower()
        if ending in ENDINGS or ending in OTHER_PICTURES:
            pictures.add(file)
        elif ending == "txt" and file.stem.lower() not in _NO_CAPTIONS:
            texts.add(file)
    captions = {picture.with_suffix(ending) for picture in pictures for ending in CAPTIONS}
    return sorted(file.relative_to(root).as_posix() for file in pictures | (texts - captions))


def _duplicates(items: list[str]) -> dict[str, str]:
    """Items whose key belongs to another item → that item.

    The key belongs to the first in sorted order, but formats that Pillow reads come before those that need a plug-in
    and before unsupported ones: phones write `a.heic` beside `a.jpg`.
    """
    from lotlip.data.images import ENDINGS, PLUGINS

    def readable(item: str) -> bool:
        return ENDINGS.get(Path(item).suffix[1:].lower(), next(iter(PLUGINS))) not in PLUGINS

    first: dict[str, str] = {}
    for item in sorted(items, key=lambda item: (not readable(item), item)):
        first.setdefault(key_of(item), item)
    return {item: owner for item in items if (owner := first[key_of(item)]) != item}
