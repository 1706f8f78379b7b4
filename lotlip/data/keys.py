"""Keys of samples."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from lotlip.data.images import ENDINGS
from lotlip.data.records import KEY_PATTERN

_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]+")


def key_of(name: str, prefix: str = "") -> str:
    """The key for a name in a data set: the same rule for sources and for tables of captions.

    A path loses an image's ending, and `/` becomes `_`. If the name of a folder or file contains characters that a key
    may not have (a space, a dot, an accented letter, another alphabet), its readable ASCII part is kept and a hash of
    the name is appended, so that two names never share a key because of lost characters. The key of a URL is its hash:
    "url-" and 32 hexadecimal digits.

    Args:
        name: a path, a URL (with `://`), a number or a name.
        prefix: of the data set; put before the key.

    >>> key_of("dogs/7.PNG"), key_of("./0.jpg", "cc3m"), key_of("My café.jpg")
    ('dogs_7', 'cc3m_0', 'My_cafe-5150c3e1b45a')
    """
    if "://" in name:
        key = "url-" + _hash(name.strip())[:32]
    elif name.isspace():
        key = ""
    else:
        stem, dot, ending = name.removeprefix("./").rpartition(".")
        stem = stem if dot and ending.lower() in ENDINGS else name.removeprefix("./")
        key = "_".join(map(_part_of_key, stem.split("/")))
    return f"{prefix}_{key}" if prefix else key


def _part_of_key(name: str) -> str:
    """The part of a key for one folder or file."""
    if not name or is_key(name):
        return name
    letters = "".join(sign for sign in unicodedata.normalize("NFKD", name) if not unicodedata.combining(sign))
    return f"{_NOT_IN_A_KEY.sub('_', letters)}-{_hash(name)[:12]}"


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def prefix_of(file: Path, root: Path) -> str:
    """The prefix of a file's keys: the folders that lead to it from `root`; empty if it is not in a subfolder."""
    return "" if file == root else "_".join(map(_part_of_key, file.relative_to(root).parent.parts))


def is_key(key: str) -> bool:
    """Whether a text may be a sample's key."""
    return KEY_PATTERN.fullmatch(key) is not None


def printable(name: str) -> str:
    """A file's name as text that can be encoded as UTF-8, whatever bytes it has on disk."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # an unpaired surrogate from JSON: never a name on disk
        return name.encode("utf-8", "backslashreplace").decode()


def escapes_folder(path: str) -> bool:
    """Whether a path leads out of the folder that it is relative to, on any operating system."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return path.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", path) is not None
