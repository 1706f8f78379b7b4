"""Interrupted DVC never blocks the next run, and the check for stale stages is exact."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.reproduce import reproduce
from flows.runtime.dvc import is_up_to_date, remove_partial_copies, remove_stale_lock, running
from lotlip.config.params import load_params
from lotlip.core.files import ForeignFileError
from tests.workspace import ROOT

STAGES = 3

# Runs DVC in forks, which need no imports, and sends each one or two signals at random times.
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
# Sends DVC a signal while it writes its lock file.
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
    """A DVC project without git, with very short stages."""
    return make_project(tmp_path)


def make_project(folder: Path) -> Path:
    stages = "".join(
        f"  s{n}:\n    cmd: python -m flows.write o{n}\n    deps: [o{n - 1}]\n    outs: [o{n}]\n"
        for n in range(1, STAGES + 1)
    )
    (folder / "dvc.yaml").write_text(f"stages:\n{stages}")
    (folder / "o0").write_text("0")
    # stages only need the part of flows/ that ends them
    (folder / "flows").mkdir()
    (folder / "flows" / "__init__.py").write_text(
        f"__path__.append({str(ROOT / 'flows')!r})\nexec(open({str(ROOT / 'flows' / '__init__.py')!r}).read())"
    )
    (folder / "flows" / "write.py").write_text("import sys, time; open(sys.argv[1], 'w').write(str(time.time()))")
    run(folder, "-m", "dvc", "init", "--no-scm", "--quiet")
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "LOTLIP_FORK_SERVER"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / ".site"),
    }


def run(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert not check or not done.returncode, done.stdout + done.stderr
    return done


@pytest.mark.integration
@pytest.mark.parametrize(
    "sign", [signal.SIGINT, *(pytest.param(sign, marks=pytest.mark.system) for sign in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_while_dvc_writes_its_locks_does_not_damage_them(project, sign):
    done = run(project, "-c", WORST_MOMENT, str(int(sign)), check=False)
    assert done.returncode == 130, done.stderr
    assert not (project / f"o{STAGES}").exists()  # no later stage was run
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == {}
    run(project, "-m", "dvc", "repro")


@pytest.mark.integration
def test_the_stage_of_a_background_job_ends_on_sigterm(project):
    """A shell without job control starts background jobs with SIGINT ignored, and stages inherit that."""
    (project / "flows" / "write.py").write_text("import time; print('started', flush=True); time.sleep(120)")
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.runtime.dvc", "repro"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert any("started" in line for line in process.stdout)
    process.terminate()
    assert process.wait(timeout=60) == 130


@pytest.mark.system
def test_fifty_interruptions_never_block_the_next_run(project):
    done = run(project, "-c", INTERRUPTIONS, "50", "1.5")
    lines = done.stdout.splitlines()
    assert len(lines) == 50
    assert {line.partition(" ")[2] for line in lines} <= {"{}", "False"}
    assert any(line.startswith("130") for line in lines)
    run(project, "-m", "dvc", "repro")


DEAD = '{"o1": {"write": {"pid": 4194305, "cmd": "dvc"}}, "i": {"read": [{"pid": 4194305, "cmd": "dvc"}]}}'


@pytest.mark.integration
@pytest.mark.parametrize("content", ["", "{", "[]", DEAD])
def test_a_stale_lock_of_a_dead_dvc_is_removed(project, content):
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(content)
    for name in ("lock", "rwlock.lock"):  # these files hold no lock, whatever their content
        (lock.parent / name).write_text("4194304\n")
    done = run(project, "-m", "flows.runtime.dvc", "repro")
    assert str(lock) in done.stderr
    assert (project / f"o{STAGES}").exists()


@pytest.mark.integration
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


@pytest.mark.integration
def test_a_stale_lock_stays_while_a_dvc_of_another_machine_runs(project):
    """Machines share a folder, but not process ids."""
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(f'{{"write": {{"o1": {{"pid": {2**22 + 1}, "cmd": "dvc"}}}}}}')
    partial = project / ".dvc/cache/files/md5/ab" / ".k--HGbZOlkk-Fcy2TXTncg.tmp"
    partial.parent.mkdir(parents=True)
    partial.touch()
    with running(project), running(project):
        assert not remove_stale_lock(project)
        remove_partial_copies(project)
        assert partial.exists()
    assert remove_stale_lock(project)
    remove_partial_copies(project)
    assert not partial.exists()


@pytest.mark.integration
def test_dvc_marks_its_project_while_it_runs(project):
    look = "import fcntl; fcntl.flock(open('.dvc/tmp/lotlip-running', 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    (project / "flows" / "write.py").write_text(look)
    alone = run(project, "-m", "flows.write")
    assert alone.returncode == 0
    done = run(project, "-m", "flows.runtime.dvc", "repro", check=False)
    assert "BlockingIOError" in done.stderr
    assert "failed to reproduce" in done.stderr


@pytest.mark.integration
def test_only_partial_copies_in_the_cache_are_removed(project):
    cache = project / ".dvc/cache/files/md5/ab"
    cache.mkdir(parents=True)
    partial, others = cache / ".k--HGbZOlkk-Fcy2TXTncg.tmp", (cache / "cdef", cache / ".mine.tmp", cache / "k.tmp")
    for path in (partial, *others[:1], *others[2:]):
        path.write_text("x")
    with subprocess.Popen(
        ["dvc", "-c", "import sys; sys.stdin.read()"], executable=sys.executable, cwd=project, stdin=subprocess.PIPE
    ):
        remove_partial_copies(project)
        assert partial.exists()  # it may belong to the running DVC
    run(project, "-m", "flows.runtime.dvc", "status")
    assert not partial.exists()
    assert all(path.exists() for path in (others[0], others[2]))
    others[1].write_text("x")
    with pytest.raises(ForeignFileError, match=r"\.mine\.tmp"):
        remove_partial_copies(project)


@pytest.mark.integration
def test_a_lock_of_a_live_process_stays(project):
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text('{"write": {"o1": {"pid": 1, "cmd": "dvc"}}}')
    assert not remove_stale_lock(project)
    assert lock.exists()


@pytest.mark.integration
def test_other_users_cannot_write_the_files_that_dvc_unpickles(project, tmp_path, monkeypatch):
    """DVC creates world-writable folders, so a parent folder must be private."""
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "cache"))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DVC_SITE_CACHE_DIR", "LOTLIP_FORK_SERVER")
    }
    environment |= {"PYTHONPATH": f"{project}{os.pathsep}{ROOT}", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "flows.runtime.dvc", "doctor"]
    output = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True).stdout
    (site,) = [Path(line.partition(": ")[2]) for line in output.splitlines() if line.startswith("Repo.site_cache_dir")]
    assert site.is_relative_to(tmp_path / "cache")
    closed = [
        folder for folder in site.parents if folder.is_relative_to(tmp_path) and not folder.stat().st_mode & 0o077
    ]
    assert tmp_path / "cache" / "dvc" in closed


@pytest.mark.integration
def test_pushing_is_advised_only_with_a_remote(project):
    advice = "Use `dvc push`"
    assert advice not in run(project, "-m", "flows.runtime.dvc", "repro").stdout
    run(project, "-m", "dvc", "remote", "add", "--local", "store", str(project / "store"))
    assert advice in run(project, "-m", "flows.runtime.dvc", "repro", "--force").stdout


@pytest.mark.integration
def test_a_project_without_git_runs_and_can_be_added_to_git_later(project):
    (project / ".dvc" / "config").write_text("")  # like the project's own, without git
    run(project, "-m", "flows.runtime.dvc", "repro")
    assert (project / f"o{STAGES}").exists()
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    run(project, "-m", "flows.runtime.dvc", "status")
    assert "no_scm" not in (project / ".dvc/config.local").read_text()


@pytest.mark.integration
def test_a_project_that_its_git_repository_ignores_runs(project, tmp_path_factory):
    """DVC finds no stage there, so that nothing seems to be stale."""
    (project / ".dvc" / "config").write_text("")  # like the project's own, without git
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("runs/\n")
    inside = shutil.copytree(project, folder / "runs" / "one", symlinks=True)
    (inside / "flows" / "__init__.py").write_text((project / "flows" / "__init__.py").read_text())
    run(inside, "-c", "from flows.runtime.dvc import is_up_to_date as up; raise SystemExit(up([[]]))")
    run(inside, "-m", "flows.runtime.dvc", "repro")
    assert (inside / f"o{STAGES}").exists()
    run(inside, "-c", "from flows.runtime.dvc import is_up_to_date as up; raise SystemExit(not up([[]]))")
    (folder / ".gitignore").write_text("other/\n")
    run(inside, "-m", "flows.runtime.dvc", "status")
    assert "no_scm" not in (inside / ".dvc/config.local").read_text()


# A stage with every kind of dependency: a parameter, a folder of code, an external file and another stage.
ONE_OF_EACH = """
  {name}:
    cmd: cp -r code {name}
    params: [{name}]
    deps: [code, ../outside, o1]
    outs: [{name}]
