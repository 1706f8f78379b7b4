"""lotlip.core.caches: the user's cache folder and lock files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lotlip.core import caches
from lotlip.core.caches import Locked, cache_folder, lock


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOTLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)


def test_the_configured_folder_has_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_configured_folder_that_is_a_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "mine"))
    with pytest.raises(OSError, match="LOTLIP_CACHE"):
        cache_folder()
    assert (tmp_path / "mine").read_text() == "kept"


def test_only_the_user_can_write_to_the_folder(tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "user/lotlip"
    assert cache_folder().stat().st_mode & 0o777 == 0o700


def test_the_project_holds_the_folder_without_a_usable_home_and_tmp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert cache_folder() == tmp_path / ".lotlip/cache"


def test_a_link_of_another_user_is_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "user").mkdir()
    (tmp_path / "user/lotlip").symlink_to(tmp_path / "target")
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert cache_folder() == tmp_path / f"tmp/lotlip-{os.getuid()}"


def test_a_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    held = rf"the stage is in use by process {os.getpid()}"
    with lock(tmp_path / "a.lock"), pytest.raises(Locked, match=held), lock(tmp_path / "a.lock", "the stage"):
        pytest.fail("two hold it")
    with lock(tmp_path / "a.lock"):
        pass


HOLDER = """
import pathlib, sys
from lotlip.core.caches import lock
with lock(pathlib.Path("a.lock")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.integration
def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(Locked, match=str(holder.pid)), lock(tmp_path / "a.lock"):
        pytest.fail("two hold it")
    holder.kill()
    holder.communicate()
    with lock(tmp_path / "a.lock"):
        pass


def test_a_lock_that_is_a_link_does_not_change_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "a.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError), lock(tmp_path / "a.lock"):
        pytest.fail("a link was followed")
    assert (tmp_path / "target").read_text() == "kept"
