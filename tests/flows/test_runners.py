"""Units of work on every task runner: the same bytes, lost workers, cancelling."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from flows.runtime.runners import UnitLost, _Cluster, _Processes, task_runner
from flows.runtime.scratch import StageFailed
from flows.runtime.servers import free_port
from flows.runtime.unit_work import UnitWork, answer, picklable
from lotlip.core.compute import Compute
from lotlip.core.temporary import temporary_folder
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.ingest.config import ImagesConfig, SceneSourceConfig
from lotlip.ingest.partition import Ingesting
from tests.clusters import CLUSTERS
from tests.tiny_pipeline import ROOT, smallest
from tests.workspace import Workspace


@pytest.mark.parametrize(("runner", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_missing_package_is_an_error_with_a_remedy(monkeypatch, runner, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    remedy = rf"{package} is not installed: pip install 'lotlip\[{runner}\]', or set it to threads or processes"
    with pytest.raises(StageFailed, match=f"compute.task_runner is {runner}, and {remedy}"):
        task_runner(Compute(task_runner=runner), on_gpu=False).__enter__()


@pytest.mark.parametrize("runner", ["ray", "dask"])
@pytest.mark.parametrize("scheme", ["", "tcp://"])
def test_a_cluster_that_does_not_answer_is_an_error(runner: str, scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    compute = Compute.model_validate({"task_runner": runner, runner: {"address": address}})
    with pytest.raises(StageFailed, match=f"no cluster answers at compute.{runner}.address, {address} "):
        task_runner(compute, on_gpu=False).__enter__()


class Refused(NonRetryableError):
    """Cannot be pickled, like an error that holds a connection."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.connection = threading.Lock()


def test_an_error_that_cannot_be_pickled_becomes_a_plain_one() -> None:
    error = OSError(28, "No space left")
    assert picklable(error) is error
    assert type(picklable(Refused("no key"))) is NonRetryableError
    assert str(picklable(Refused("no key"))) == "Refused: no key"


def nothing() -> list[UnitReport]:
    return []


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (RuntimeError("No module named 'flows'"), NonRetryableError, r"cannot run this project \(No mod.* PYTHONPATH"),
        (KeyError("lost"), UnitLost, "the worker that ran it was killed: 'lost'"),
    ],
)
def test_a_killed_worker_differs_from_one_that_lacks_the_project(raised, error, message) -> None:
    """A cluster's own errors; what a unit raises is an answer."""
    failed: Future[Any] = Future()
    failed.set_exception(raised)
    with pytest.raises(error, match=message):
        _Cluster(lambda *_: failed, lambda _: None).run(UnitWork(nothing))


class LargeAnswer(Future[Any]):
    """A future like Dask's, whose timeout also cuts off the transfer of a large answer."""

    def result(self, timeout: float | None = None) -> Any:
        if timeout is not None:
            raise TimeoutError
        return super().result()


def test_the_transfer_of_a_large_answer_is_not_cut_off() -> None:
    future = LargeAnswer()
    future.set_result([])
    assert _Cluster(lambda *_: future, lambda _: None).run(UnitWork(nothing)) == []


@pytest.mark.slow
def test_units_in_progress_on_a_cluster_are_abandoned_with_the_stage() -> None:
    cluster = _Cluster(lambda *_: Future(), lambda _: None)
    threading.Timer(0.1, cluster.end).start()
    with pytest.raises(NonRetryableError, match="the stage ends"):
        cluster.run(UnitWork(nothing))


@pytest.mark.slow
def test_a_unit_is_sent_until_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenes = {"kind": "scenes", "path": "world.py", "train": 2, "val": 1, "test": 1, "image_size": 32}
    work = Ingesting(SceneSourceConfig.model_validate(scenes), ImagesConfig(), Path(".lotlip/units"))
    unit = work.open().units(5)[0]
    answers: list[Any] = [ConnectionError("no answer"), ([], {"../x": [(0, b"")]})]
    sent: list[Any] = []

    def start(request: bytes, common: Any) -> Future[Any]:
        sent.append(pickle.loads(request))
        found: Future[Any] = Future()
        found.set_result(answers.pop(0) if answers else answer(request, common))
        return found

    cluster = _Cluster(start, lambda files: files)
    with pytest.raises(ConnectionError):
        work(unit, cluster.write)
    with pytest.raises(NonRetryableError, match=r"sent '\.\./x', which its unit does not write"):
        work(unit, cluster.write)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (report,) = work(unit, cluster.write)
    assert report.written == 2 and len(sent) == 3
    written = {path: path.read_bytes() for path in work.folder.rglob("*") if path.is_file()}
    assert work(unit, cluster.write) == [report] and len(sent) == 3
    shutil.rmtree(work.folder)
    assert work(unit) == [report]
    assert {path: path.read_bytes() for path in work.folder.rglob("*") if path.is_file()} == written


