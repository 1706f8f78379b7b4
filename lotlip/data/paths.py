"""Detects changed source files, and source files that DVC cannot read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lotlip.core.files import sha256_json
from lotlip.core.listing import files_below
from lotlip.data.keys import printable


def file_state(path: Path) -> list[int] | str:
    """A value that changes whenever a file is replaced, edited, removed or gets other permissions; it is not read.

    The time of the last status change reveals an edit that keeps size and modification time, which some copying and
    extracting programs restore.

    Args:
        path: links are followed.

    Returns:
        Size and times in nanoseconds; the reason if the file's status cannot be read.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        return f"{type(error).__name__} {getattr(error, 'errno', None)}"
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def tree_state(path: Path) -> str:
    """A hash of the `file_state` of a file, or of all files below a folder with their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_json([[str(file), file_state(file)] for file in files if not file.is_dir()])


def find_images(root: Path, remedy: str) -> list[str]:
    """Paths of the images below `root`, sorted, with `/` on every system; hidden files are skipped.

    Raises:
        ValueError: the folder does not exist or has no image; the message ends with the remedy.
    """
    from lotlip.data.images import ENDINGS

    if not root.is_dir():
        raise ValueError(f"the folder {root} does not exist; {remedy}")
    images = [file.relative_to(root).as_posix() for file in files_below(root) if file.suffix[1:].lower() in ENDINGS]
    if not images:
        raise ValueError(f"the folder {root} has no image; {remedy}")
    return sorted(images)


# --- files that DVC cannot hash -------------------------------------------------------------------------------------

SHOWN = 10


def check_inputs(inputs: Iterable[tuple[str, Path]]) -> None:
    """Checks that DVC can hash the files and folders that stages read.

    Args:
        inputs: key of params.yaml and path of each.

    Raises:
        ValueError: it cannot hash some entries; the message names them, the key and the remedies.
    """
    for key, path in inputs:
        _check(key, path)


def _check(key: str, path: Path) -> None:
    problems = list(islice(_problems(path), SHOWN + 1))
    if problems:
        lines = [f"  - {printable(str(entry))} {what}" for entry, what in problems[:SHOWN]]
        lines += ["  - and more"] if len(problems) > SHOWN else []
        head = f"{printable(str(path))} ({key} in params.yaml) has entries that DVC cannot read:"
        raise ValueError("\n".join([head, *lines]))


def _problems(root: Path) -> Iterator[tuple[Path, str]]:
    """Entries that DVC cannot hash, and why. Like DVC, it does not follow links to folders."""
    if root.is_symlink() and not root.exists():
        yield root, _broken_link(root)
    if not root.is_dir():
        return
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"cannot be listed ({error.strerror}); change its permissions or remove it"
            continue
        for entry in children:
            path = folder / entry.name
            if not _is_utf8(entry.name):
                yield path, "has a name that is not UTF-8; rename it"
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink():
                if not path.exists():
                    yield path, _broken_link(path)
            elif not entry.is_file(follow_symlinks=False):
                yield path, "is a pipe, a socket or a device; remove it"


def _broken_link(path: Path) -> str:
    target = printable(str(path.readlink()))
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"is a link to {target}, which links back to it; remove it"
    return f"is a link to {target}, which does not exist; restore the target or remove the link"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
