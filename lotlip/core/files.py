"""Atomic writes, removal, publishing of folders, and hashes.

Nothing here removes or replaces a file or folder that this project did not create. It recognises its own files

- by place: everything inside a folder `.lotlip`, which is scratch, unless a link leads there;
- by name: unfinished files and folders end in `.lotlip-partial`, replaced ones in `.lotlip-old`;
- by record: a published folder lists its files in `.lotlip-files.json`;
- by memory: files that `atomic_write` wrote earlier in the same process.

All other modules remove and rename through this one; a test checks the sources for that rule.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lotlip.core.caches import lock

SCRATCH = ".lotlip"
PARTIAL = ".lotlip-partial"
ASIDE = ".lotlip-old"
RECORD = ".lotlip-files.json"

# Files up to this size are hashed at every check: that costs no more than reading their times.
_SMALL = 2**20


class ForeignFileError(ValueError):
    """A file or folder that would be removed or replaced was not created by this project."""


class Damaged(ValueError):
    """A published file is missing, or its contents are not those that its stage wrote."""


def not_a_file(path: Path) -> str:
    """Why a path cannot be read as a file: the rest of a message that begins with the path."""
    if path.is_dir():
        return "is a folder, not a file"
    return "is a device, pipe or socket, not a regular file" if path.exists() else "does not exist"


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends without an error.

    The block may write a file or a folder. If it raises, the partial output is removed and `path` is unchanged. The
    partial output of a killed process is removed by the next call, so only one process may write a path at a time.

    Raises:
        ForeignFileError: a folder would replace a file, a file would replace a folder, or a folder would replace one
            that this project did not create.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    try:
        yield partial
        _swap(partial, path)
    except BaseException:
        remove(partial)
        raise
    _remember(path)


def write_json(path: Path, data: Any) -> None:
    """Writes `data` atomically, with sorted keys, so that equal data gives equal bytes; paths become text.

    Raises:
        ValueError: `data` contains NaN or infinity, which JSON does not allow; the message names the file.
    """
    try:
        text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False, default=os.fspath)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from error
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"{path} is not JSON ({error}); remove it and run its stage again") from error


def check_free(path: Path, ours: Callable[[Path], bool], force: bool = False, option: str = "--out") -> None:
    """Checks, before any work is done, that a file can be written where a user wants it.

    Args:
        path: of the file.
        ours: tells whether an existing file is an earlier output of the same kind, which may be replaced.
        force: whether any regular file may be replaced.
        option: the command-line option with the path, for the message.

    Raises:
        ValueError: the path is a folder or a link, or its folder is not writable.
        ForeignFileError: the file exists and may not be replaced.
    """
    if path.name in ("", ".."):
        raise ValueError(f"{option} {path} is a folder; name a file")
    try:
        if path.is_symlink():
            raise ValueError(f"{option} {path} is a link; name the file that it points to")
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; name a file, such as {path / ('out' + path.suffix)}")
        if path.exists() and not path.is_file():
            raise ValueError(f"{option} {path} is not a regular file; name another file")
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise ValueError(f"{option} {path}: {parent} is not a folder; name another file")
        probe = parent / f".{os.getpid()}{path.name[-8:]}{PARTIAL}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        probe.unlink()
        with suppress(FileNotFoundError):  # fails if the longest name that will be written is too long
            (parent / (path.name + PARTIAL)).lstat()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}); name another file") from error
    if path.exists() and not force and not ours(path):
        raise ForeignFileError(
            f"{option} {path} exists and was not written by this command; name another file, or use --force to "
            "replace it"
        )


# --- removing -------------------------------------------------------------------------------------------------------


def remove(path: Path, ours: Callable[[Path], bool] | None = None) -> None:
    """Removes a file or a folder that this project created; does nothing if the path does not exist.

    A link is removed, never its target.

    Args:
        path: of the file or folder.
        ours: recognises a regular file by its contents, if it is not recognised by place, name, record or memory.

    Raises:
        ForeignFileError: this project did not create it, or not everything in it. Nothing was removed.
    """
    if path.name in ("", ".."):
        raise ForeignFileError(f"{path} is not removed: the path does not name a file or folder")
    if not os.path.lexists(path):
        return
    place = _place(path)
    if _is_scratch(place) or place.name.endswith((PARTIAL, ASIDE)):
        _delete(place)
        return
    if place.is_symlink() or not place.is_dir():
        regular = place.is_file() and not place.is_symlink()
        if not _is_remembered(place) and not (regular and ours and ours(place)):
            raise ForeignFileError(f"{path} is not removed: lotlip did not create it")
        place.unlink()
        return
    created = _created(place)
    if created is None:
        raise ForeignFileError(f"{path} is not removed: lotlip did not create it")
    _refuse_foreign(path, place, created)
    _delete_listed(place, created)


def remove_listed(folder: Path) -> list[str]:
    """Removes the files of a published folder that its record lists, and keeps the others.

    Args:
        folder: that a stage published.

    Returns:
        The names that were kept, relative to the folder; empty if the folder was removed.

    Raises:
        ForeignFileError: the folder has no record.
    """
    place = _place(folder)
    created = None if place.is_symlink() or not place.is_dir() else _created(place)
    if created is None:
        raise ForeignFileError(f"{folder} is not removed: lotlip did not create it")
    kept = _foreign(place, created)
    _delete_listed(place, created)
    return kept


def check_replaceable(folder: Path) -> None:
    """Checks that a folder may be replaced: it does not exist, is empty, or contains only files of this project.

    Raises:
        ForeignFileError: it may not; the message names the file in the way.
    """
    if not os.path.lexists(folder):
        return
    place = _place(folder)
    if place.is_symlink() or not place.is_dir():
        raise ForeignFileError(f"{folder} is a {'link' if place.is_symlink() else 'file'}, not a folder; move it away")
    if _is_scratch(place):
        return
    created = _created(place)
    if created is not None:
        _refuse_foreign(folder, place, created)
    elif next(place.iterdir(), None) is not None:
        raise ForeignFileError(
            f"{folder} is not empty, and lotlip did not create it; move it away, or name another folder. If an earlier "
            "version of lotlip wrote it, remove it yourself"
        )


def _refuse_foreign(path: Path, place: Path, created: _Tree) -> None:
    foreign = _foreign(place, created)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ForeignFileError(
            f"{path} contains {foreign[0]}{more}, which lotlip did not create; move it away, then try again"
        )


class _Tree(NamedTuple):
    """Names of files and folders inside a folder, relative to it."""

    files: frozenset[str]
    folders: frozenset[str]


def _created(place: Path) -> _Tree | None:
    """The files and folders that this project created in a folder; None if it did not create the folder."""
    if _is_remembered(place):
        return _remembered[place][1]
    try:
        record = read_record(place)
    except Damaged:
        return None
    # a copy of a published folder under another name belongs to the user
    if record is None or place.parts[-len(record.place.parts) :] != record.place.parts:
        return None
    return _Tree(frozenset([*record.files, RECORD]), frozenset(record.folders))


def _tree(folder: Path) -> _Tree:
    """All files and folders in a folder; a link counts as a file, whatever its target."""
    files: set[str] = set()
    folders: set[str] = set()
    for base, below, names in os.walk(folder):
        at = Path(base).relative_to(folder)
        links = [name for name in below if (Path(base) / name).is_symlink()]
        files.update((at / name).as_posix() for name in [*names, *links])
        folders.update((at / name).as_posix() for name in below if name not in links)
    return _Tree(frozenset(files), frozenset(folders))


def _foreign(place: Path, created: _Tree) -> list[str]:
    tree = _tree(place)
    return sorted((tree.files - created.files) | (tree.folders - created.folders))


def _delete_listed(place: Path, created: _Tree) -> None:
    """Removes the listed files, then the listed folders that are empty; never a link's target."""
    tree = _tree(place)
    for name in sorted(tree.files & created.files - {RECORD}):
        (place / name).unlink()
    for name in sorted(tree.folders & created.folders, reverse=True):
        _remove_empty(place / name)
    (place / RECORD).unlink(missing_ok=True)
    _remove_empty(place)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _place(path: Path) -> Path:
    """The resolved path of a file or link itself: links in its parent folders are followed, the last one is not."""
    return path.parent.resolve() / path.name