@pytest.mark.integration
def test_a_process_survives_work_that_it_cannot_load(monkeypatch) -> None:
    pool = _Processes(1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(nothing, "__module__", "no_such_module")
            patch.setitem(sys.modules, "no_such_module", SimpleNamespace(nothing=nothing))
            with pytest.raises(ModuleNotFoundError, match="no_such_module"):
                pool.run(UnitWork(nothing))
        assert pool.run(UnitWork(nothing)) == []
        assert len(pool._started) == 1
    finally:
        pool.end()
    with pytest.raises(NonRetryableError, match="the stage ends"):
        pool._start()


# --- in a checkout ------------------------------------------------------------------------------------------------

OUTPUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("ingest",): ("data/ingest",),
    ("caption", "llava"): ("data/captions/llava",),
    ("shard",): ("data/shards",),
    ("evaluate", "lotlip"): ("metrics/lotlip.json", "metrics/summary", "metrics/attention"),
}
STAGES = tuple(OUTPUTS)


@pytest.fixture(scope="module")
def workspace(make_workspace) -> Workspace:
    """A workspace whose stages with units have several, all finished in threads."""

    def change(params: dict[str, Any]) -> None:
        smallest(params)
        params["pretrain"] |= {"steps": 4, "seeds": [0, 1]}
        params["shard"]["store_features"] = True
        params["evaluate"]["benchmarks"]["held-out"] = {"kind": "held-out", "split": "test", "sub_captions": 2}

    workspace: Workspace = make_workspace()
    workspace.change(change)
    for stage in (*STAGES[:1], ("image-tower",), *STAGES[1:3], ("pretrain", "lotlip"), *STAGES[3:]):
        workspace.python("flows", *stage)
    return workspace