"""


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project of two more stages after a run, and with the external file."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "outside").write_text("outside")
    (folder / "project").mkdir()
    project = make_project(folder / "project")
    (project / "code" / "part").mkdir(parents=True)
    (project / "code" / "part" / "main.py").write_text("1")
    (project / "params.yaml").write_text("first: 1\nsecond: 1\nunused: 1\n")
    with (project / "dvc.yaml").open("a") as stages:
        stages.writelines(ONE_OF_EACH.format(name=name) for name in ("first", "second"))
    run(project, "-m", "dvc", "repro")
    return folder


@pytest.fixture
def finished_copy(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project as the current folder."""
    shutil.copytree(finished_project, tmp_path / "copy")
    project = tmp_path / "copy" / "project"
    monkeypatch.chdir(project)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(project / ".site"))
    return project


@pytest.mark.integration
def test_after_a_run_and_unrelated_edits_nothing_is_stale(finished_copy):
    for runs in ([[]], [["first"], ["--single-item", "second"]]):
        assert is_up_to_date(runs)
    (finished_copy / "params.yaml").write_text("unused: 2\nsecond: 1\nfirst: 1\n")
    (finished_copy / "unrelated.txt").write_text("1")
    os.utime(finished_copy / "code" / "part" / "main.py", (1, 1))  # the contents are unchanged
    assert is_up_to_date([[]])


