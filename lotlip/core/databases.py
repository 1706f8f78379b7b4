"""New SQLite databases with the tables of Prefect or MLflow.

Migrations take seconds, so each user keeps an empty database, of which later ones are copies.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from lotlip.core.caches import cache_folder, lock, private_folder
from lotlip.core.files import ForeignFileError, atomic_write, remove
from lotlip.core.temporary import temporary_folder


def create_database(path: Path, name: str, migrate: Callable[[Path], object], clean: str = "") -> None:
    """Creates a database, unless the file exists.

    Args:
        path: the new file, or a link to it.
        name: says whose tables these are and of which version; an empty database is kept under this name.
        migrate: creates a file with these tables; called if none is kept.
        clean: SQL that removes rows that depend on where `migrate` ran.
    """
    path = path.resolve()
    if path.exists() and path.stat().st_size:  # an empty file may be one that is being copied
        return
    kept = private_folder(cache_folder() / "databases") / f"{name}.db"
    with lock(kept.with_suffix(".lock"), wait=True):
        if path.exists():
            return
        if not _is_intact(kept):
            with temporary_folder("database") as folder, atomic_write(kept) as partial:
                migrate(folder / "new.db")
                _copy(folder / "new.db", partial)
                with closing(sqlite3.connect(partial)) as copy:
                    copy.executescript(clean)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:  # another user of the folder was faster
            return
        try:
            _copy(kept, path)  # one transaction: a kill leaves an empty file, in which its owner creates the tables
        except BaseException:
            with suppress(ForeignFileError):  # not empty: it is complete, or SQLite's journal makes it empty again
                remove(path, ours=_is_empty)
            raise


def _is_empty(file: Path) -> bool:
    return not file.stat().st_size


def _is_intact(database: Path) -> bool:
    if not database.is_file() or not database.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(database)) as opened:
            return bool(opened.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as original, closing(sqlite3.connect(target)) as copy:
        original.backup(copy)
