"""Atomic writes, removal, publishing of folders, and hashes.

Nothing here removes or replaces a file or folder that this project did not create. It knows its own

- by place: whatever is inside a folder `.lotlip`, which is scratch, without passing through a link;
- by name: unfinished files and folders, which end in `.lotlip-partial`, and replaced ones, in `.lotlip-old`;
- by record: a published folder lists its files in `.lotlip-files.json`;
- by memory: what `whole` wrote earlier in the same process.

All other modules remove and rename through this one; a test compares the sources with that rule.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

SCRATCH = ".lotlip"
PARTIAL = ".lotlip-partial"
ASIDE = ".lotlip-old"
RECORD = ".lotlip-files.json"

# Files up to this size are hashed at every check: it costs no more than the look at their times.
_SMALL = 2**20


class NotOurs(ValueError):
    """A file or folder stands where something would be removed or written, and this project did not create it."""


class Damaged(ValueError):
    """A published file is missing or has other contents than its stage wrote."""


def not_a_file(path: Path) -> str:
    """Why a path cannot be read as a file, to follow its name in a message."""
    if path.is_dir():
        return "is a folder, not a file"
    return "is not a regular file, but a device, pipe or socket" if path.exists() else "is not there"


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; renames it to `path` when the block ends without an error.

    The name may be used for a file or for a folder. When the block raises, what was written is removed and `path` is
    as it was. What a killed process left behind is cleared at the next try.

    Raises:
        NotOurs: a folder would replace a file, a file a folder, or a folder one that this project did not create.
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
    """Writes `data` whole, with sorted keys, so that equal data gives equal bytes; paths become text.

    Raises:
        ValueError: `data` has NaN or infinity, which JSON has not; the message names the file.
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
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON ({error}); remove it and run its stage again") from error


