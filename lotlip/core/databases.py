"""New SQLite databases with the tables of Prefect or MLflow.

Migrations take seconds, so each user keeps an empty database, of which later ones are copies.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from lotlip.core.caches import cache_folder, lock, private_folder
from lotlip.core.files import atomic_write


def create_database(path: Path, name: str, migrate: Callable[[], object], clean: str = "") -> None:
    """Creates a database, unless the file exists.

    Args:
        path: the new file.
        name: says whose tables these are and of which version; an empty database is kept under this name.
        migrate: creates `path` by migrations; called if no database is kept yet.
        clean: SQL that deletes the rows that `migrate` writes and that depend on `path`; their owner writes them again.
    """
    kept = private_folder(cache_folder() / "databases") / f"{name}.db"
    with lock(kept.with_suffix(".lock"), wait=True):
        if path.exists():
            return
        if kept.is_file():
            _copy(kept, path)
            return
        migrate()
        with closing(sqlite3.connect(path)) as created:
            created.executescript(clean)
        _copy(path, kept)


def _copy(source: Path, target: Path) -> None:
    with (
        atomic_write(target) as partial,
        closing(sqlite3.connect(source)) as original,
        closing(sqlite3.connect(partial)) as copy,
    ):
        original.backup(copy)
