"""What a sample is called, and the split that follows from it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

from lotlip import config
from lotlip.data.images import ENDINGS
from lotlip.records import KEY_PATTERN

_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]")


def key_of(name: str, prefix: str = "") -> str:
    """The key of what a data set calls `name`: the one rule for sources and for tables of captions.

    A path loses the ending of an image, and `_` takes the place of what a key cannot have. An address is too long and
    has too many such signs: its hash is the key, "url-" and 32 hexadecimal digits.

    Args:
        name: a path, an address (with `://`), a number or a name.
        prefix: of the data set; comes before the key.

    >>> key_of("dogs/My dog.v2.PNG"), key_of("./0.jpg", "cc3m"), key_of("v1.5")
    ('dogs_My_dog_v2', 'cc3m_0', 'v1_5')
    """
    name = name.strip()
    if "://" in name:
        key = "url-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    else:
        stem, dot, ending = name.removeprefix("./").rpartition(".")
        key = _NOT_IN_A_KEY.sub("_", stem if dot and ending.lower() in ENDINGS else name.removeprefix("./"))
    return f"{prefix}_{key}" if prefix else key


def prefix_of(file: Path, root: Path) -> str:
    """What keys of a file begin with: the folders that lead to it from `root`, empty where it is in none."""
    return "" if file == root else _NOT_IN_A_KEY.sub("_", file.relative_to(root).parent.as_posix().removeprefix("."))


def is_key(key: str) -> bool:
    """Whether it may name a sample."""
    return KEY_PATTERN.fullmatch(key) is not None


def split_of(key: str, settings: config.SplitByKey) -> str:
    """By chance, which depends on the key and the seed."""
    digest = hashlib.sha256(f"{settings.split_seed}:{key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < settings.test_share:
        return "test"
    return "val" if place < settings.test_share + settings.val_share else "train"


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, whatever bytes it has on disk."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, out of JSON: never a name on disk
        return name.encode("utf-8", "backslashreplace").decode()


def leaves(path: str) -> bool:
    """Whether a path leads out of the folder that it starts from, or would on some system."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return path.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", path) is not None
