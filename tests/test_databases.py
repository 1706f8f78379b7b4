"""New databases are copies of one that is kept."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import pytest

from lotlip.core import databases
from lotlip.core.databases import create_database

Migrations = list[Path]


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Migrations:
    """The files that `migrate` has created; the cache is empty."""
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "cache"))
    return []


def create(path: Path, migrations: Migrations) -> None:
    def migrate(new: Path) -> None:
        migrations.append(new)
        with closing(sqlite3.connect(new)) as database:
            database.executescript(
                "CREATE TABLE runs (name); CREATE TABLE places (name); INSERT INTO places VALUES (1)"
            )

    create_database(path, "tables-1", migrate, "DELETE FROM places")


def content(path: Path) -> list[list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as database:
        return [database.execute(f"SELECT * FROM {table}").fetchall() for table in ("runs", "places")]


def write(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("INSERT INTO runs VALUES ('mine')")
        database.commit()


def test_migrations_run_once(tmp_path, migrations):
    for name in ("first.db", "new/folder/second.db"):
        create(tmp_path / name, migrations)
        assert content(tmp_path / name) == [[], []]
        write(tmp_path / name)
    assert len(migrations) == 1
    assert not migrations[0].exists()


def test_an_existing_database_stays(tmp_path, migrations):
    create(tmp_path / "a.db", migrations)
    write(tmp_path / "a.db")
    create(tmp_path / "a.db", migrations)
    assert content(tmp_path / "a.db") == [[("mine",)], []]


def test_a_link_to_a_missing_file_stays(tmp_path, migrations):
    (tmp_path / "link.db").symlink_to(tmp_path / "large-disk.db")
    create(tmp_path / "link.db", migrations)
    assert (tmp_path / "link.db").is_symlink()
    assert content(tmp_path / "large-disk.db") == [[], []]


@pytest.mark.parametrize("damage", [b"", b"garbage" * 1000])
def test_a_damaged_kept_database_is_made_again(tmp_path, migrations, damage):
    create(tmp_path / "first.db", migrations)
    (kept,) = (tmp_path / "cache" / "databases").glob("*.db")
    kept.write_bytes(damage)
    create(tmp_path / "second.db", migrations)
    assert content(tmp_path / "second.db") == [[], []]
    assert len(migrations) == 2


def test_a_failing_migration_leaves_nothing(tmp_path, migrations):
    def fail(new: Path) -> None:
        new.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        create_database(tmp_path / "a.db", "tables-1", fail)
    assert not (tmp_path / "a.db").exists()
    assert not list((tmp_path / "cache" / "databases").glob("*.db*"))


def test_a_failing_copy_leaves_nothing(tmp_path, migrations, monkeypatch):
    create(tmp_path / "first.db", migrations)

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(databases, "_copy", fail)
    with pytest.raises(OSError, match="disk full"):
        create(tmp_path / "a.db", migrations)
    assert not (tmp_path / "a.db").exists()


def test_an_interrupted_copy_ends_as_interrupted(tmp_path, migrations, monkeypatch):
    create(tmp_path / "first.db", migrations)
    copy = databases._copy

    def interrupted(source: Path, target: Path) -> None:
        copy(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(databases, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "a.db", migrations)
    assert content(tmp_path / "a.db") == [[], []]


def test_a_database_that_another_program_creates_meanwhile_stays(tmp_path, migrations):
    path = tmp_path / "a.db"

    def migrate(new: Path) -> None:
        create(path, migrations)
        write(path)
        sqlite3.connect(new).close()

    create_database(path, "tables-2", migrate)
    assert content(path) == [[("mine",)], []]


def create_and_write(path: Path) -> None:
    create(path, [])
    with closing(sqlite3.connect(path, timeout=60)) as database:
        database.execute("INSERT INTO runs VALUES ('mine')")
        database.commit()


def test_several_processes_create_one_database(tmp_path, migrations):
    processes = [get_context("fork").Process(target=create_and_write, args=[tmp_path / "a.db"]) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert content(tmp_path / "a.db") == [[("mine",)] * 4, []]
