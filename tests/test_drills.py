"""The drills detect faults: each test plants a fault that a drill must find."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.drills.__main__ import explain, table, table_rows
from benchmarks.drills.drills import KILLS, KINDS, Drill, DrillRunner, Result, Spec, plan, stage_command
from benchmarks.drills.isolation import can_isolate, isolate
from benchmarks.drills.outputs import differences, fingerprints
from benchmarks.drills.processes import MARKER, DrillProcess, end_all, marked, send, wait_until
from benchmarks.drills.world import Reference, Sandbox
from lotlip.core.files import RECORD

REPORT = """# Report
| Stage | Time | Read | Share |
| --- | ---: | ---: | ---: |
| ingest | {time} | {read} | {share} |

| Captioner | Share |
| --- | ---: |
| llava | {kept} |
"""
PAGE = (
    "<table><tr><th>Stage</th><th>Time</th><th>Read</th></tr>"
    '<tr>\n<th scope="row">ingest</th><td class="n">{time}</td><td>{read}</td></tr></table>'
    '<a href="data-docs/ingest/{when}/a.html">Orchestration: gate {time}</a>'
)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A checkout with some outputs."""
    sandbox = Sandbox(tmp_path / "sandbox")
    sandbox.temporary.mkdir(parents=True)
    project = sandbox.project
    _write(project / "data/shards/train-000000.tar", "tar")
    _write(project / "models/lotlip/seed-0/history.json", json.dumps([{"loss": 1.0, "samples_per_second": 9.0}]))
    _write(project / "metrics/stages/ingest.json", json.dumps({"seconds": 1.5, "counts": {"read": 3}}))
    _write(project / "report/tables/stages.csv", "stage,seconds,read\ningest,1.5,3\n")
    _write(project / "report/report.md", REPORT.format(time="1.5 s", read=3, share="5 %", kept="7 %"))
    _write(project / "report/index.html", PAGE.format(time="1.5 s", read=3, when="20261128T052447.547212Z"))
    _write(project / "metrics/stages/data-docs/ingest/20261128T052447.547212Z/a.html", "at 2026-11-28T05:24:47Z: 3")
    _write(project / ".dvc/tmp/rwlock", "{}")
    yield sandbox
    for marker in ("here", "000-kill-top-SIGKILL"):
        end_all(marker, sandbox.root)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _reference(sandbox: Sandbox, **changes: object) -> Reference:
    settings = {"stages": ["ingest"], "starts": [0.2], "seconds": 0.6} | changes
    return Reference(fingerprints(sandbox.project), files=sandbox.files(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data/shards/train-000000.tar", "tar", "tas"),
        ("models/lotlip/seed-0/history.json", "1.0", "1.1"),
        ("metrics/stages/ingest.json", "3", "4"),
        ("metrics/stages/ingest.json", "}", ""),
        ("report/tables/stages.csv", "3", "4"),
        ("report/report.md", "| 3 |", "| 4 |"),
        ("report/report.md", "7 %", "8 %"),
        ("report/index.html", "<td>3", "<td>4"),
        ("metrics/stages/data-docs/ingest/20261128T052447.547212Z/a.html", ": 3", ": 4"),
    ],
)
def test_differences_include_changed_outputs(sandbox: Sandbox, name: str, old: str, new: str) -> None:
    expected = fingerprints(sandbox.project)
    path = sandbox.project / name
    path.write_text(path.read_text().replace(old, new, 1))
    assert differences(expected, sandbox.project) == [f"different: {name.replace('20261128T052447.547212Z', 'TIME')}"]


def test_differences_include_missing_and_unexpected_outputs(sandbox: Sandbox) -> None:
    expected = fingerprints(sandbox.project)
    (sandbox.project / "data/shards/train-000000.tar").rename(sandbox.project / "data/shards/train-000001.tar")
    problems = differences(expected, sandbox.project)
    assert problems == ["missing: data/shards/train-000000.tar", "unexpected: data/shards/train-000001.tar"]