def outputs(workspace: Workspace) -> dict[str, str]:
    """The hash of each file that the stages wrote."""
    names = (name for written in OUTPUTS.values() for name in written)
    paths = [path for name in names for path in [workspace.folder / name, *(workspace.folder / name).rglob("*")]]
    return {
        path.relative_to(workspace.folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(workspace: Workspace) -> dict[str, str]:
    """What the stages write in threads."""
    found = outputs(workspace)
    names = " ".join(found)
    assert all(f"{name}/" in names or name in found for written in OUTPUTS.values() for name in written)
    return found


@pytest.mark.system
@pytest.mark.parametrize(
    ("runner", "stages"),
    # Clusters of this machine: `test_caption` shows that they caption equally.
    [("processes", STAGES), ("dask", (("shard",),)), ("ray", (("ingest",),))],
    ids=["processes", "dask", "ray"],
)
def test_every_task_runner_writes_the_same_bytes(
    workspace: Workspace, expected, runner: str, stages: tuple[tuple[str, ...], ...]
) -> None:
    workspace.change(lambda params: params["compute"].update(task_runner=runner))
    clear(workspace, stages)
    before = processes_in(workspace.folder)
    for stage in stages:
        done = run_stage(workspace, stage, runner)
        assert not re.search(r"- Retry |py\.warnings|ERROR|Traceback", done.stderr), done.stderr
    assert outputs(workspace) == expected
    _, alive = psutil.wait_procs(processes_in(workspace.folder) - before, timeout=120)
    assert not alive


def processes_in(folder: Path) -> set[psutil.Process]:
    """The processes whose current folder it is, as that of a flow's workers."""
    return {one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(folder)}


def clear(workspace: Workspace, stages: Iterable[tuple[str, ...]] = STAGES) -> None:
    """Removes what stages wrote."""
    for path in (workspace.folder / "data" / "caption-store").rglob("part-*"):
        path.unlink()  # or the captions would be reused
    for name in (name for stage in stages for name in OUTPUTS[stage]):
        path = workspace.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run_stage(workspace: Workspace, stage: tuple[str, ...], runner: str, **environment: str) -> Any:
    """Runs a stage that has several units, to its end."""
    done = workspace.python("flows", *stage, **environment)
    units = re.search(rf"{'-'.join(stage)}: (\d+) units, task runner {runner}", done.stderr)
    assert units and int(units[1]) >= 2
    assert f"{units[1]} of {units[1]} units" in done.stderr
    return done


ENTRY_POINTS = "[lotlip.captioners]\ndying = dying:Dying\n"
DYING = """
import os
from pathlib import Path
from typing import Literal

from lotlip.caption.config import SceneCaptionerConfig
from lotlip.demo.captioner import SceneCaptioner


class Dying(SceneCaptioner):
    class Config(SceneCaptionerConfig):
        kind: Literal["dying"]

    def _caption(self, record):
        dies = Path(__file__).with_name("dies")
        if record.key == "train-000003" and dies.exists():
            dies.unlink()
            os.kill(os.getpid(), 9)
        return super()._caption(record)
"""


def write_plugin(folder: Path) -> None:
    """Writes a package with a captioner that kills its process if there is a file `dies` beside it."""
    about = folder / "dying-1.0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (folder / "dying.py").write_text(DYING)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dying\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)


@pytest.mark.system
@pytest.mark.parametrize(
    ("kind", "shares"),
    # Number of workers → stages: one worker imports the models once.
    [("dask", {2: STAGES[:2], 1: STAGES[2:]}), ("ray", {1: STAGES[1:]})],
    ids=["dask", "ray"],
)
def test_workers_that_have_none_of_the_projects_files_write_the_same_bytes(
    workspace: Workspace, expected, tmp_path: Path, kind: str, shares: dict[int, tuple[tuple[str, ...], ...]]
) -> None:
    """They know no server of Prefect either, and one is killed. Those of Ray first share the project's folder."""
    clear(workspace)
    on_nodes = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    on_nodes["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    for folder in (workspace.folder, tmp_path):
        write_plugin(folder)
    with temporary_folder(kind, for_sockets=True) as folder, CLUSTERS[kind](folder, on_nodes) as cluster:

        def run(stage: tuple[str, ...], **how: Any) -> None:
            how |= {"task_runner": kind, kind: {"address": cluster.address}}
            workspace.change(lambda params: params["compute"].update(how))
            done = run_stage(workspace, stage, kind, **cluster.environment)
            assert "Traceback" not in done.stderr, done.stderr

        if kind == "ray":
            with cluster.node(on_nodes, 2):
                run(("ingest",))
        workspace.change(lambda params: params["caption"]["captioners"]["llava"].update(kind="dying"))
        (tmp_path / "dies").touch()
        for workers, stages in shares.items():
            with cluster.node(on_nodes, workers, workspace.folder):
                for stage in stages:
                    run(stage, shared_folder=False)
        assert not (tmp_path / "dies").exists()
    workspace.change(lambda params: params["caption"]["captioners"]["llava"].update(kind="scenes"))
    workspace.change(lambda params: params["compute"].update(shared_folder=True, **{kind: {"address": None}}))
    assert outputs(workspace) == expected


@pytest.mark.system
def test_an_evaluation_scores_again_when_captions_have_changed_since_its_gate_failed(workspace: Workspace) -> None:
    """Shards have no captions of test images, but a benchmark of kind held-out has them."""
    workspace.change(lambda params: params["compute"].update(task_runner="threads"))
    workspace.change(lambda params: params["evaluate"].update(min_score_over_chance=1000))

    def scored() -> bool:
        done = workspace.python("flows", "evaluate", "lotlip", check=False)
        assert done.returncode == 1 and "is at least 1000" in done.stdout + done.stderr, done.stderr
        return "lotlip on held-out: seed 0 done" in done.stderr

    assert scored() and not scored()  # finished units are kept
    workspace.change(lambda params: params["caption"]["captioners"]["llava"].update(omission=0.9))
    workspace.python("flows", "caption", "llava")
    assert scored()
