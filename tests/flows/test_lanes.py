"""Stages that run at the same time, by several processes of DVC in one project."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.runtime.dvc import is_up_to_date, plan
from flows.runtime.lanes import _reason, run_stages
from tests.flows.test_dvc import environment, make_project, run
from tests.machines import wait_until
from tests.processes import have_ended

pytestmark = pytest.mark.integration

# `left` and `right` depend on `o1`, `both` on them. A stage writes "NAME.started", and then its output once the file
# "NAME.go" exists.
GRAPH = """
  left: {cmd: python -m flows.wait left, deps: [o1], outs: [left]}
  right: {cmd: python -m flows.wait right, deps: [o1], outs: [right]}
  both: {cmd: cp left both, deps: [left, right], outs: [both]}
"""
WAIT = """
import sys, time
from pathlib import Path
name = sys.argv[1]
Path(f"{name}.started").touch()
while not (go := Path(f"{name}.go")).exists():
    time.sleep(0.01)
sys.exit(go.read_text() or Path(name).write_text(name) * 0)
"""
RUN = """
import os, sys
from flows.runtime.dvc import plan
from flows.runtime.lanes import run_stages
from flows.runtime.supervisor import exit_on_signals
try:
    with exit_on_signals():
        sys.exit(run_stages(plan([["both"]]), 2, os.environ))
except KeyboardInterrupt:
    sys.exit(130)
"""
SECONDS = 60


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in the current folder, whose stages wait for files."""
    make_project(tmp_path)
    (tmp_path / "flows" / "wait.py").write_text(WAIT)
    with (tmp_path / "dvc.yaml").open("a") as stages:
        stages.write(GRAPH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / ".site"))
    return tmp_path


@pytest.fixture
def running(project: Path):
    """Runs the stages in the background, up to the moment at which both of those in the middle run."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            wait_for(project / "left.started", project / "right.started")
            yield process
        finally:
            process.kill()


def wait_for(*files: Path) -> None:
    wait_until(lambda: all(file.exists() for file in files), lambda: f"not all of {files} exist")


def output(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=SECONDS)[0]


def run_again(project: Path) -> None:
    for name in ("left", "right"):
        (project / f"{name}.go").write_text("")
    done = run(project, "-c", RUN)
    assert "removed" not in done.stderr  # a stale lock
    assert is_up_to_date([["both"]])


def test_independent_stages_run_at_the_same_time(project, running):
    for name in ("left", "right"):
        (project / f"{name}.go").write_text("")
    shown = output(running)
    assert running.returncode == 0, shown
    assert (project / "both").read_text() == "left"
    assert is_up_to_date([["both"]])
    assert not is_up_to_date([[]])  # the other stages of the project did not run
    assert "git add" not in shown


def test_a_failure_lets_running_stages_finish_and_starts_no_other(project, running):
    (project / "left.go").write_text("broken on purpose")
    assert running.stdout is not None
    assert any("left has failed. Still running, and then no more: right" in line for line in running.stdout)
    (project / "right.go").write_text("")
    shown = output(running)
    assert running.returncode == 1, shown
    assert (project / "right").read_text() == "right"
    assert not (project / "both").exists()
    assert is_up_to_date([["right"]])
    run_again(project)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_running_stages(project, running, sign):
    stages = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, sign)
    shown = output(running)
    assert running.returncode == (130 if sign == signal.SIGINT else 128 + sign), shown
    assert "error" not in shown
    assert have_ended(stages)
    assert json.loads((project / ".dvc/tmp/rwlock").read_text() or "{}") == {}
    run_again(project)


def test_stages_end_when_their_owner_is_killed(project, running):
    stages = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    assert have_ended(stages)
    for name in ("left", "right"):
        (project / f"{name}.go").write_text("")
    run(project, "-c", RUN)
    assert is_up_to_date([["both"]])


def test_a_killed_process_of_dvc_is_a_failure(project, running):
    lane = psutil.Process(running.pid).children()[0]
    lane.kill()
    for name in ("left", "right"):
        (project / f"{name}.go").write_text("")
    shown = output(running)
    assert running.returncode == 1, shown
    assert re.search("error: the process of DVC that ran (left|right) ended unexpectedly", shown)
    assert not (project / "both").exists()
    run(project, "-c", RUN)  # it removes the lock that the killed process left
    assert is_up_to_date([["both"]])


def test_a_plan_has_the_stages_and_what_each_waits_for(project):
    assert plan([["both"]]) == {"s1": set(), "left": {"s1"}, "right": {"s1"}, "both": {"left", "right"}}
    assert plan([["left"], ["--single-item", "both"]]) == {"s1": set(), "left": {"s1"}, "both": {"s1", "left"}}
    assert plan([[]]).keys() == {"s1", "s2", "s3", "left", "right", "both"}
    for unknown in (["missing"], ["--force"], ["--dry", "both"]):
        assert plan([unknown]) is None


def test_a_plan_is_made_before_the_first_run_in_a_project_without_git(project):
    (project / ".dvc" / "config").write_text("")  # as `lotlip run` copies it
    assert plan([["left"]]) == {"s1": set(), "left": {"s1"}}


def test_a_plan_omits_what_only_frozen_stages_depend_on(project):
    stages = project / "dvc.yaml"
    stages.write_text(stages.read_text().replace("outs: [left]", "outs: [left], frozen: true"))
    assert plan([["left"]]) == {"left": set()}
    # `left` does not depend on `s1`, but reads its output
    assert plan([["both"]]) == {"s1": set(), "left": {"s1"}, "right": {"s1"}, "both": {"left", "right"}}


def test_errors_of_dvc_are_shown_with_their_cause_if_they_have_one(project, capfd):
    assert run_stages({"missing": []}, 1, environment(project)) == 1
    assert capfd.readouterr().err == "error: Stage 'missing' not found inside 'dvc.yaml' file\n"
    (project / "o0").unlink()
    assert run_stages({"s1": []}, 1, environment(project)) == 1
    assert (
        f"error: failed to reproduce 's1': [Errno 2] No such file or directory: '{project}/o0'"
        in capfd.readouterr().err
    )


def test_a_database_of_dvc_that_cannot_be_opened_is_an_error_without_a_traceback(project, monkeypatch, capfd):
    """As on a full disk."""
    cache = project / "cache"
    for folder in (project / ".site").rglob("links"):
        (cache / folder.relative_to(project / ".site") / "cache.db").mkdir(parents=True)
    assert cache.is_dir()
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(cache))
    assert not is_up_to_date([["both"]])
    assert plan([["both"]]) is None
    assert run_stages({"s1": []}, 1, environment(project) | {"DVC_SITE_CACHE_DIR": str(cache)}) == 1
    assert capfd.readouterr().err == "error: unable to open database file\n"


def test_a_full_disk_is_named_although_dvc_reports_a_later_error():
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rwlock")
        finally:
            raise ValueError("the lock is corrupted")
    except ValueError as error:
        assert _reason(error).startswith("the lock is corrupted: [Errno 28] No space left on device: 'rwlock': ")
        assert _reason(error).endswith("and run again")