CHANGES: dict[str, Callable[[Path], object]] = {
    "parameter": lambda folder: (folder / "params.yaml").write_text("first: 2\nsecond: 1\n"),
    "parameter is gone": lambda folder: (folder / "params.yaml").write_text("second: 1\n"),
    "code": lambda folder: (folder / "code" / "part" / "main.py").write_text("2"),
    "new code": lambda folder: (folder / "code" / "new.py").write_text(""),
    "code is gone": lambda folder: (folder / "code" / "part" / "main.py").unlink(),
    "outside": lambda folder: (folder.parent / "outside").write_text("changed"),
    "outside is gone": lambda folder: (folder.parent / "outside").unlink(),
    "output": lambda folder: (folder / "first" / "part" / "main.py").write_text("2"),
    "output is gone": lambda folder: shutil.rmtree(folder / "first"),
    "output of an earlier stage": lambda folder: (folder / "o1").write_text("0"),
    "output of an earlier stage is gone": lambda folder: (folder / "o1").unlink(),
    "cache is gone": lambda folder: shutil.rmtree(folder / ".dvc" / "cache"),
    "command": lambda folder: _replace(folder / "dvc.yaml", "cp -r code first", "cp -R code first"),
    "new output": lambda folder: _replace(folder / "dvc.yaml", "outs: [first]", "outs: [first, code2]"),
    "invalid parameters": lambda folder: (folder / "params.yaml").write_text("first: ["),
    "invalid dvc.yaml": lambda folder: (folder / "dvc.yaml").write_text("stages: ["),
    "never run": lambda folder: (folder / "dvc.lock").unlink(),
    "no project": lambda folder: shutil.rmtree(folder / ".dvc"),
    "other DVC": lambda folder: (folder / ".dvc/tmp/rwlock").write_text('{"write": {"o1": {"pid": 1, "cmd": "dvc"}}}'),
    "damaged locks": lambda folder: (folder / ".dvc/tmp/rwlock").write_text(""),
}


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.integration
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("run", [[], ["first"], ["--single-item", "first"]], ids=" ".join)
def test_changed_stages_are_stale(finished_copy, change, run):
    CHANGES[change](finished_copy)
    assert not is_up_to_date([run])


@pytest.mark.integration
def test_only_the_named_stages_are_checked(finished_copy):
    (finished_copy / "params.yaml").write_text("first: 1\nsecond: 2\n")
    assert is_up_to_date([["first"]])
    assert not is_up_to_date([["first", "second"]])
    assert not is_up_to_date([["first"], ["--single-item", "second"]])
    (finished_copy / f"o{STAGES}").unlink()
    assert is_up_to_date([["first"]])


@pytest.mark.integration
@pytest.mark.parametrize(("current", "stale"), [("first", "second"), ("second", "first")])
def test_one_of_several_stages_with_the_same_inputs_can_be_stale(finished_copy, current, stale):
    CHANGES["code"](finished_copy)
    run(finished_copy, "-m", "dvc", "repro", current)
    assert is_up_to_date([[current]])
    for runs in ([[]], [[current, stale]], [[stale, current]], [[stale]]):
        assert not is_up_to_date(runs)


@pytest.mark.integration
def test_with_single_item_earlier_stages_are_not_checked(finished_copy):
    _replace(finished_copy / "dvc.yaml", "flows.write o1", "flows.write  o1")
    assert is_up_to_date([["--single-item", "first"]])
    assert not is_up_to_date([["first"]])


@pytest.mark.integration
@pytest.mark.parametrize("arguments", [["--force"], ["--dry", "first"], ["missing"]], ids=" ".join)
def test_unknown_arguments_are_passed_to_dvc(finished_copy, arguments):
    assert not is_up_to_date([arguments])


