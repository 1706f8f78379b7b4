"""Existing long captions, from tables with a row per image."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lotlip.caption.config import TableCaptionerConfig
from lotlip.caption.reasoning import cut_reasoning
from lotlip.core.files import sha256_files
from lotlip.data.keys import key_of, prefix_of, printable
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.rows import TABLES, as_name, find_tables, open_table, require
from lotlip.data.text import has_words, split_sub_captions


class TableCaptioner:
    """Looks captions up by image key, in the rows whose captioner is `name`.

    The rows are read once, into an SQLite file in TMPDIR that belongs to this process and vanishes with it, so memory
    does not grow with the table. An image without a row is a `Failure` of kind "missing"; a text without words is one
    of kind "empty". A row that cannot be read is skipped: its image has no row.

    Raises:
        ValueError: a file is missing, has another ending than `TABLES`, is broken, or lacks a column; there are no rows
            for this captioner, or two for one key.
    """

    prompt = ""

    def __init__(
        self,
        name: str,
        settings: TableCaptionerConfig,
        count_tokens: Callable[[str], int],
        _: object = None,  # how to work: there is nothing to choose
    ) -> None:
        self._name = name
        self._settings = settings
        self._path = settings.path
        self._count_tokens = count_tokens
        tables = _tables(settings.path, settings.images)
        self._texts = _TextIndex()
        self._skipped, self._first_skipped = 0, ""
        self._read(tables)
        if settings.path.is_dir():
            digest = sha256_files(tables)
        else:
            with settings.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.revision = f"sha256:{digest[:12]}"
        read_as = settings.model_dump(mode="json", exclude={"path", "images", "rewrites"})
        self.about: dict[str, Any] = {**read_as, "captioner_name": name, "revision": self.revision}

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption or failure for each image, in order."""
        for record in records:
            yield self._caption(record.key)

    def _caption(self, key: str) -> Caption | Failure:
        text = self._texts.get(key)
        if text is None:
            reason = f"no row has this key and the captioner {self._name}{self._unreadable()}"
            return Failure(key, str(self._path), reason, "missing")
        sub_captions = split_sub_captions(text)
        if not has_words(text):
            return Failure(key, str(self._path), f"the text of {self._name} has no words besides reasoning", "empty")
        return Caption(
            key, self._name, text, sub_captions, self._count_tokens(text), "stop", self.revision, self.prompt
        )

    def _unreadable(self) -> str:
        """A note about the rows that were skipped, "" if there are none."""
        return f"; rows that cannot be read: {self._skipped:,}, first {self._first_skipped}" if self._skipped else ""

    def _skip(self, path: Path, unit: str, number: int, reason: str) -> None:
        self._first_skipped = self._first_skipped or f"{printable(str(path))}: {unit} {number}: {reason}"
        self._skipped += 1

    def _read(self, tables: list[Path]) -> None:
        """Fills the index from all tables, and checks that keys are unambiguous."""
        others: set[str] = set()
        for path in tables:
            self._texts.add(self._rows(path, others))
        if not len(self._texts):
            names = ", ".join(sorted(others)) or "none"
            raise ValueError(
                f"{self._path} has no rows of the captioner {self._name!r} (it has: {names}){self._unreadable()}; "
                "use one of the table's names for the captioner in params.yaml, or set another table"
            )
        if ambiguous := self._texts.ambiguous():
            key, one, other = ambiguous
            raise ValueError(
                f"{self._path} has rows of {self._name} for {one} and for {other}, which have the same key {key}; "
                "rename one of the images, or remove the row of the one that is not in the data set"
            )
        repeated = self._texts.repeated() if self._settings.repeated == "error" else []
        if repeated:
            shown = ", ".join(repeated[:5]) + (", …" if len(repeated) > 5 else "")
            raise ValueError(
                f"{self._path} has more than one row of {self._name} for {len(repeated)} keys ({shown}); keep one row "
                "per key, or use the first one with `repeated: first`"
            )

    def _rows(self, path: Path, others: set[str]) -> Iterator[tuple[str, str | None, str]]:
        """Key, name (None if it is the key) and text of this captioner's rows.

        Names of other captioners are added to `others`.
        """
        from pyarrow import ArrowException

        settings, table = self._settings, open_table(path)
        texts = [settings.text] if isinstance(settings.text, str) else settings.text
        captioner = [] if settings.captioner is None else [settings.captioner]
        columns = [settings.key, *captioner, *texts]
        require(
            table, columns, f"a table of captions needs the columns {', '.join(columns)}, or others set in params.yaml"
        )
        prefix = prefix_of(path, settings.path)
        try:
            for row in table.rows(columns):
                if row.problem is not None:
                    self._skip(path, table.unit, row.number, row.problem[0])
                    continue
                key, *rest = row.values
                if not (name := as_name(key)):
                    continue  # no image
                if captioner and str(rest.pop(0)) != self._name:
                    others.add(str(row.values[1]))
                    continue
                nested = [column for column, text in zip(texts, rest, strict=True) if isinstance(text, dict | list)]
                if nested:
                    self._skip(path, table.unit, row.number, f"{', '.join(nested)} has nested values")
                    continue
                # null has no words
                parts = [cut_reasoning(str(text)) for text in rest if text is not None]
                name = f"{prefix}/{name.removeprefix('./')}" if prefix else name.removeprefix("./")
                made = key_of(as_name(key), prefix)
                # URLs are hashed, so no two of them share a key
                yield made, None if name == made or "://" in name else name, "\n".join(text for text in parts if text)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}; write it again") from error