def check_free(path: Path, ours: Callable[[Path], bool], force: bool = False, option: str = "--out") -> None:
    """Checks, before any work is done, that a file can be written where a user wants it.

    Args:
        path: of the file.
        ours: whether an existing file is an earlier output of the same kind, which may be replaced.
        force: replace any regular file.
        option: that named the file, for the message.

    Raises:
        ValueError: the path is a folder or a link, or its folder cannot be written to.
        NotOurs: another file is there.
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
        with suppress(FileNotFoundError):  # the longest name that will be written
            (parent / (path.name + PARTIAL)).lstat()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}); name another file") from error
    if path.exists() and not force and not ours(path):
        raise NotOurs(
            f"{option} {path} is a file that this command did not write; name another file, or replace it with --force"
        )


# --- removing -------------------------------------------------------------------------------------------------------


def remove(path: Path, ours: Callable[[Path], bool] | None = None) -> None:
    """Removes a file or a folder that this project created; does nothing when there is none.

    A link is removed, never what it points to.

    Args:
        path: of the file or folder.
        ours: recognises a regular file by its contents, where neither place, name, record nor memory does.

    Raises:
        NotOurs: this project did not create it, or not all that is in it. Nothing was removed.
    """
    if path.name in ("", ".."):
        raise NotOurs(f"{path} is not removed: it is not the name of something in a folder")
    if not os.path.lexists(path):
        return
    place = _place(path)
    if _is_scratch(place) or place.name.endswith((PARTIAL, ASIDE)):
        _delete(place)
        return
    if place.is_symlink() or not place.is_dir():
        regular = place.is_file() and not place.is_symlink()
        if not _is_remembered(place) and not (regular and ours and ours(place)):
            raise NotOurs(f"{path} is not removed: lotlip did not create it")
        place.unlink()
        return
    own = _own(place)
    if own is None:
        raise NotOurs(f"{path} is not removed: lotlip did not create it")
    _refuse_foreign(path, place, own)
    _delete_listed(place, own)


def remove_own(folder: Path) -> list[str]:
    """Removes those files of a published folder that its record lists, and keeps the others.

    Args:
        folder: that a stage published.

    Returns:
        The names of what was kept, relative to the folder; empty when the folder is gone.

    Raises:
        NotOurs: the folder has no record.
    """
    place = _place(folder)
    own = None if place.is_symlink() or not place.is_dir() else _own(place)
    if own is None:
        raise NotOurs(f"{folder} is not removed: lotlip did not create it")
    kept = _foreign(place, own)
    _delete_listed(place, own)
    return kept


def check_replaceable(folder: Path) -> None:
    """Checks that a folder may be replaced: it is missing, empty, or all in it was created by this project.

    Raises:
        NotOurs: it may not; the message names what is in the way.
    """
    if not os.path.lexists(folder):
        return
    place = _place(folder)
    if place.is_symlink() or not place.is_dir():
        raise NotOurs(f"{folder} is a {'link' if place.is_symlink() else 'file'}, not a folder; move it away")
    if _is_scratch(place):
        return
    own = _own(place)
    if own is not None:
        _refuse_foreign(folder, place, own)
    elif next(place.iterdir(), None) is not None:
        raise NotOurs(
            f"{folder} is a folder that lotlip did not create, and it is not empty; move it away, or name another "
            "folder. If an earlier version of lotlip wrote it, remove it yourself"
        )


def _refuse_foreign(path: Path, place: Path, own: _Own) -> None:
    foreign = _foreign(place, own)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise NotOurs(f"{path} contains {foreign[0]}{more}, which lotlip did not create; move it away, then try again")


class _Own(NamedTuple):
    """Names of the files and folders in a folder that this project created, relative to it."""

    files: frozenset[str]
    folders: frozenset[str]


def _own(place: Path) -> _Own | None:
    """What this project created in a folder; None where it did not create the folder."""
    if _is_remembered(place):
        return _remembered[place][1]
    try:
        record = read_record(place)
    except Damaged:
        return None
    # a copy of a published folder, under another name, is the user's
    if record is None or place.parts[-len(record.place.parts) :] != record.place.parts:
        return None
    return _Own(frozenset([*record.files, RECORD]), frozenset(record.folders))


def _tree(folder: Path) -> _Own:
    """All files and folders in a folder; a link counts as a file, whatever it points to."""
    files: set[str] = set()
    folders: set[str] = set()
    for base, below, names in os.walk(folder):
        at = Path(base).relative_to(folder)
        links = [name for name in below if (Path(base) / name).is_symlink()]
        files.update((at / name).as_posix() for name in [*names, *links])
        folders.update((at / name).as_posix() for name in below if name not in links)
    return _Own(frozenset(files), frozenset(folders))


def _foreign(place: Path, own: _Own) -> list[str]:
    there = _tree(place)
    return sorted((there.files - own.files) | (there.folders - own.folders))


def _delete_listed(place: Path, own: _Own) -> None:
    """Removes the files that are listed, then the folders that are empty; never what a link points to."""
    there = _tree(place)
    for name in sorted(there.files & own.files - {RECORD}):
        (place / name).unlink()
    for name in sorted(there.folders & own.folders, reverse=True):
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
    """Where a file or link itself is: the links on the way to it are followed, it is not."""
    return path.parent.resolve() / path.name


def _is_scratch(place: Path) -> bool:
    """Whether a resolved place is a project's scratch, or in it.

    Of a place in the working directory, which is the project's root, only the parts below it count: the project itself
    may be in a folder of that name, as those of sweeps are.
    """
    if place.name == SCRATCH and place.is_symlink():
        return False
    with suppress(FileNotFoundError, ValueError):  # no working directory any more; a place outside of it
        return SCRATCH in place.relative_to(Path.cwd().resolve()).parts
    return SCRATCH in place.parts


def _delete(place: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        place.unlink()
    else:
        shutil.rmtree(place)


# What `whole` wrote in this process outside of scratch: place → its identity, and what is in it where it is a folder.
_remembered: dict[Path, tuple[tuple[int, ...], _Own]] = {}


def _identity(place: Path) -> tuple[int, ...]:
    status = place.lstat()
    return (status.st_dev, status.st_ino) if place.is_dir() else (status.st_dev, status.st_ino, status.st_mtime_ns)


def _remember(path: Path) -> None:
    place = _place(path)
    if not _is_scratch(place):
        _remembered[place] = (_identity(place), _tree(place) if place.is_dir() else _Own(frozenset(), frozenset()))


def _is_remembered(place: Path) -> bool:
    return place in _remembered and _remembered[place][0] == _identity(place)


# --- publishing -----------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A published file: bytes and sha256 in hex."""

    bytes: int
    sha256: str


class Record(NamedTuple):
    """What was published in a folder.

    Attributes:
        place: where, relative to the project.
        folders: names of all folders in it.
        files: name → what was written.
    """

    place: PurePosixPath
    folders: list[str]
    files: dict[str, Entry]


def write_record(folder: Path, place: Path) -> None:
    """Lists a folder's files with their hashes in it, so that it may be replaced later and damage is noticed.

    Args:
        folder: with all that is published.
        place: where it is published, relative to the project.
    """
    remove(folder / RECORD, ours=lambda _: True)
    tree = _tree(folder)
    files = {name: _entry(folder / name)._asdict() for name in sorted(tree.files)}
    write_json(folder / RECORD, {"place": place.as_posix(), "folders": sorted(tree.folders), "files": files})


