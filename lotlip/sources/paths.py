"""The state of a source's files on disk: whether they changed since they were read, and whether DVC can read them."""

from __future__ import annotations

from pathlib import Path

from lotlip.files import sha256_json


def file_state(path: Path) -> list[int] | str:
    """What changes whenever a file is replaced, edited, removed or given other permissions; its bytes are not read.

    The time of the last status change finds an edit that keeps size and modification time, which some programs that
    copy and extract files restore.

    Args:
        path: links are followed.

    Returns:
        Size and times in nanoseconds; for a file whose status cannot be read, the reason.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"{type(error).__name__} {getattr(error, 'errno', None)}"
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def tree_state(path: Path) -> str:
    """A hash of the `file_state` of a file, or of all files below a folder with their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_json([[str(file), file_state(file)] for file in files if not file.is_dir()])
