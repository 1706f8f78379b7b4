"""Common parts of the flows: fan-out, publishing, errors, processes, the fork server and servers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from flows.reproduce import remove_outdated_records
from flows.runtime import stage as stages
from flows.runtime.edits import parameters
from flows.runtime.fork_server import SOCKET
from flows.runtime.processes import run_group
from flows.runtime.scratch import StageFailed
from flows.runtime.stage import Stage, hash_of
from lotlip.config.params import load_params
from lotlip.core.caches import Locked
from lotlip.core.files import RECORD, Damaged, ForeignFileError
from lotlip.core.section import ConfigError
from lotlip.core.stages import STAGES
from lotlip.data.models import STARTING_MODELS, local_hashes
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.data.stage_record import StageRecord
from tests.test_record import STAGE
from tests.workspace import Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage(monkeypatch, tmp_path: Path) -> Stage:
    params = load_params(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    quick = params.compute.model_copy(update={"retry_delay_seconds": 0})
    monkeypatch.setattr(stages, "get_run_logger", lambda: __import__("logging").getLogger("test"))
    monkeypatch.setattr(stages, "task_runner", lambda *_: nullcontext(run_now))
    monkeypatch.setattr(stages, "as_completed", list)
    monkeypatch.setattr(stages, "_held", {})
    return Stage("ingest", params.model_copy(update={"compute": quick}), {"a": 1})


def run_now(task, work):
    """Runs a unit immediately, with retries like Prefect's."""
    for attempt in range(task.retries + 1):
        try:
            return FakeFuture(work.call())
        except Exception as error:
            if attempt == task.retries:
                return FakeFuture(error)
    raise AssertionError