def _is_scratch(place: Path) -> bool:
    """Whether a resolved path is a project's scratch folder, or in it.

    Inside the working directory, which is the project's root, only the parts below the root count: the project itself
    may be in a folder of that name, as sweeps' checkouts are.
    """
    if place.name == SCRATCH and place.is_symlink():
        return False
    with suppress(FileNotFoundError, ValueError):  # the working directory was removed, or the path is outside it
        return SCRATCH in place.relative_to(Path.cwd().resolve()).parts
    return SCRATCH in place.parts


def _delete(place: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        place.unlink()
    else:
        shutil.rmtree(place)


# Files and folders that `atomic_write` wrote in this process outside of scratch: path → its identity and contents.
_remembered: dict[Path, tuple[tuple[int, ...], _Tree]] = {}


def _identity(place: Path) -> tuple[int, ...]:
    status = place.lstat()
    return (status.st_dev, status.st_ino) if place.is_dir() else (status.st_dev, status.st_ino, status.st_mtime_ns)


def _remember(path: Path) -> None:
    place = _place(path)
    if not _is_scratch(place):
        _remembered[place] = (_identity(place), _tree(place) if place.is_dir() else _Tree(frozenset(), frozenset()))


def _is_remembered(place: Path) -> bool:
    return place in _remembered and _remembered[place][0] == _identity(place)


# --- publishing -----------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A published file: its size in bytes and its sha256 in hex."""

    bytes: int
    sha256: str


class Record(NamedTuple):
    """The record of a published folder.

    Attributes:
        place: the folder's path, relative to the project.
        folders: names of all folders in it.
        files: name → size and hash.
        command: that wrote the folder; None: a stage.
    """

    place: PurePosixPath
    folders: list[str]
    files: dict[str, Entry]
    command: str | None = None


def write_record(folder: Path, place: Path, command: str | None = None) -> None:
    """Writes a record of a folder's files and hashes into it, so that it may be replaced and damage is detected.

    Args:
        folder: with all files to publish.
        place: where it will be published, relative to the project.
        command: that writes the folder again; None: a stage does.
    """
    remove(folder / RECORD, ours=lambda _: True)
    tree = _tree(folder)
    files = {name: _entry(folder / name)._asdict() for name in sorted(tree.files)}
    data = {"place": place.as_posix(), "folders": sorted(tree.folders), "files": files}
    write_json(folder / RECORD, data if command is None else {**data, "command": command})


def read_record(folder: Path) -> Record | None:
    """Reads the record of a published folder; None if the folder has no record.

    Raises:
        Damaged: the record cannot be read.
    """
    file = folder / RECORD
    if file.is_symlink() or not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        files = {str(name): Entry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        place = PurePosixPath(data["place"])
        if not place.parts:
            raise ValueError("place is empty")
        return Record(place, [str(name) for name in data["folders"]], files, data.get("command"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{file} cannot be read ({error!r}); {_remedy(folder)}") from error


def publish(new: Path, out: Path, place: Path | None = None) -> None:
    """Moves a finished folder to `out`, with a record of its files; replaces an earlier one.

    The old folder is set aside, the new one renamed, the old one removed. If the process is killed, `recover` finds the
    old or the new folder complete. A folder on another filesystem is copied beside `out` first.

    Raises:
        ForeignFileError: `out` contains a file that this project did not create.
    """
    write_record(new, place or out)
    out.parent.mkdir(parents=True, exist_ok=True)
    recover(out)
    try:
        _swap(new, out)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = out.with_name(out.name + PARTIAL)
        remove(beside)
        shutil.copytree(new, beside, symlinks=True)
        _swap(beside, out)
        remove(new)


def recover(path: Path) -> None:
    """Completes an interrupted replacement: removes the old folder if the new one is in place, else restores it."""
    aside = path.with_name(path.name + ASIDE)
    if os.path.lexists(aside):
        if os.path.lexists(path):
            remove(aside)
        else:
            aside.rename(path)
    remove(path.with_name(path.name + PARTIAL))


def move(source: Path, target: Path) -> None:
    """Renames a file or folder in scratch to an unused path in scratch.

    Raises:
        ForeignFileError: one of the two is not in scratch, or the target exists.
    """
    for path in (source, target):
        if not _is_scratch(_place(path)):
            raise ForeignFileError(f"{path} is not moved: it is not in {SCRATCH}")
    if os.path.lexists(target):
        raise ForeignFileError(f"{source} is not moved: {target} exists")
    source.rename(target)


def _swap(new: Path, path: Path) -> None:
    """Renames `new` to `path`; an existing folder is set aside until `new` is in place."""
    if path.is_symlink() and new.is_dir():
        raise ForeignFileError(
            f"{path} is a link, and folders are not written through links; remove it, or name another folder"
        )
    if not path.is_dir() or path.is_symlink():
        if new.is_dir() and path.exists():
            raise ForeignFileError(f"{path} is a file, but a folder must be written there; move it away")
        new.replace(path)
        return
    if not new.is_dir():
        raise ForeignFileError(f"{path} is a folder, but a file must be written there; move it away")
    check_replaceable(path)
    aside = path.with_name(path.name + ASIDE)
    remove(aside)
    path.rename(aside)
    try:
        new.rename(path)
    except OSError:
        aside.rename(path)
        raise
    remove(aside)


def check_files(folder: Path, within: str = "", hash_cache: Path | None = None, skip: str = "") -> None:
    """Compares a published folder with its record; a folder without a record is not checked.

    Args:
        folder: that was published.
        within: checks only files whose names begin with this.
        hash_cache: a file that stores the size and times of hashed files; a large file is hashed again only if these
            have changed. Without it every file is hashed.
        skip: files of this name, in any folder, are not checked.

    Raises:
        Damaged: a file is missing or its contents have changed.
    """
    record = read_record(folder)
    if record is None:
        return
    known = _read_hash_cache(hash_cache) if hash_cache else {}
    checked: dict[str, list[Any]] = {}
    for name, entry in record.files.items():
        if not name.startswith(within) or PurePosixPath(name).name == skip:
            continue
        try:
            status = (folder / name).stat()
            signature = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256]
            same = status.st_size == entry.bytes
            if same and (hash_cache is None or status.st_size <= _SMALL or known.get(name) != signature):
                same = _entry(folder / name).sha256 == entry.sha256
        except FileNotFoundError:
            raise Damaged(f"{folder / name} is missing; {_remedy(folder, record.command)}") from None
        if not same:
            writer = f"`{record.command}`" if record.command else "its stage"
            remedy = _remedy(folder, record.command)
            raise Damaged(f"{folder / name} is damaged: it is not what {writer} wrote; {remedy}")
        checked[name] = signature
    if hash_cache and (known | checked) != known:
        with _locked(hash_cache):
            write_json(hash_cache, _read_hash_cache(hash_cache) | checked)


def fill_hash_cache(folder: Path, hash_cache: Path) -> None:
    """Stores the size and times of newly published files, so that `check_files` does not hash them again."""
    record = read_record(folder)
    if record is None:
        return
    signatures: dict[str, list[Any]] = {}
    for name, entry in record.files.items():
        status = (folder / name).stat()
        if status.st_size == entry.bytes:
            signatures[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256]
    with _locked(hash_cache):
        write_json(hash_cache, signatures)


def _read_hash_cache(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (FileNotFoundError, ValueError):
        return {}


def _locked(hash_cache: Path) -> AbstractContextManager[None]:
    """Keeps stages that read the same folder from writing its hash cache at the same time."""
    return lock(hash_cache.with_suffix(".lock"), wait=True)


def check_model(folder: Path, hash_cache: Callable[[Path], Path] | None = None) -> None:
    """Compares a saved model with the record of its folder, or of the ablation's folder that contains it.

    The model card may have been edited: it decides nothing.

    Args:
        folder: of the model.
        hash_cache: folder with the record → its hash cache, as for `check_files`.

    Raises:
        Damaged: a file is missing or its contents have changed.
    """
    folder = folder.resolve()
    for base, within in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if read_record(base) is not None:
            check_files(base, within, hash_cache(base) if hash_cache else None, skip="README.md")
            return


def _entry(file: Path) -> Entry:
    with file.open("rb") as opened:
        return Entry(os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def _remedy(folder: Path, command: str | None = None) -> str:
    if command:
        return f"write {folder} again with `{command}` and --force"
    return f"restore it with `dvc checkout --force {folder}`, or rerun the stage that writes it"


# --- hashes ---------------------------------------------------------------------------------------------------------


def sha256_files(paths: Iterable[Path]) -> str:
    """One hash over the contents of files in the given order, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weights_hash(folder: Path) -> str:
    """The hash of a model's weights, in hex.

    Raises:
        ValueError: the folder has no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model: it contains no weights (*.safetensors)")
    return sha256_files(files)


def sha256_tree(path: Path, skip: str | None = None) -> str:
    """One hash over a file, or over a folder's files and their relative paths, in hex.

    Hidden files and folders are skipped: tools leave them beside the data.

    Args:
        path: of the file or folder.
        skip: a file of the folder that is not hashed.
    """
    if path.is_file():
        return sha256_files([path])
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    files.pop(skip or "", None)
    shown = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    return sha256_json({name: sha256_files([file]) for name, file in shown.items()})


def sha256_json(data: Any) -> str:
    """A hash of JSON data that does not depend on the order of keys, in hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()
