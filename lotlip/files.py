"""Files that are either whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; renames it to `path` when the block ends well.

    The name may be used for a file or for a folder. When the block raises, what was written is
    removed and `path` is as it was. What a killed process left behind is removed at the next try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    try:
        yield partial
        if path.is_dir():  # a folder is not replaced by a rename
            remove(path)
        partial.replace(path)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with what is in it; nothing when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes `data` whole, with sorted keys, so that equal data gives equal bytes.

    Raises:
        ValueError: `data` has NaN or infinity, which JSON has not; the message names the file.
    """
    try:
        text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from error
    with whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON; a file that is not JSON is a ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON ({error}); remove it and run its stage again") from error


def sha256_files(paths: Iterable[Path]) -> str:
    """One hash over the contents of files in the order given, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weights_hash(folder: Path) -> str:
    """Of the weights of the model in a folder, in hex.

    Raises:
        ValueError: the folder has none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model: weights (*.safetensors) are not there")
    return sha256_files(files)


def sha256_tree(path: Path) -> str:
    """One hash over a file, or over a folder's files with their names and places in it, in hex.

    Hidden files and folders do not count: they are what tools leave beside the data.
    """
    if path.is_file():
        return sha256_files([path])
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    shown = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    return sha256_json({name: sha256_files([file]) for name, file in shown.items()})


def sha256_json(data: Any) -> str:
    """A hash of plain JSON data that does not depend on the order of keys, in hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()
