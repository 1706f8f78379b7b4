"""Temporary folders are removed after use, and those of killed processes at the next start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lotlip.core import temporary
from lotlip.core.temporary import temporary_folder

HOLD = """
import sys, time
from lotlip.core.temporary import temporary_folder

with temporary_folder("held") as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_removed_with_its_contents(base: Path) -> None:
    with temporary_folder("test") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert folder.parent == base
    assert list(base.iterdir()) == []


def test_a_folder_is_removed_after_an_error(base: Path) -> None:
    with pytest.raises(KeyError), temporary_folder("test"):
        raise KeyError
    assert list(base.iterdir()) == []


def test_a_folder_may_be_removed_by_another_program_at_the_end(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is free for a moment before it is removed."""
    locked = temporary._locked

    @contextmanager
    def then_cleared(folder: Path) -> Iterator[None]:
        with locked(folder):
            yield
        monkeypatch.setattr(temporary, "_locked", locked)
        temporary._clear_abandoned(base)

    monkeypatch.setattr(temporary, "_locked", then_cleared)
    with temporary_folder("test"):
        pass
    assert list(base.iterdir()) == []


@pytest.mark.integration
def test_the_next_folder_removes_only_those_of_killed_processes(base: Path) -> None:
    (base / "lotlip-mine").mkdir()
    (base / "lotlip-mine" / "notes").write_text("x")
    environment = {**os.environ, "TMPDIR": str(base)}
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            held = Path(holder.stdout.readline().strip())
            with temporary_folder("test"):
                assert (held / "file").is_file()  # its owner is alive
        finally:
            holder.kill()
    assert held.is_dir()
    with temporary_folder("test"):
        assert not held.exists()
    assert [path.name for path in base.iterdir()] == ["lotlip-mine"]


def test_only_one_module_creates_temporary_folders() -> None:
    root = Path(__file__).parents[1]
    users = [
        path.relative_to(root).as_posix()
        for package in ("lotlip", "flows")
        for path in (root / package).rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in ("TemporaryDirectory", "mkdtemp", "mkstemp"))
    ]
    assert users == ["lotlip/core/temporary.py"]


SOCKET = """
from multiprocessing.connection import Listener
from multiprocessing.util import get_temp_dir
from lotlip.core.temporary import multiprocessing_folder

with multiprocessing_folder():
    Listener(family="AF_UNIX").close()
    print(get_temp_dir())
"""


@pytest.mark.integration
@pytest.mark.parametrize("length", [10, 94])
def test_multiprocessing_works_with_any_tmpdir_and_leaves_no_file(tmp_path: Path, length: int) -> None:
    base = tmp_path / ("x" * length)
    base.mkdir()
    environment = {**os.environ, "TMPDIR": str(base)}
    command = [sys.executable, "-c", SOCKET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()
    assert list(base.iterdir()) == []