class FakeFuture:
    def __init__(self, value) -> None:
        self.value = value

    def result(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def fan_out(stage: Stage, work):
    return stage.fan_out(["a", "b"], work, name=str, size=lambda unit: 3)


def test_a_unit_is_retried(stage: Stage) -> None:
    tries = {"a": 0, "b": 0}

    def work(unit: str) -> list[UnitReport]:
        tries[unit] += 1
        if unit == "a" and tries[unit] < 3:
            raise ConnectionError("lost")
        return [UnitReport(unit, 3, 3, "hash", 1)]

    assert [report.written for report in fan_out(stage, work)] == [3, 3]
    assert tries == {"a": 3, "b": 1}


def test_a_unit_that_fails_every_attempt_is_recorded_with_its_reason(stage: Stage) -> None:
    def work(unit: str) -> list[UnitReport]:
        if unit == "b":
            raise ConnectionError("lost")
        return [UnitReport(unit, 3, 3, "hash", 1)]

    good, bad = fan_out(stage, work)
    assert good.written == 3
    assert (bad.read, bad.written, len(bad.failures)) == (3, 0, 3)
    assert "lost" in bad.failures[0].reason


def test_a_full_disk_ends_the_stage(stage: Stage) -> None:
    def work(unit: str) -> list[UnitReport]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part-00000.tar")

    with pytest.raises(OSError, match=r"No space left on device: 'part-00000\.tar'"):
        fan_out(stage, work)


def test_a_non_retryable_error_ends_the_stage(stage: Stage) -> None:
    def work(unit: str) -> list[UnitReport]:
        raise NonRetryableError("http://127.0.0.1:8000/v1 does not answer")

    with pytest.raises(NonRetryableError, match="does not answer"):
        fan_out(stage, work)


def test_publishing_replaces_the_old_outputs(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "data" / "out"
    (stage.out / "old").touch()
    stage.publish(out)
    stage.out.mkdir(parents=True)
    (stage.out / "new").touch()
    stage.publish(out)
    assert {path.name for path in out.iterdir()} == {"new", RECORD}
    assert not stage.scratch.parent.exists()


def open_stage(stage: Stage) -> Stage:
    return Stage("ingest", stage.params, {"a": 1})


def test_a_foreign_folder_is_an_error_before_a_stage_works(stage: Stage) -> None:
    Path("data/ingest").mkdir(parents=True)
    open_stage(stage)  # an empty folder is not foreign
    Path("data/ingest/mine").write_text("mine")
    with pytest.raises(ForeignFileError, match="data/ingest"):
        open_stage(stage)
    with pytest.raises(ForeignFileError, match="data/ingest"):
        stage.publish(Path("data/ingest"))
    assert Path("data/ingest/mine").read_text() == "mine"


def test_a_foreign_file_is_an_error(stage: Stage) -> None:
    record = Path("metrics/stages/ingest.json")
    stage.record(10, [])
    open_stage(stage)
    record.write_text('{"mine": 1}')
    with pytest.raises(ForeignFileError, match=r"metrics/stages/ingest\.json"):
        open_stage(stage)
    assert record.read_text() == '{"mine": 1}'


def test_links_out_of_the_project_are_errors(stage: Stage, tmp_path_factory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "ingest").mkdir()
    Path("data").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"paths\.ingest"):
        open_stage(stage)
    Path("data").unlink()
    Path(".lotlip").rename(outside / "scratch")
    Path(".lotlip").symlink_to(outside / "scratch")
    with pytest.raises(StageFailed, match="link"):
        open_stage(stage)


def test_a_stage_completes_the_publishing_of_a_killed_one(stage: Stage) -> None:
    (stage.out / "old").touch()
    stage.publish(Path("data/ingest"))
    Path("data/ingest").rename("data/ingest.lotlip-old")
    open_stage(stage)
    assert Path("data/ingest/old").exists()
    assert [path.name for path in Path("data").iterdir()] == ["ingest"]


HOLDER = """
import pathlib, sys
from lotlip.core.caches import lock
with lock(pathlib.Path(".lotlip/locks/pretrain-lit.lock")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.integration
def test_a_stage_runs_in_one_process_at_a_time(stage: Stage) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        Stage("pretrain", stage.params, {}, item="lotlip")
        with pytest.raises(Locked, match=f"stage pretrain-lit is in use by process {holder.pid}"):
            Stage("pretrain", stage.params, {}, item="lit")
    finally:
        holder.communicate(b"")
    Stage("pretrain", stage.params, {}, item="lit")


def test_a_damaged_input_is_an_error_with_a_remedy(stage: Stage) -> None:
    (stage.out / "index.json").write_text("{}")
    (stage.out / "train.tar").write_text("x" * 2**21)
    stage.publish(Path("data/ingest"))
    before = hash_of(Path("data/ingest/index.json"))
    with Path("data/ingest/train.tar").open("r+b") as file:
        file.write(b"y")
    with pytest.raises(Damaged, match=r"data/ingest/train\.tar is damaged.*dvc checkout"):
        hash_of(Path("data/ingest/index.json"))
    with Path("data/ingest/train.tar").open("r+b") as file:
        file.write(b"x")
    assert hash_of(Path("data/ingest/index.json")) == before


def test_the_fingerprint_depends_on_settings_and_inputs(stage: Stage) -> None:
    assert Stage("ingest", stage.params, {"a": 1}).fingerprint == stage.fingerprint
    assert Stage("ingest", stage.params, {"a": 2}).fingerprint != stage.fingerprint
    assert Stage("ingest", stage.params, {"a": 1}, {"data": "x"}).fingerprint != stage.fingerprint


def test_a_record_separates_work_from_orchestration(stage: Stage) -> None:
    stage.clock.parts = {}
    with stage.clock.measure("gate"):
        time.sleep(0.05)
    stage.record(10, [])
    record = json.loads(Path("metrics/stages/ingest.json").read_text())
    assert record["orchestration_seconds"]["gate"] >= 0.05
    assert record["seconds"] == pytest.approx(record["work_seconds"] + record["orchestration_seconds"]["gate"])


def test_a_missing_input_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="dvc repro"):
        hash_of(tmp_path / "index.json")


# --- processes ------------------------------------------------------------------------------------------------------


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def wait_until_dead(process: int) -> bool:
    deadline = time.monotonic() + 60
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(process)


PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(child.pid, flush=True); time.sleep(600)"
)


class Cancelled(BaseException):
    """Not an Exception, like Prefect's cancellation."""


@pytest.mark.integration
def test_a_cancelled_flow_leaves_no_process(tmp_path: Path) -> None:
    grandchildren: list[int] = []

    def on_line(line: str) -> None:
        grandchildren.append(int(line))
        raise Cancelled

    with pytest.raises(Cancelled):
        run_group([sys.executable, "-c", PARENT], on_line, tmp_path / "log")
    assert wait_until_dead(grandchildren[0])


@pytest.mark.integration
def test_a_failed_process_has_a_reason(tmp_path: Path) -> None:
    script = "import sys; print('step 1'); sys.exit('error: the loss is nan at step 2')"
    lines: list[str] = []
    with pytest.raises(StageFailed, match=r"^the loss is nan at step 2 \(status 1; log: .*log\)"):
        run_group([sys.executable, "-c", script], lines.append, tmp_path / "log")
    assert lines == ["step 1"]


# --- the fork server ------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_fork_runs_the_requested_program(checkout: Workspace, tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), sys.argv[1:], 'torch' in sys.modules, os.environ['MARK']); sys.exit(7)"
    (tmp_path / "target.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", "from flows.runtime.fork_server import delegate; delegate('target', ['x'])"],
        env={**checkout.environment, "MARK": "here"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, f"{tmp_path} ['x'] True here\n"), done.stderr


@pytest.mark.integration
def test_a_fork_ends_with_its_client(checkout: Workspace, tmp_path: Path) -> None:
    (tmp_path / "target.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    client = subprocess.Popen(
        [sys.executable, "-c", "from flows.runtime.fork_server import delegate; delegate('target', [])"],
        env=checkout.environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    fork = int(client.stdout.readline())
    assert is_alive(fork)
    client.kill()
    client.wait()
    assert wait_until_dead(fork)


@pytest.mark.integration
def test_the_fork_server_ends_with_its_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, time\nfrom flows.runtime.fork_server import fork_server\n"
            "with fork_server(dict(os.environ)) as environment:\n"
            f"    print(environment[{SOCKET!r}], flush=True)\n    time.sleep(600)",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout.readline()
    (fork_server_process,) = (child.pid for child in psutil.Process(owner.pid).children())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 300  # it may still be importing
    while is_alive(fork_server_process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(fork_server_process)


def test_delegate_returns_without_a_fork_server(monkeypatch) -> None:
    from flows.runtime.fork_server import delegate

    monkeypatch.setenv(SOCKET, "/nowhere/socket")
    delegate("json.tool", [])  # returns
    monkeypatch.delenv(SOCKET)
    delegate("json.tool", [])


# --- servers and errors ---------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("partition_size", "partition_sise"), "did you mean 'partition_size'?"),
        (
            lambda text: text.replace("kind: scenes\n    path", "kind: scene\n    path"),
            "unknown kind 'scene'; did you mean 'scenes'",
        ),
        (lambda text: text.replace("partition_size: 1000", "partition_size: 0"), "greater than or equal to 1, not 0"),
    ],
)
def test_invalid_parameters_are_an_error_of_one_line(checkout: Workspace, tmp_path: Path, edit, message: str) -> None:
    (tmp_path / "params.yaml").write_text(edit((ROOT / "params.yaml").read_text()))
    done = subprocess.run(
        [sys.executable, "-m", "flows.stages.ingest"],
        cwd=tmp_path,
        env=checkout.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error in ingest: params.yaml cannot be used" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- edits during a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def begin(stage: Stage):
    """Begins the stage again, in a project with a graph and parameters."""
    graph = "{stages: {ingest: {cmd: python -m flows ingest, params: [ingest, pretrain.text]}, own: {cmd: [a, b]}}}"
    Path("dvc.yaml").write_text(graph)
    Path("params.yaml").write_text("{ingest: {source: {train: 5}}, pretrain: {steps: 10}}")
    return lambda: Stage("ingest", stage.params, {"a": 1})


def edit(text: str) -> None:
    Path("params.yaml").write_text(text)


def test_parameters_that_are_edited_during_a_run_fail_the_stage(begin) -> None:
    running = begin()
    out = running.params.paths.ingest
    (running.out / "file").write_text("made with 5")
    edit("{ingest: {source: {train: 6}}, pretrain: {steps: 10}}")
    with pytest.raises(
        StageFailed, match=r"edited during this run \(ingest\.source\.train = 6\); undo the edit and run"
    ):
        running.publish(out)
    with pytest.raises(StageFailed, match="edited during this run"):
        running.record(1, [])
    edit("ingest: {source: ")
    with pytest.raises(StageFailed, match=r"params\.yaml was edited during this run and cannot be read"):
        running.publish(out)
    assert not out.exists()
    edit("{pretrain: {steps: 20}, ingest: {source: {train: 5}}}")  # not a parameter of this stage
    again = begin()
    assert (again.out / "file").read_text() == "made with 5"
    again.publish(out)
    assert (out / "file").is_file()


def test_code_that_is_edited_during_a_run_fails_the_stage(begin, monkeypatch) -> None:
    running = begin()
    monkeypatch.setattr("lotlip.core.code._files", lambda *_: [Path("params.yaml")])
    with pytest.raises(StageFailed, match="the code of this stage was edited during this run"):
        running.publish(running.params.paths.ingest)
    monkeypatch.setattr("lotlip.core.code._files", lambda *_: [Path("removed.py")])
    with pytest.raises(StageFailed, match="the code of this stage was edited"):
        running.publish(running.params.paths.ingest)


@pytest.mark.parametrize("name", STAGES)
def test_the_graph_lists_parameters_of_every_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    item = {"caption": "llava", "pretrain": "lotlip-m4", "evaluate": "lotlip"}.get(name)
    assert any(parameters(name, item).values())


def test_parameters_are_those_of_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = parameters("pretrain", "long-clip")
    assert found["ablations.long-clip"] is None and found["finetune.long-clip"]["init_from"] == "lit"
    assert parameters("pretrain", "lotlip-m4")["ablations.lotlip-m4"] == {"text": {"corner_tokens": 4}}


def test_a_stage_runs_again_after_its_starting_model_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    weights = Path("mine/model.safetensors")
    weights.write_text("old")
    from_mine = {"notes": {STARTING_MODELS: local_hashes(["mine"])}}
    records = {"image-tower": from_mine, "pretrain-a": from_mine, "pretrain-b": {}}
    for name, more in records.items():
        StageRecord.model_validate(STAGE | more).write(params.paths.stages / f"{name}.json")

    def kept() -> set[str]:
        remove_outdated_records(params)
        return {file.stem for file in params.paths.stages.iterdir()}

    assert kept() == set(records)
    assert not capsys.readouterr().out
    Path("mine/README.md").write_text("a note on the card")
    assert kept() == set(records)
    weights.write_text("new")
    assert remove_outdated_records(params, dry=True)
    assert {file.stem for file in params.paths.stages.iterdir()} == set(records)
    assert "mine has changed" in capsys.readouterr().out
    assert kept() == {"pretrain-b"}
    assert capsys.readouterr().out == "".join(
        f"mine has changed, so {name} runs again.\n" for name in ("image-tower", "pretrain-a")
    )


@pytest.mark.integration
def test_prefects_own_client_can_ask_the_server(prefect_api: dict[str, str]):
    """Its filters are null unless set; Prefect's command line and its workers depend on it."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = {PREFECT_API_URL: "PREFECT_API_URL", PREFECT_API_AUTH_STRING: "PREFECT_API_AUTH_STRING"}
    with (
        temporary_settings({setting: prefect_api[name] for setting, name in settings.items()}),
        get_client(sync_client=True) as client,
    ):
        for answer in (client.read_flows(), client.read_flow_runs(), client.read_deployments()):
            assert isinstance(answer, list)
