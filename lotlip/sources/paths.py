"""The state of a source's files on disk: whether they changed since they were read, and whether DVC can read them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lotlip import config
from lotlip.files import sha256_json
from lotlip.sources.keys import printable


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


# --- what DVC cannot hash -----------------------------------------------------------------------------------------

SHOWN = 10


def check_ingest(settings: config.Ingest) -> None:
    """Makes sure that the folders that ingest reads have nothing that DVC cannot hash.

    Raises:
        ValueError: a folder has such entries; the message names them, the key of params.yaml and the remedies.
    """
    source = settings.source
    _check("ingest.source.path", source.path)
    if isinstance(source, config.ParquetSource | config.CsvSource) and source.images is not None:
        _check("ingest.source.images", source.images)
    for folder in settings.evaluation_images:
        _check("ingest.evaluation_images", folder)


def check_sources(params: config.Params) -> None:
    """The same for all folders that stages read and did not write themselves; raises as `check_ingest`."""
    check_ingest(params.ingest)
    for name, captioner in params.caption.captioners.items():
        _check(f"caption.captioners.{name}.path", captioner.path)
    for name, benchmark in params.evaluate.benchmarks.items():
        if isinstance(benchmark, config.PublishedBenchmark):
            _check(f"evaluate.benchmarks.{name}.folder", benchmark.folder)
            if benchmark.images is not None:
                _check(f"evaluate.benchmarks.{name}.images", benchmark.images)


def _check(key: str, path: Path) -> None:
    found = list(islice(_problems(path), SHOWN + 1))
    if found:
        lines = [f"  - {printable(str(entry))} {what}" for entry, what in found[:SHOWN]]
        lines += ["  - and more"] if len(found) > SHOWN else []
        head = f"{printable(str(path))} ({key} in params.yaml) has entries that DVC cannot read:"
        raise ValueError("\n".join([head, *lines]))


def _problems(root: Path) -> Iterator[tuple[Path, str]]:
    """Entries that DVC cannot hash, and what is wrong with each; links to folders are not followed, as DVC does not."""
    if root.is_symlink() and not root.exists():
        yield root, _broken_link(root)
    if not root.is_dir():
        return
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"cannot be listed ({error.strerror}); change its permissions or remove it"
            continue
        for entry in found:
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
            return f"is a link to {target}, which leads back to it; remove it"
    return f"is a link to {target}, which does not exist; restore the target or remove the link"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
