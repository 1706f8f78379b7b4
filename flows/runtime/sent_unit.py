"""A unit of work for a worker without the project's folder: its files are sent with it, and its outputs come back."""

from __future__ import annotations

import atexit
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lotlip.core.code import code_hash
from lotlip.core.files import atomic_write, remove
from lotlip.core.temporary import temporary_folder
from lotlip.data.paths import file_state
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.data.token_ids import forget_word_pieces
from lotlip.data.work import Ranges, UnitFiles

# Path in the project → offset and bytes of a file's parts; None for a folder.
Files = dict[str, list[tuple[int, bytes]] | None]

_alone = threading.Lock()  # the current folder is that of all threads of a process


@dataclass(frozen=True)
class SentUnit:
    """A unit with its files.

    Attributes:
        work: the object whose method `write` writes the unit.
        unit: the unit.
        code: hash of the code that decides the outputs.
        run: names the files that all units read.
        elsewhere: files that are not in the project, so they are not sent.
        files: the others.
        writes: files that come back.
    """

    work: Any
    unit: Any
    code: str
    run: str
    elsewhere: Sequence[Path]
    files: Files
    writes: Sequence[Path]

    @classmethod
    def of(cls, work: Any, unit: Any, files: UnitFiles, run: str) -> SentUnit:
        """Reads the files of a unit.

        Raises:
            NonRetryableError: it writes outside of the project.
        """
        if outside := [path for path in files.writes if _is_outside(path)]:
            raise NonRetryableError(
                f"{outside[0].parent} is not a path relative to the project's folder, and compute.shared_folder is "
                "false; set the path in params.yaml to a folder in the project, which may be a link, or give the "
                "workers a shared folder"
            )
        elsewhere = [path for path in (*files.common, *files.reads) if _is_outside(path) and _exists(path)]
        return cls(work, unit, _code(work), run, elsewhere, pack(files.reads), files.writes)

    def call(self, common: Files) -> tuple[list[UnitReport], Files]:
        """Writes the unit in a temporary folder. Returns its reports and the files that it wrote."""
        here = socket.gethostname()
        if missing := [path for path in self.elsewhere if not _exists(path)]:
            raise NonRetryableError(
                f"worker {here} has no {missing[0]}, which is not sent because it is not a path relative to the "
                "project's folder; put it on all nodes under this path, or a link to it into the project, and name "
                "that in params.yaml"
            )
        if _code(self.work) != self.code:
            raise NonRetryableError(f"worker {here} has other code than this project; install the same on all nodes")
        with _alone, temporary_folder("unit") as folder, chdir(folder):
            kept = _keep(self.run, common)
            for name, parts in common.items():
                path = Path(name) if parts is None else Path(name).parent
                path.mkdir(parents=True, exist_ok=True)
                if parts is not None:
                    Path(name).symlink_to(kept / name)
            unpack(self.files, Path())
            before = {path: file_state(path) for path in self.writes}
            reports = self.work.write(self.unit)
            return reports, pack({path: None for path, state in before.items() if file_state(path) != state})


def pack(paths: Mapping[Path, Ranges | None]) -> Files:
    """Reads the files that exist and are in the project, and all files of folders."""
    files: Files = {}
    for path, ranges in paths.items():
        if _is_outside(path) or not _exists(path):
            continue
        if path.is_dir():
            files[path.as_posix()] = None
        for file in _files_in(path):
            with suppress(PermissionError), file.open("rb") as opened:  # the unit reports it as missing
                files[file.as_posix()] = [_part(opened, *part) for part in ([(0, -1)] if ranges is None else ranges)]
    return files


def _part(file: IO[bytes], offset: int, size: int) -> tuple[int, bytes]:
    file.seek(offset)
    return offset, file.read(size)


def unpack(files: Files, folder: Path) -> None:
    """Writes files below a folder. One of which only parts were sent has holes elsewhere."""
    for name, parts in files.items():
        (folder / name if parts is None else (folder / name).parent).mkdir(parents=True, exist_ok=True)
        if parts is not None:
            with (folder / name).open("wb") as opened:
                for at, data in parts:
                    opened.seek(at)
                    opened.write(data)


def accept(written: Files, files: UnitFiles) -> None:
    """Writes the files that came back, each atomically, and removes those of an earlier version of the unit.

    Raises:
        NonRetryableError: a file came back that the unit does not write.
    """
    if others := written.keys() - {path.as_posix() for path in files.writes}:
        raise NonRetryableError(f"a worker sent {sorted(others)[0]!r}, which its unit does not write")
    for path in files.writes:
        if parts := written.get(path.as_posix()):
            with atomic_write(path) as partial:
                partial.write_bytes(b"".join(data for _, data in parts))
        elif path not in files.reads:  # what was sent and did not come back is unchanged
            remove(path)


def _is_outside(path: Path) -> bool:
    return path.is_absolute() or ".." in path.parts


def _exists(path: Path) -> bool:
    return not isinstance(file_state(path), str)  # Path.exists raises if no file can have the name


def _files_in(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for base, _, names in os.walk(path, followlinks=True):
        yield from (file for name in names if (file := Path(base, name)).is_file())


def _code(work: Any) -> str:
    return code_hash(type(work).__module__.split(".")[1])  # the stage's package in `lotlip`


_kept: tuple[str, Path] | None = None
_folders = ExitStack()
atexit.register(_folders.close)


def _keep(run: str, files: Files) -> Path:
    """A folder with the files that all units read; a model that is opened once stays open."""
    global _kept
    if _kept is None or _kept[0] != run:
        _kept = None
        _folders.close()
        forget_word_pieces()  # of the last run's tokenizer, which may have another content under the same name
        folder = _folders.enter_context(temporary_folder("units"))
        unpack(files, folder)
        _kept = run, folder
    return _kept[1]