def test_differences_exclude_times(sandbox: Sandbox) -> None:
    expected = fingerprints(sandbox.project)
    project, later = sandbox.project, "20270101T000000.000001Z"
    _write(project / "models/lotlip/seed-0/history.json", json.dumps([{"loss": 1.0, "samples_per_second": 8.0}]))
    _write(project / "metrics/stages/ingest.json", json.dumps({"seconds": 2.5, "counts": {"read": 3}}))
    _write(project / "report/tables/stages.csv", "stage,seconds,read\ningest,2.5,3\n")
    _write(project / "report/report.md", REPORT.format(time="2 min 01 s", read=3, share="6 %", kept="7 %"))
    _write(project / "report/index.html", PAGE.format(time="2.5 s", read=3, when=later))
    pages = project / "metrics/stages/data-docs/ingest"
    (pages / "20261128T052447.547212Z").rename(pages / later)
    _write(pages / later / "a.html", "at 2027-01-01T00:00:00Z: 3")
    assert differences(expected, project) == []


def test_differences_in_records_include_files_and_exclude_times(sandbox: Sandbox) -> None:
    record = sandbox.project / "models/lotlip" / RECORD
    files = {"seed-0/history.json": {"bytes": 1, "sha256": "a"}}
    _write(record, json.dumps({"files": files, "folders": ["stage/20261128T052447.547212Z"]}))
    expected = fingerprints(sandbox.project)
    other = {"seed-0/history.json": {"bytes": 2, "sha256": "b"}}
    _write(record, json.dumps({"files": other, "folders": ["stage/20261128T091720.135197Z"]}))
    assert differences(expected, sandbox.project) == []
    _write(record, json.dumps({"files": files | {"more": {"bytes": 1, "sha256": "a"}}, "folders": []}))
    assert differences(expected, sandbox.project) == [f"different: models/lotlip/{RECORD}"]


def test_differences_include_repeated_validations(sandbox: Sandbox) -> None:
    expected = fingerprints(sandbox.project)
    pages = sandbox.project / "metrics/stages/data-docs/ingest"
    _write(pages / "20270101T000000.000001Z" / "a.html", "at 2027-01-01T00:00:00Z: 3")
    problems = differences(expected, sandbox.project)
    assert problems == ["unexpected: metrics/stages/data-docs/ingest/TIME/a.html (again)"]


@pytest.mark.parametrize(
    ("name", "text", "left"),
    [
        ("tmp/lotlip-abc/warm", "", "temporary file: lotlip-abc"),
        ("project/models/lotlip.lotlip-partial/weights", "", "unfinished: models/lotlip.lotlip-partial"),
        ("project/.lotlip/work/ingest/0/out/a", "", "scratch: .lotlip/work/ingest"),
        ("project/.dvc/tmp/rwlock", "", "DVC's lock: empty"),
        ("project/.dvc/tmp/rwlock", '{"data": {"write": {"pid": 1}}}', "DVC's lock: "),
        ("project/.dvc/cache/files/md5/ab/.tmp", "", "in DVC's cache: ab/.tmp"),
        ("project/dvc.lock.tmp", "", "file: dvc.lock.tmp"),
    ],
)
def test_leftover_files_are_found(sandbox: Sandbox, name: str, text: str, left: str) -> None:
    reference = _reference(sandbox)
    assert sandbox.left_behind(reference) == []
    _write(sandbox.root / name, text)
    assert any(line.startswith(left) for line in sandbox.left_behind(reference))


