"""Prefect's tables in a new database: created once, then copied."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workspace import PREFECT, ROOT

# Creates the tables once with each of some settings, and prints how often migrations ran.
CREATE = """
import json, sys

from prefect import settings

from flows.runtime import applications

migrate, runs = applications._migrate, []
def counted(path):
    runs.append(1)
    migrate(path)
applications._migrate = counted
for changes in json.loads(sys.argv[1]):
    with settings.temporary_settings({getattr(settings, name): value for name, value in changes.items()}):
        applications.create_prefect_tables()
print("migrations:", len(runs))
"""


def create(home: Path, *settings: dict[str, Any]) -> str:
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in PREFECT}
    environment |= {"PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT), "LOTLIP_CACHE": str(home.parent / "cache")}
    command = [sys.executable, "-c", CREATE, json.dumps(settings or [{}])]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def content(home: Path) -> tuple[str, dict[str, int]]:
    """Revision of the tables, and number of rows of each."""
    database = sqlite3.connect(home / "prefect.db")
    try:
        ((revision,),) = database.execute("SELECT version_num FROM alembic_version").fetchall()
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return revision, {name: database.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0] for name in names}
    finally:
        database.close()


@pytest.mark.system
def test_a_new_database_is_a_copy_of_the_first_one(tmp_path):
    assert create(tmp_path / "first") == "migrations: 1"
    revision, rows = content(tmp_path / "first")
    assert revision and {"flow_run", "block_type"} <= set(rows)
    # created by Prefect's own command
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "own")}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert content(tmp_path / "own") == (revision, rows)
    with sqlite3.connect(tmp_path / "first" / "prefect.db") as used:  # copies have empty tables
        used.execute("CREATE TABLE mine (id)")
    used.close()
    assert create(tmp_path / "second") == "migrations: 0"
    assert content(tmp_path / "second") == (revision, rows)


@pytest.mark.system
def test_other_databases_are_migrated_by_prefect(tmp_path):
    (tmp_path / "home").mkdir()
    database = tmp_path / "home" / "prefect.db"
    database.write_bytes(b"as it was")
    assert create(tmp_path / "home") == "migrations: 0"
    assert database.read_bytes() == b"as it was"
    database.unlink()
    in_memory = ("sqlite+aiosqlite:///:memory:", "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true")
    others = [{"PREFECT_API_DATABASE_CONNECTION_URL": url} for url in in_memory]
    others += [{"PREFECT_API_DATABASE_MIGRATE_ON_START": False}]
    assert create(tmp_path / "home", *others) == "migrations: 0"
    assert not database.exists()
