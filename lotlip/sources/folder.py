"""A directory of images, each with a `.txt` of the same stem that holds its raw caption."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from lotlip import config
from lotlip.records import SPLITS, Failure, ImageRecord, Unit

_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]")


class FolderSource:
    """Reads a directory and its subdirectories; links to directories are not followed.

    A sample's key is its path without the ending, `_` in place of what a key cannot have. Its split depends on
    nothing but key and seed, so new files leave the others where they are. Hidden files, and files that are neither
    images nor captions, are left alone. An item that cannot be used becomes a `Failure` of one of these kinds:
    "unreadable" (the image is broken), "missing" (no `.txt`), "empty" (nothing in it), "encoding" (not UTF-8),
    "duplicate" (an earlier file, in sorted order, has the same key).

    Raises:
        ValueError: the directory is not there, or has no image.
    """

    def __init__(self, settings: config.FolderSource) -> None:
        self._settings = settings
        self._root = settings.path
        self._items = _find_images(self._root)  # paths below the root
        self._duplicates = _duplicates(self._items)

    def units(self, partition_size: int) -> list[Unit]:
        """The sorted items of each split, `partition_size` at a time."""
        items: dict[str, list[str]] = {split: [] for split in SPLITS}
        for item in self._items:
            items[self.split(_key(item))].append(item)
        return [
            Unit(split, index, tuple(items[split][start : start + partition_size]))
            for split in SPLITS
            for index, start in enumerate(range(0, len(items[split]), partition_size))
        ]

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """Each item's image, decoded once to be sure that it can be, and its caption."""
        for item in unit.items:
            yield self._read(item)

    def split(self, key: str) -> str:
        """By chance, which depends on the key and the seed."""
        digest = hashlib.sha256(f"{self._settings.split_seed}:{key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self._settings.test_share:
            return "test"
        return "val" if place < self._settings.test_share + self._settings.val_share else "train"

    def _read(self, item: str) -> ImageRecord | Failure:
        from lotlip.data.images import decode_rgb

        key, path = _key(item), self._root / item

        def failure(reason: str, kind: str, file: Path = path) -> Failure:
            return Failure(key, _printable(file.relative_to(self._root).as_posix()), reason, kind)

        if item in self._duplicates:
            first = _printable(self._duplicates[item])
            return failure(f"its key {key!r} is taken by {first}; rename one of them", "duplicate")
        try:
            image = path.read_bytes()
            width, height = decode_rgb(image).size
        except OSError as error:
            return failure(f"the image cannot be read: {error.strerror}", "unreadable")
        except ValueError as error:
            return failure(str(error), "unreadable")
        file = path.with_suffix(".txt")
        try:
            caption = " ".join(file.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            return failure("there is no caption for the image beside it", "missing", file)
        except UnicodeDecodeError as error:
            return failure(f"the caption is not UTF-8: {error.reason} at byte {error.start}", "encoding", file)
        except OSError as error:
            return failure(f"the caption cannot be read: {error.strerror}", "unreadable", file)
        if not caption:
            return failure("the caption is empty", "empty", file)
        extension = path.suffix[1:].lower()
        return ImageRecord(key, image, extension, caption, width, height, hashlib.sha256(image).hexdigest())


def _find_images(root: Path) -> list[str]:
    """Paths of the images below `root`, sorted, with `/` on every system."""
    remedy = "set ingest.source.path in params.yaml to a folder of images, each with a .txt of the same stem"
    if not root.is_dir():
        raise ValueError(f"the folder {root} is not there; {remedy}")
    endings = _image_endings()
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [
            (below / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in endings
        ]
    if not found:
        raise ValueError(f"the folder {root} has no image; {remedy}")
    return sorted(found)


def _image_endings() -> set[str]:
    """File endings that Pillow reads; it registers some that it can only write."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _duplicates(items: list[str]) -> dict[str, str]:
    """Items whose key an earlier one has → that earlier one."""
    first: dict[str, str] = {}
    owners = ((item, first.setdefault(_key(item), item)) for item in items)
    return {item: owner for item, owner in owners if owner != item}


def _key(item: str) -> str:
    return _NOT_IN_A_KEY.sub("_", item[: -len(Path(item).suffix)])


def _printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, whatever bytes it has on disk."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
