"""Units of work on every task runner: the same bytes, lost workers, cancelling."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from concurrent.futures import Future
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest

from flows.runtime.runners import WorkerKilled, _Cluster, _Processes, task_runner
from flows.runtime.scratch import StageFailed
from flows.runtime.unit_work import UnitWork, picklable
from lotlip.core.compute import Compute
from lotlip.data.records import NonRetryableError, UnitReport
from tests.tiny_pipeline import smallest
from tests.workspace import Workspace


@pytest.mark.parametrize(("runner", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_missing_package_is_an_error_with_a_remedy(monkeypatch, runner, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    remedy = rf"{package} is not installed: pip install 'lotlip\[{runner}\]', or set it to threads or processes"
    with pytest.raises(StageFailed, match=f"compute.task_runner is {runner}, and {remedy}"):
        task_runner(Compute(task_runner=runner), on_gpu=False).__enter__()


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
        (KeyError("lost"), WorkerKilled, "the worker that ran it was killed: 'lost'"),
    ],
)
def test_a_killed_worker_differs_from_one_that_lacks_the_project(raised, error, message) -> None:
    """A cluster's own errors; what a unit raises is an answer."""
    failed: Future[Any] = Future()
    failed.set_exception(raised)
    with pytest.raises(error, match=message):
        _Cluster(lambda _: failed).run(UnitWork(nothing))


@pytest.mark.slow
def test_units_in_progress_on_a_cluster_are_abandoned_with_the_stage() -> None:
    cluster = _Cluster(lambda _: Future())
    threading.Timer(0.1, cluster.end).start()
    with pytest.raises(NonRetryableError, match="the stage ends"):
        cluster.run(UnitWork(nothing))


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

STAGES = (("ingest",), ("caption", "llava"), ("shard",), ("evaluate", "lotlip"))
OUTPUTS = (
    "data/ingest",
    "data/captions/llava",
    "data/shards",
    "metrics/lotlip.json",
    "metrics/summary",
    "metrics/attention",
)


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
    paths = [path for name in OUTPUTS for path in [workspace.folder / name, *(workspace.folder / name).rglob("*")]]
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
    assert all(f"{name}/" in names or name in found for name in OUTPUTS)
    return found


@pytest.mark.system
@pytest.mark.parametrize("runner", ["processes", "dask", "ray"])
def test_every_task_runner_writes_the_same_bytes(workspace: Workspace, expected, runner: str) -> None:
    workspace.change(lambda params: params["compute"].update(task_runner=runner))
    clear(workspace)
    for stage in STAGES:
        done = run_stage(workspace, stage, runner)
        assert not re.search(r"- Retry |py\.warnings|ERROR|Traceback", done.stderr), done.stderr
    assert outputs(workspace) == expected


def clear(workspace: Workspace) -> None:
    """Removes what the stages wrote."""
    for path in (workspace.folder / "data" / "caption-store").rglob("part-*"):
        path.unlink()  # or the captions would be reused
    for name in OUTPUTS:
        path = workspace.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run_stage(workspace: Workspace, stage: tuple[str, ...], runner: str, **environment: str) -> Any:
    """Runs a stage that has several units, to its end."""
    done = workspace.python("flows", *stage, **environment)
    units = re.search(rf"{'-'.join(stage)}: (\d+) units, task runner {runner}", done.stderr)
    assert units and int(units[1]) >= 2
    assert f"{units[1]} of {units[1]} units" in done.stderr
    return done


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