def read_record(folder: Path) -> Record | None:
    """What was published in a folder; None where nothing was.

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
        return Record(place, [str(name) for name in data["folders"]], files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{file} cannot be read ({error!r}); {_remedy(folder)}") from error


def publish(new: Path, out: Path, place: Path | None = None) -> None:
    """Puts a finished folder in its place, with a record of its files; what was there before is replaced.

    The old folder is set aside, the new one renamed, the old one removed. Whenever the process is killed, `recover`
    finds the old or the new folder whole. A folder of another filesystem is copied beside `out` first.

    Raises:
        NotOurs: `out` has something in it that this project did not create.
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
    """Completes a replacement that was interrupted: the old folder is put back, or removed where the new one is."""
    aside = path.with_name(path.name + ASIDE)
    if os.path.lexists(aside):
        if os.path.lexists(path):
            remove(aside)
        else:
            aside.rename(path)
    remove(path.with_name(path.name + PARTIAL))


def move(source: Path, target: Path) -> None:
    """Renames something in scratch to a name that is free there.

    Raises:
        NotOurs: one of the two is not in scratch, or the target exists.
    """
    for path in (source, target):
        if not _is_scratch(_place(path)):
            raise NotOurs(f"{path} is not moved: it is not in {SCRATCH}")
    if os.path.lexists(target):
        raise NotOurs(f"{source} is not moved: {target} exists")
    source.rename(target)


def _swap(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder that is there is set aside until `new` is in its place."""
    if path.is_symlink() and new.is_dir():
        raise NotOurs(f"{path} is a link; a folder is not written through it. Remove the link, or name another folder")
    if not path.is_dir() or path.is_symlink():
        if new.is_dir() and path.exists():
            raise NotOurs(f"{path} is a file, where a folder is to be written; move it away")
        new.replace(path)
        return
    if not new.is_dir():
        raise NotOurs(f"{path} is a folder, where a file is to be written; move it away")
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


def check_files(folder: Path, within: str = "", memory: Path | None = None) -> None:
    """Compares a published folder with its record; a folder without a record is not checked.

    Args:
        folder: that was published.
        within: only files whose names begin with this.
        memory: a file that remembers size and times of what was hashed; a large file is hashed again only where they
            have changed. Without it everything is hashed.

    Raises:
        Damaged: a file is missing or has other contents.
    """
    record = read_record(folder)
    if record is None:
        return
    known: dict[str, Any] = {}
    if memory and memory.is_file():
        try:
            known = dict(read_json(memory))
        except ValueError:
            known = {}
    seen: dict[str, list[Any]] = {}
    for name, entry in record.files.items():
        if not name.startswith(within):
            continue
        try:
            status = (folder / name).stat()
            looks = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256]
            same = status.st_size == entry.bytes
            if same and (memory is None or status.st_size <= _SMALL or known.get(name) != looks):
                same = _entry(folder / name).sha256 == entry.sha256
        except FileNotFoundError:
            raise Damaged(f"{folder / name} is missing; {_remedy(folder)}") from None
        if not same:
            raise Damaged(f"{folder / name} is damaged: it is not what its stage wrote; {_remedy(folder)}")
        seen[name] = looks
    if memory and (known | seen) != known:
        write_json(memory, known | seen)


def note_files(folder: Path, memory: Path) -> None:
    """Remembers size and times of what was just published, so that `check_files` need not hash it again."""
    record = read_record(folder)
    if record is None:
        return
    seen: dict[str, list[Any]] = {}
    for name, entry in record.files.items():
        status = (folder / name).stat()
        if status.st_size == entry.bytes:
            seen[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256]
    write_json(memory, seen)


def check_model(folder: Path, memory: Callable[[Path], Path] | None = None) -> None:
    """Compares a saved model with the record of its folder, or of the ablation's folder that it is in.

    Args:
        folder: of the model.
        memory: as of `check_files`, for the folder that has the record.

    Raises:
        Damaged: a file is missing or has other contents.
    """
    folder = folder.resolve()
    for base, within in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if read_record(base) is not None:
            check_files(base, within, memory(base) if memory else None)
            return


def _entry(file: Path) -> Entry:
    with file.open("rb") as opened:
        return Entry(os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def _remedy(folder: Path) -> str:
    return f"restore it with `dvc checkout --force {folder}`, or run the stage that writes it again"


# --- hashes ---------------------------------------------------------------------------------------------------------


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
