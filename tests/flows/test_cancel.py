"""Cancelling training or killing its flow leaves no process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.runtime.fork_server import SOCKET
from lotlip.core.loopback import basic
from tests.training import tiny_job
from tests.workspace import ROOT, Workspace

pytestmark = pytest.mark.system

FLOW = """
import sys
from pathlib import Path

from prefect import flow

from flows.runtime.processes import launch, run_group
from lotlip.core.compute import LocalLaunch


@flow
def training(job: str) -> None:
    folder = Path(job).parent
    with (folder / "lines").open("w", buffering=1) as lines:
        command = launch("lotlip.train", [job], 2, LocalLaunch())
        run_group(command, lambda line: print(line, file=lines), folder / "errors.log")


if __name__ == "__main__":
    if sys.argv[1:]:
        training(sys.argv[1])
    else:
        training.serve(name="here")
"""


@pytest.fixture(scope="module")
def server(prefect_api: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program that uses a Prefect server."""
    home = tmp_path_factory.mktemp("prefect")
    environment = {**prefect_api, "PREFECT_HOME": str(home)}
    return {**os.environ, **environment, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def job(tiny_world, tmp_path: Path) -> Path:
    """A job of two processes, each with a worker of its loader, that takes much longer than the test."""
    settings = {"steps": 100000, "processes": 2, "loader_workers": 1}
    tiny_job(tiny_world, tmp_path, settings).write(tmp_path / "job.json")
    return tmp_path / "job.json"


@pytest.fixture
def forking(server: dict[str, str], fresh_checkout: Workspace) -> dict[str, str]:
    """As `server`, with a fork server, so that training processes need no imports."""
    return {**server, SOCKET: fresh_checkout.environment[SOCKET]}


def running(job: Path) -> list[psutil.Process]:
    """The launcher, the training processes and their loader workers; and the forks that training processes wait for."""
    processes = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        arguments = process.info["cmdline"] or []
        trains = str(job) in arguments and "lotlip.train" in arguments
        fork = "flows.runtime.fork_server" in arguments and process.info["cwd"] == str(job.parent)
        if (trains or fork) and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.append(process)
    return processes


def await_that(condition: Callable[[], bool], what: str, pause: float = 0.2) -> None:
    deadline = time.monotonic() + 1500
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(pause)


def trains(job: Path) -> bool:
    lines = job.parent / "lines"
    return lines.is_file() and "step 10/" in lines.read_text()


def start_flow(environment: dict[str, str], job: Path, *arguments: str) -> subprocess.Popen[bytes]:
    script = job.parent / "training.py"
    script.write_text(FLOW)
    log = (job.parent / "flow.log").open("w")
    return subprocess.Popen(
        [sys.executable, str(script), *arguments], env=environment, cwd=job.parent, stdout=log, stderr=log
    )


def send(environment: dict[str, str], path: str, data: dict[str, Any]) -> httpx.Response:
    """Sends a request like Prefect's UI."""
    headers = {"Authorization": basic(environment["PREFECT_API_AUTH_STRING"])}
    for seconds in (1, 2, 4, 8, 0):
        # without `verify=False`, each request on loopback loads all certificates, which takes 50 ms
        answer = httpx.post(
            f"{environment['PREFECT_API_URL']}/{path}", json=data, headers=headers, timeout=300, verify=False
        )
        if answer.status_code != 503:  # the database is busy, and clients should retry
            break
        time.sleep(seconds)
    return answer


def post(environment: dict[str, str], path: str, data: dict[str, Any]) -> Any:
    """Sends a request that must succeed, and returns the answer."""
    answer = send(environment, path, data)
    assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
    return answer.json()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_terminated_flow_ends_its_training(request, job, sign):
    forks = sign == signal.SIGTERM
    flow = start_flow(request.getfixturevalue("forking" if forks else "server"), job, str(job))
    await_that(lambda: trains(job), "training runs")
    assert len(running(job)) == (7 if forks else 5)
    flow.send_signal(sign)
    flow.wait(300)
    await_that(lambda: not running(job), f"all of {running(job)} have ended")


def test_a_cancelled_flow_ends_its_training(forking, job):
    """The button in Prefect's UI sets the state of the flow run."""
    server, runner = forking, start_flow(forking, job)
    try:
        log = job.parent / "flow.log"
        await_that(lambda: "being served" in log.read_text(), "the flow is served")
        own = {"flows": {"name": {"any_": ["training"]}}}  # other tests deploy to the same server
        (deployment,) = post(server, "deployments/filter", own)
        run = post(server, f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"job": str(job)}})
        await_that(lambda: trains(job), "training runs")
        post(server, f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        await_that(lambda: not running(job), "all of its processes have ended")
        assert runner.poll() is None  # the serving program continues
    finally:
        for process in [*psutil.Process(runner.pid).children(recursive=True), runner]:
            process.kill()
