"""Stages without an MLflow server publish models, and their runs are completed later."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from flows.runtime.servers import free_port, listen, mlflow_server, new_login
from tests.flows.test_cancel import await_that
from tests.tiny_pipeline import smallest
from tests.training import split
from tests.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.entities import Run

pytestmark = pytest.mark.system

STEPS = 200


def dead_proxies() -> dict[str, str]:
    """An environment that sends every request to a dead proxy."""
    dead = f"http://127.0.0.1:{free_port()}"
    return {name: dead for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())}


@pytest.fixture(scope="module")
def sharded(make_workspace: Callable[[], Workspace]) -> Workspace:
    """A workspace in which all stages before training have run."""
    workspace = make_workspace()
    workspace.change(smallest)
    workspace.run("dvc", "repro", "--quiet", "shard", **dead_proxies())
    return workspace


def change_settings(workspace: Workspace, **settings: Any) -> None:
    """Changes settings of `pretrain` and `compute.training`."""
    recipe, how = split(settings)
    workspace.change(lambda params: params["pretrain"].update(recipe))
    workspace.change(lambda params: params["compute"]["training"].update(how))


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if "MLflow at" in line]


def find_run(workspace: Workspace, seed: int) -> Run:
    client = workspace.mlflow()
    experiment = client.get_experiment_by_name("lotlip")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.seed = '{seed}'")
    return run


def logged_steps(workspace: Workspace, seed: int) -> list[int]:
    run = find_run(workspace, seed)
    return sorted(point.step for point in workspace.mlflow().get_metric_history(run.info.run_id, "train.loss"))


def check_restored(workspace: Workspace, seeds: list[int], steps: list[int], **more: str) -> None:
    workspace.python("flows.restore", **dead_proxies(), **more)
    for seed in seeds:
        run = find_run(workspace, seed)
        assert run.info.status == "FINISHED"
        assert logged_steps(workspace, seed) == steps
        assert run.outputs.model_outputs


@contextmanager
def start_training(workspace: Workspace, **more: str) -> Any:
    """A training stage while it runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.stages.pretrain", "lotlip"],
        cwd=workspace.folder,
        env={**workspace.environment, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def test_models_are_published_without_an_mlflow_server_and_sent_later(sharded: Workspace):
    change_settings(sharded, seeds=[0, 1], steps=8, log_every=2)
    address = f"http://127.0.0.1:{free_port()}"
    done = sharded.python("flows.stages.pretrain", "lotlip", MLFLOW_TRACKING_URI=address, **dead_proxies())
    (line,) = warnings(done.stdout + done.stderr)
    assert f"MLflow at {address} " in line
    assert "Traceback" not in done.stdout + done.stderr
    assert "Retrying" not in done.stdout + done.stderr
    for seed in (0, 1):
        assert (sharded.folder / "models" / "lotlip" / f"seed-{seed}" / "model.safetensors").is_file()
    check_restored(sharded, [0, 1], [2, 4, 6, 8])


def test_models_are_published_when_the_mlflow_server_is_killed_and_curves_are_sent_later(
    sharded: Workspace, monkeypatch: pytest.MonkeyPatch
):
    change_settings(sharded, seeds=[2], steps=STEPS, log_every=1, checkpoint_every=STEPS, stop_at_chance_after=0)
    port, login = free_port(), new_login()
    user, _, password = login.partition(":")
    monkeypatch.chdir(sharded.folder)
    account = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    with (
        mlflow_server(listen(port), "sqlite:///mlflow.db", login) as address,
        start_training(sharded, MLFLOW_TRACKING_URI=address, **account, **dead_proxies()) as stage,
    ):
        await_that(lambda: has_curve(sharded, 2) or stage.poll() is not None, "the server has some of the curve")
        assert stage.poll() is None, stage.communicate()
        command = ["-m", "flows.runtime.applications", "mlflow"]
        (server,) = [child for child in psutil.Process().children(recursive=True) if child.cmdline()[1:4] == command]
        server.kill()
        output = stage.communicate()[0]
    assert stage.returncode == 0, output
    (line,) = warnings(output)
    assert f"MLflow at {address} " in line
    assert "Traceback" not in output
    assert "Retrying" not in output
    assert (sharded.folder / "models" / "lotlip" / "seed-2" / "model.safetensors").is_file()
    assert 0 < len(logged_steps(sharded, 2)) < STEPS
    with mlflow_server(listen(port), "sqlite:///mlflow.db", login) as address:  # the server is back
        check_restored(sharded, [2], list(range(1, STEPS + 1)), MLFLOW_TRACKING_URI=address, **account)


def is_training(process: psutil.Process, workspace: Workspace) -> bool:
    try:
        return "lotlip.train" in process.cmdline() and Path(process.cwd()) == workspace.folder
    except psutil.Error:  # it has ended
        return False


def has_curve(workspace: Workspace, seed: int) -> bool:
    """Whether MLflow's store has part of a seed's curve. This is faster than MLflow's client."""
    query = (
        "SELECT 1 FROM metrics JOIN tags USING (run_uuid) "
        "WHERE metrics.key = 'train.loss' AND tags.key = 'seed' AND tags.value = ?"
    )
    try:
        with closing(sqlite3.connect(f"file:{workspace.folder / 'mlflow.db'}?mode=ro", uri=True)) as store:
            return store.execute(query, [str(seed)]).fetchone() is not None
    except sqlite3.OperationalError:  # locked or not created yet
        return False


def test_a_finished_seed_stays_finished_when_another_one_fails(sharded: Workspace):
    change_settings(sharded, seeds=[3, 4], steps=STEPS, log_every=100, checkpoint_every=STEPS, stop_at_chance_after=0)
    work = sharded.folder / ".lotlip" / "work" / "pretrain-lotlip"
    with start_training(sharded) as stage:
        finished = lambda: [*work.glob("*/out/seed-3/history.json")]  # noqa: E731
        await_that(lambda: bool(finished()) or stage.poll() is not None, "the first seed is trained")
        assert stage.poll() is None, stage.communicate()
        (training,) = [process for process in psutil.process_iter() if is_training(process, sharded)]
        training.kill()  # the fork that it waits for ends with it
        output = stage.communicate()[0]
    assert stage.returncode == 1, output
    assert find_run(sharded, 3).info.status == "FINISHED"
    assert find_run(sharded, 4).info.status == "FAILED"
    sharded.python("flows.stages.pretrain", "lotlip")
    assert find_run(sharded, 4).info.status == "FINISHED"
