"""DVC that is interrupted: no moment of it may block the next run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.runtime.dvc import remove_stale_lock
from tests.workspace import ROOT

STAGES = 3

# Runs DVC in forks, which have nothing to import, and sends each a signal or two at a random moment.
INTERRUPTIONS = """
import os, random, signal, sys, time
import dvc.cli, dvc.repo, dvc.stage.run, dvc.rwlock
from flows.runtime import dvc as program

rng = random.Random(0)
signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
for number in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        null = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(program.main(["repro", "--force"]) % 256)
    time.sleep(rng.uniform(0, float(sys.argv[2])))
    for sign in rng.choice([[rng.choice(signals)], [signal.SIGINT, signal.SIGINT]]):
        os.kill(child, sign)
    _, status = os.waitpid(child, 0)
    path = ".dvc/tmp/rwlock"
    print(os.waitstatus_to_exitcode(status), os.path.exists(path) and open(path).read(), flush=True)
"""
# DVC gets a signal while it writes the file of its locks.
WORST_MOMENT = """
import json, os, signal, sys
import dvc.rwlock
from flows.runtime import dvc as program

def dump(data, file):
    file.write("{")
    os.kill(os.getpid(), int(sys.argv[1]))
    file.seek(0)
    json.dump(data, file)

dvc.rwlock.json = type("", (), {**vars(json), "dump": dump})
os.setpgid(0, 0)
sys.exit(program.main(["repro"]))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A DVC project without git, of stages that are as short as they can be."""
    stages = "".join(
        f"  s{n}:\n    cmd: python -m flows.write o{n}\n    deps: [o{n - 1}]\n    outs: [o{n}]\n"
        for n in range(1, STAGES + 1)
    )
    (tmp_path / "dvc.yaml").write_text(f"stages:\n{stages}")
    (tmp_path / "o0").write_text("0")
    # the stages need nothing of flows/ but what ends them
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text(
        f"__path__.append({str(ROOT / 'flows')!r})\nexec(open({str(ROOT / 'flows' / '__init__.py')!r}).read())"
    )
    (tmp_path / "flows" / "write.py").write_text("import sys, time; open(sys.argv[1], 'w').write(str(time.time()))")
    run(tmp_path, "-m", "dvc", "init", "--no-scm", "--quiet")
    return tmp_path


def run(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "LOTLIP_FORK_SERVER"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / ".site"),
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not check or not done.returncode, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_dvc_writes_its_locks_leaves_them_whole(project, sign):
    done = run(project, "-c", WORST_MOMENT, str(int(sign)), check=False)
    assert done.returncode == 130, done.stderr
    assert not (project / f"o{STAGES}").exists()  # no further stage was run
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == {}
    run(project, "-m", "dvc", "repro")


@pytest.mark.system
def test_none_of_fifty_interruptions_blocks_the_next_run(project):
    done = run(project, "-c", INTERRUPTIONS, "50", "1.5")
    lines = done.stdout.splitlines()
    assert len(lines) == 50
    assert {line.partition(" ")[2] for line in lines} <= {"{}", "False"}
    assert any(line.startswith("130") for line in lines)
    run(project, "-m", "dvc", "repro")


DEAD = '{"o1": {"write": {"pid": 4194305, "cmd": "dvc"}}, "i": {"read": [{"pid": 4194305, "cmd": "dvc"}]}}'


@pytest.mark.parametrize("content", ["", "{", "[]", DEAD])
def test_a_stale_lock_of_a_dead_dvc_is_removed(project, content):
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(content)
    for name in ("lock", "rwlock.lock"):  # these hold nobody's lock any more, whatever they say
        (lock.parent / name).write_text("4194304\n")
    done = run(project, "-m", "flows.runtime.dvc", "repro")
    assert str(lock) in done.stderr
    assert (project / f"o{STAGES}").exists()


def test_a_stale_lock_stays_while_another_dvc_runs(project):
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("")
    with subprocess.Popen(
        ["dvc", "-c", "import sys; sys.stdin.read()"], executable=sys.executable, cwd=project, stdin=subprocess.PIPE
    ):
        assert not remove_stale_lock(project)
    assert remove_stale_lock(project)
    assert not lock.exists()


def test_a_lock_of_a_live_process_stays(project):
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text('{"write": {"o1": {"pid": 1, "cmd": "dvc"}}}')
    assert not remove_stale_lock(project)
    assert lock.exists()


def test_no_other_user_can_write_to_what_dvc_unpickles(project, tmp_path, monkeypatch):
    """DVC makes folders for everybody to write to; one above them must be closed to others."""
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "cache"))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DVC_SITE_CACHE_DIR", "LOTLIP_FORK_SERVER")
    }
    environment |= {"PYTHONPATH": f"{project}{os.pathsep}{ROOT}", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "flows.runtime.dvc", "doctor"]
    said = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True).stdout
    (site,) = [Path(line.partition(": ")[2]) for line in said.splitlines() if line.startswith("Repo.site_cache_dir")]
    assert site.is_relative_to(tmp_path / "cache")
    closed = [
        folder for folder in site.parents if folder.is_relative_to(tmp_path) and not folder.stat().st_mode & 0o077
    ]
    assert tmp_path / "cache" / "dvc" in closed


def test_a_project_without_git_runs_and_takes_git_up_later(project):
    (project / ".dvc" / "config").write_text("")  # as the project's own, which says nothing of git
    run(project, "-m", "flows.runtime.dvc", "repro")
    assert (project / f"o{STAGES}").exists()
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    run(project, "-m", "flows.runtime.dvc", "status")
    assert "no_scm" not in (project / ".dvc/config.local").read_text()