class _TextIndex:
    """Key → text, in an SQLite file that is private to this process; safe to use from several threads.

    DuckDB, which finds the duplicates of ingest, takes over 100 times as long to look up one key.
    """

    def __init__(self) -> None:
        # "": a temporary file that SQLite creates and removes
        self._base = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()
        self._base.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;")
        self._base.execute("CREATE TABLE texts (key TEXT NOT NULL, name TEXT, text TEXT NOT NULL)")
        self._indexed = False

    def add(self, rows: Iterable[tuple[str, str | None, str]]) -> None:
        """Appends rows in order.

        Raises:
            OSError: the temporary folder is full.
        """
        with _in_temporary_folder():
            self._base.execute("BEGIN")
            self._base.executemany("INSERT INTO texts VALUES (?, ?, ?)", rows)
            self._base.execute("COMMIT")

    def __len__(self) -> int:
        (rows,) = self._base.execute("SELECT count(*) FROM texts").fetchone()
        return int(rows)

    def repeated(self) -> list[str]:
        """Keys with more than one row, in order of first occurrence."""
        self._index()
        sql = "SELECT key FROM texts GROUP BY key HAVING count(*) > 1 ORDER BY min(rowid)"
        return [key for (key,) in self._base.execute(sql)]

    def ambiguous(self) -> tuple[str, str, str] | None:
        """A key that rows with different names share, and two of these names; None if there is no such key."""
        self._index()
        sql = (
            "SELECT key, min(coalesce(name, key)), max(coalesce(name, key)) FROM texts "
            "WHERE key IN (SELECT key FROM texts GROUP BY key HAVING count(*) > 1) "
            "GROUP BY key HAVING min(coalesce(name, key)) <> max(coalesce(name, key)) LIMIT 1"
        )
        row: tuple[str, str, str] | None = self._base.execute(sql).fetchone()
        return row

    def get(self, key: str) -> str | None:
        """The text of the first row with a key; None if there is none."""
        with self._lock:
            self._index()
            row = self._base.execute("SELECT text FROM texts WHERE key = ? ORDER BY rowid LIMIT 1", [key]).fetchone()
        return None if row is None else str(row[0])

    def _index(self) -> None:
        # created after the rows, so that they are sorted only once
        if not self._indexed:
            with _in_temporary_folder():
                self._base.execute("CREATE INDEX by_key ON texts (key)")
            self._indexed = True


@contextmanager
def _in_temporary_folder() -> Iterator[None]:
    """Turns SQLite's error about a full disk, which names no path, into one that names the temporary folder."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", tempfile.gettempdir()) from error


def _tables(path: Path, images: Path | None) -> list[Path]:
    if not path.is_dir() and path.suffix.lower() not in TABLES:
        raise ValueError(f"{path}: a table of captions must end in {', '.join(TABLES)}; convert it")
    tables = find_tables(path, skip=images)
    if not tables or not tables[0].is_file():
        fault = "has no table" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {fault}; set `path` of this captioner in params.yaml to the table of captions")
    return tables
