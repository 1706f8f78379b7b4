"""Lists the files of a folder without hidden ones. Everything that reads folders and tars follows this rule."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

# macOS leaves `._NAME` (AppleDouble) and `.DS_Store` beside files, and the folder `__MACOSX` in archives.
_MACOS_FOLDER = "__MACOSX"
# Endings that compression and unfinished downloads add to a file's name.
_ADDED = (".gz", ".zst", ".lz4", ".bz2", ".xz", ".zip", ".part")


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path begins with a dot, or is a folder that macOS adds.

    >>> is_hidden("dogs/._a.jpg"), is_hidden("__MACOSX/a.jpg"), is_hidden("./dogs/a.jpg"), is_hidden("../a.jpg")
    (True, True, False, False)
    """
    parts = PurePosixPath(path).parts
    return any(part == _MACOS_FOLDER or (part.startswith(".") and part != "..") for part in parts)


def files_below(root: Path, skip: Path | None = None) -> Iterator[Path]:
    """The files of a folder and its subfolders, in no order; hidden files and links to folders are skipped.

    Args:
        root: the folder.
        skip: a folder that is not entered.
    """
    for folder, folders, names in os.walk(root):
        kept = (name for name in folders if not is_hidden(name))
        folders[:] = [name for name in kept if skip is None or not _same(Path(folder, name), skip)]
        yield from (Path(folder, name) for name in names if not is_hidden(name))


def files_with_endings(root: Path, endings: Sequence[str], skip: Path | None = None) -> list[Path]:
    """Those of `files_below` whose names have one of some endings, in any case, sorted.

    Raises:
        ValueError: a file would have one if it were decompressed, and is not there decompressed.
    """
    files, compressed = [], []
    for file in files_below(root, skip):
        name = file.name.lower()
        if name.endswith(tuple(endings)):
            files.append(file)
        elif name.endswith(_ADDED) and file.stem.lower().endswith(tuple(endings)) and not file.with_suffix("").exists():
            compressed.append(file)
    if compressed:
        more = f" and {len(compressed) - 1:,} more" if len(compressed) > 1 else ""
        raise ValueError(
            f"{min(compressed)}{more} cannot be read, because of the last ending; decompress or download them, or move "
            f"them out of {root}"
        )
    return sorted(files)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)