HEAVY = ("deepspeed", "great_expectations", "mlflow", "pandas", "prefect", "torch", "transformers")
REPRODUCE = f"""
import runpy, subprocess, sys
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in ("subprocess.Popen", "os.fork") else None)
sys.argv = ["flows.reproduce", "--all"]
runpy.run_module("flows.reproduce", run_name="__main__")
print("started", started, "imported", [name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.integration
def test_a_reproduction_without_stale_stages_imports_no_heavy_package(project):
    shutil.copy(ROOT / "params.yaml", project)
    (project / "lotlip").symlink_to(ROOT / "lotlip")  # inputs are below it
    run(project, "-m", "dvc", "repro")
    page = project / "report" / "index.html"
    output = run(project, "-c", REPRODUCE).stdout
    assert "started [] imported []" in output
    assert str(page) not in output  # these stages write none
    page.parent.mkdir()
    page.touch()
    assert str(page) in run(project, "-c", REPRODUCE).stdout
    assert not (project / ".lotlip" / "reproduce.json").exists()  # the record of the last run that ran a stage


PROGRAMS = [path.stem for path in sorted((ROOT / "flows").glob("*.py")) if 'if __name__ == "' in path.read_text()]


@pytest.mark.integration
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_printed_before_anything_is_read_or_started(project, program):
    before = sorted(project.iterdir())
    output = run(project, "-m", f"flows.{program}", "--help").stdout  # there is no params.yaml
    (documented, *_) = ast.get_docstring(ast.parse((ROOT / "flows" / f"{program}.py").read_text())).splitlines()
    assert output.startswith(f"{documented}\n")
    assert sorted(project.iterdir()) == before


@pytest.mark.integration
def test_a_dry_run_shows_stale_stages_and_starts_no_server(project):
    shutil.copy(ROOT / "params.yaml", project)
    (project / "lotlip").symlink_to(ROOT / "lotlip")
    run(project, "-m", "dvc", "repro")
    before = (project / "o1").read_text()
    (project / "o0").write_text("1")
    output = run(project, "-m", "flows.reproduce", "--dry", "s2").stdout
    assert "Running stage 's1'" in output and "s3" not in output
    assert "Prefect" not in output and "Done in" not in output
    assert (project / "o1").read_text() == before and not (project / ".lotlip" / "reproduce.json").exists()


def test_a_stage_with_a_replaced_start_is_not_pulled(tmp_path, monkeypatch):
    """The remote has what it wrote from the former one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which `reproduce` changes
    shutil.copy(ROOT / "params.yaml", tmp_path)
    params, seen = load_params(), []
    for name in ("check_watched_parameters", "check_inputs"):
        monkeypatch.setattr(f"flows.reproduce.{name}", lambda _: None)
    monkeypatch.setattr("flows.reproduce.is_up_to_date", lambda _: False)
    monkeypatch.setattr("flows.reproduce._run", lambda runs, parallel, pull: seen.append((runs, pull)) or 0)
    for outdated in (False, True):
        monkeypatch.setattr("flows.reproduce.remove_outdated_records", lambda *_, outdated=outdated: outdated)
        reproduce(params, [["--pull", "s1"]], pull=True)
    assert seen == [([["--pull", "s1"]], True), ([["s1"]], False)]


@pytest.mark.parametrize("ran", [True, False])
def test_only_a_run_that_ran_a_stage_is_recorded(tmp_path, monkeypatch, ran):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which `reproduce` changes
    params = load_params(ROOT / "params.yaml")
    records = params.paths.stages
    records.mkdir(parents=True)
    (records / "ingest.json").touch()
    os.utime(records / "ingest.json", (1, 1))
    monkeypatch.setattr("flows.reproduce.check_watched_parameters", lambda params: None)
    monkeypatch.setattr("flows.reproduce.check_inputs", lambda inputs: None)
    monkeypatch.setattr("flows.reproduce.is_up_to_date", lambda runs: False)
    monkeypatch.setattr("flows.reproduce._run", lambda *_: ran and (records / "shard.json").touch())
    reproduce(params, [["--glob", "nothing"]])
    assert Path(".lotlip/reproduce.json").exists() == ran


@pytest.mark.integration
def test_an_unknown_stage_is_an_error_before_anything_starts(project):
    shutil.copy(ROOT / "params.yaml", project)
    (project / "lotlip").symlink_to(ROOT / "lotlip")
    failed = run(project, "-c", REPRODUCE.replace("--all", "s4"), check=False)
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == ["error: Stage 's4' not found inside 'dvc.yaml' file; did you mean 's3'?"]
    assert not (project / "o1").exists()