def _sleeper(folder: Path, marker: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"], cwd=folder, env={**os.environ, MARKER: marker}, start_new_session=True)


def test_only_leftover_processes_are_found(sandbox: Sandbox, tmp_path: Path) -> None:
    ours, other, elsewhere = (
        _sleeper(folder, marker)
        for folder, marker in ((sandbox.project, "here"), (sandbox.project, "there"), (tmp_path, "here"))
    )
    try:
        assert wait_until(lambda: [p.pid for p in marked("here", sandbox.root)] == [ours.pid], 10)
        assert not send(DrillProcess(other.pid, "sleep"), signal.SIGKILL, "here", sandbox.root)
        end_all("here", sandbox.root)
        assert ours.wait(10) == -signal.SIGKILL
        assert (other.poll(), elsewhere.poll()) == (None, None)
        assert marked("here", sandbox.root) == []
    finally:
        for process in (ours, other, elsewhere):
            process.kill()
            process.wait()


# A small pipeline: `{after}` runs after a kill has left its trace, and `{start}` in every run.
PROGRAM = """
import pathlib, subprocess, sys, time
trace, done = pathlib.Path("trace"), pathlib.Path("data/shards/train-000000.tar")
print("Running stage 'ingest':", flush=True)
{start}
if trace.exists():
    {after}
trace.touch()
time.sleep({seconds})
done.write_text("tar")
trace.unlink()
"""


@pytest.fixture
def run_drill(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a drill of kills on a program, and returns its result."""

    def run(after: str = "pass", start: str = "", seconds: float = 0.5, limit: float = 30.0) -> Result:
        _write(sandbox.project / "program.py", PROGRAM.format(after=after, start=start, seconds=seconds))
        monkeypatch.setattr(Drill, "_moment", lambda *_, **__: ("in a stage", "Running stage '", 1, 0.2))
        monkeypatch.setattr(Drill, "restore", lambda *_: None)
        reference, command = _reference(sandbox), (sys.executable, "program.py")
        runner = DrillRunner(sandbox, tmp_path / "runner", reference, False, limit=limit, ending=0.5, command=command)
        return runner.run(Spec(0, "kill", "top", "SIGKILL", seed=1))

    return run


@pytest.mark.integration
def test_a_run_that_recovers_passes(run_drill: Callable[..., Result]) -> None:
    result = run_drill()
    assert result.passed, explain(result)
    assert len(result.disturbances) >= 6
    assert not result.kept


@pytest.mark.integration
def test_a_run_that_does_not_recover_is_counted(run_drill: Callable[..., Result], sandbox: Sandbox) -> None:
    result = run_drill(after="sys.exit('cannot go on')")
    assert not result.passed
    assert [hit.recovered for hit in result.disturbances] == [False]
    assert "cannot go on" in Path(result.kept, "run-2.log").read_text()
    assert Path(result.kept, "project", "trace").is_file()
    (row,) = table_rows([result])
    assert (row["tried"], row["recovered"], row["identical"], row["failed"]) == (1, 0, 0, 1)


@pytest.mark.system
def test_a_run_that_hangs_after_a_kill_is_counted(run_drill: Callable[..., Result]) -> None:
    result = run_drill(after="time.sleep(600)", limit=2.0)
    assert not result.passed
    assert not result.disturbances[-1].recovered


@pytest.mark.integration
def test_different_outputs_after_a_kill_are_counted(run_drill: Callable[..., Result]) -> None:
    result = run_drill(after="pathlib.Path('data/shards/more').write_text('')")
    assert result.different == ["unexpected: data/shards/more"]
    assert not result.passed


@pytest.mark.system
def test_a_child_that_outlives_its_killed_parent_is_counted(run_drill: Callable[..., Result], sandbox: Sandbox) -> None:
    result = run_drill(start="subprocess.Popen(['sleep', '60'])")
    assert any("process after" in line and "sleep" in line for line in result.left)
    assert not result.passed
    assert marked(result.spec.name, sandbox.root) == []


def test_an_impossible_drill_is_reported(sandbox: Sandbox, tmp_path: Path) -> None:
    runner = DrillRunner(sandbox, tmp_path / "runner", _reference(sandbox), isolated=False, limit=30.0)
    result = runner.run(Spec(0, "disk", "TMPDIR", "full", seed=1))
    assert result.passed
    assert "root" in result.skipped


# Needs ten megabytes temporarily, and prints the error that stopped it.
LARGE = """
import pathlib, sys
big = pathlib.Path("big")
try:
    big.write_bytes(bytes(10_000_000))
except OSError as error:
    sys.exit(str(error))
finally:
    big.unlink()
"""


@pytest.mark.integration
@pytest.mark.skipif(not can_isolate(), reason="mounting and namespaces need root")
def test_the_drill_of_a_full_disk_passes_after_recovery(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(sandbox.project / "program.py", LARGE)
    monkeypatch.setattr(Drill, "restore", lambda *_: None)
    command = (sys.executable, "program.py")
    runner = DrillRunner(sandbox, tmp_path / "runner", _reference(sandbox), isolated=True, limit=30.0, command=command)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()

    def work() -> None:
        isolate()
        drill = Drill(runner, Spec(0, "disk", "project", "full", seed=1))
        drill.run()
        sender.send((drill.result, (drill.folder / "run-1.log").read_text()))
        drill.clean_up()

    process = context.Process(target=work)
    process.start()
    process.join(60)
    assert receiver.poll(), "the drill ended without a result"
    result, log = receiver.recv()
    assert "No space left" in log
    assert result.passed, explain(result)


@pytest.mark.integration
def test_unnoticed_damage_of_an_input_is_counted(sandbox: Sandbox, tmp_path: Path) -> None:
    runner = DrillRunner(sandbox, tmp_path / "runner", _reference(sandbox), isolated=False, limit=30.0)
    drill = Drill(runner, Spec(0, "flip", "output", "then the stage alone", seed=1))
    _write(sandbox.project / "report/report.md", "of damaged scores")
    drill._check_published("shard")
    assert drill.result.problems == []
    drill._check_published("report")
    assert "report/report.md" in drill.result.problems[0]


@pytest.mark.parametrize("truncate", [False, True])
def test_damage_changes_a_file(sandbox: Sandbox, tmp_path: Path, truncate: bool) -> None:
    runner = DrillRunner(sandbox, tmp_path / "runner", _reference(sandbox), isolated=False, limit=30.0)
    Drill(runner, Spec(0, "flip", "output", "", seed=1))._damage(
        sandbox.project / "data/shards/train-000000.tar", truncate
    )
    assert differences(runner.reference.outputs, sandbox.project) == ["different: data/shards/train-000000.tar"]


def test_rewind_removes_the_outputs_of_stages(sandbox: Sandbox) -> None:
    lock = {"schema": "2.0", "stages": {}}
    cache = sandbox.project / ".dvc/cache/files/md5"
    for stage, out, md5 in (("ingest", "data/ingest", "aa1.dir"), ("report", "report", "bb2.dir")):
        lock["stages"][stage] = {"outs": [{"path": out, "md5": md5}]}
        _write(cache / md5[:2] / md5[2:], json.dumps([{"md5": f"{md5[:2]}9", "relpath": "x"}]))
        _write(cache / md5[:2] / "9", "x")
    _write(sandbox.project / "data/ingest/x", "x")
    _write(sandbox.project / "dvc.lock", yaml.safe_dump(lock))
    sandbox.rewind(["report"])
    assert not (sandbox.project / "report").exists()
    assert (sandbox.project / "data/ingest/x").is_file()
    assert list(yaml.safe_load((sandbox.project / "dvc.lock").read_text())["stages"]) == ["ingest"]
    assert sorted(path.relative_to(cache).as_posix() for path in cache.glob("*/*")) == ["aa/1.dir", "aa/9"]


def test_plans_start_with_every_kind_and_cover_all_kills() -> None:
    specs = [plan(number, seed=3) for number in range(60)]
    assert {spec.kind for spec in specs[:5]} == set(KINDS)
    assert {(spec.target, spec.how) for spec in specs if spec.kind == "kill"} == set(KILLS)
    assert Counter(spec.kind for spec in specs).most_common(1)[0][0] == "kill"
    assert {plan(number, 3, ["two"]).target for number in range(2)} == {"flows.reproduce", "flows pretrain"}


def test_plans_depend_on_the_seed_only() -> None:
    draws = [plan(number, seed).rng().random() for seed in (1, 1, 2) for number in (0, 7)]
    assert draws[:2] == draws[2:4]
    assert len(set(draws)) == 4


def test_the_table_summarises_results() -> None:
    passed = Result(plan(0, 1), compared=True, seconds=3.0)
    skipped = Result(Spec(1, "disk", "TMPDIR", "full", 1), skipped="no root")
    text = table(table_rows([passed, skipped]))
    assert "| kill | top | SIGKILL | 0 | 0 | 0 | 0 | 0 | 0 | 3 |" in text
    assert "full (skipped)" in text
    assert "| all |" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("image-tower", ["-m", "flows", "image-tower"]),
        ("caption@llava", ["-m", "flows", "caption", "llava"]),
        ("evaluate-finetune@long-clip", ["-m", "flows", "evaluate", "long-clip"]),
    ],
)
def test_a_single_stage_is_run_with_dvcs_command(stage: str, arguments: list[str]) -> None:
    assert stage_command(stage) == (sys.executable, *arguments)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("/x/python -m flows.runtime.applications prefect 7", "server"),
        ("/x/python -m flows.runtime.fork_server", "fork-server"),
        ("/x/python -m flows.reproduce", "flows.reproduce"),
        ("/x/python -m flows pretrain lotlip", "python"),
    ],
)
def test_processes_have_roles(command: str, role: str) -> None:
    assert DrillProcess(1, command).role == role
