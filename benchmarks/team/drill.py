"""Reproductions through restarts and kills of servers and workers."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from benchmarks.team.common import (
    RUN_SECONDS,
    Colleague,
    create_project,
    expect,
    git,
    run,
    say,
    wait_for_line,
)
from benchmarks.team.native import Team

START_RUN = """
import sys
from prefect.deployments import run_deployment
print(run_deployment("reproduce-on-pool/cpu", timeout=0, flow_run_name=sys.argv[1]).id)
"""


RUN_STATE = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    run = client.read_flow_run(sys.argv[1])
    print(run.state.name, run.run_count)
"""


TRAINED = """
from mlflow import MlflowClient
client = MlflowClient()
(experiment,) = [found for found in client.search_experiments() if found.name == "lotlip"]
for run in client.search_runs([experiment.experiment_id]):
    points = client.get_metric_history(run.info.run_id, "train.loss")
    print(run.info.run_name, len(points), sum(".r1" in name for name in run.data.metrics))
"""


class Reproduction:
    """A reproduction that some worker of the pool runs."""

    def __init__(self, colleague: Colleague, name: str) -> None:
        self._colleague, self.name = colleague, name
        self._id = colleague.python("-c", START_RUN, name).split()[-1]
        self.started = time.monotonic()

    def state(self) -> tuple[str, int]:
        """Returns the name of its state, and how often it was started."""
        name, starts = self._colleague.python("-c", RUN_STATE, self._id).split()[-2:]
        return name, int(starts)

    def wait_for(self, *names: str) -> tuple[str, int]:
        """Waits until it has one of the given states, and returns it as `state` does."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            state, starts = self.state()
            if state in names:
                return state, starts
            time.sleep(3)
        sys.exit(f"error: {self.name} is {state} after {RUN_SECONDS} s")


def drill(team: Team) -> None:
    """The long scenario: reproductions through a restart of Postgres and the loss of a worker, and a wiped checkout."""
    from tests.tiny_pipeline import smallest

    colleague = Colleague(team)
    create_project(team, colleague, smallest)

    first = Reproduction(colleague, "first")
    wait_for_line(team, "worker-cpu", "Running stage")
    say("Postgres is killed during a run")
    team.running["postgres"].kill()  # the watcher starts it again
    time.sleep(1)
    team.wait("postgres")
    expect("the run during the restart of Postgres", first.wait_for("Completed", "Failed", "Crashed"), ("Completed", 1))
    say("a reproduction ran on the pool", seconds=round(time.monotonic() - first.started))
    name, points, scores = colleague.python("-c", TRAINED).split()
    expect("the run in MLflow", name, "lotlip-seed0")
    expect("it has a loss and scores", int(points) > 0 and int(scores) > 0, True)
    restore(team, colleague, "runs/first")
    lost_worker(team, colleague)


def restore(team: Team, colleague: Colleague, branch: str) -> None:
    """A fresh clone on another machine gets everything with `dvc pull`, and nothing is stale."""
    clone = team.state / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    run(["git", "clone", "--quiet", "--branch", branch, str(team.local / "source"), str(clone)])
    dvc = [sys.executable, "-m", "dvc"]
    environment = {
        **colleague.environment,
        "PYTHONPATH": str(clone),
        "DVC_SITE_CACHE_DIR": str(team.state / "dvc-site"),
    }
    run([*dvc, "remote", "add", "--local", "--default", "team", "s3://dvc"], clone, environment)
    run([*dvc, "remote", "modify", "--local", "team", "endpointurl", "https://localhost:8445"], clone, environment)
    run([*dvc, "pull", "--quiet"], clone, environment)
    models = sorted(str(path.relative_to(clone)) for path in clone.glob("models/*/seed-*/model.safetensors"))
    expect("models after `dvc pull` in a fresh clone", models, ["models/lotlip/seed-0/model.safetensors"])
    dry = run([*dvc, "repro", "--dry"], clone, environment)
    expect("stages that `dvc repro` would run after it", dry.count("Running stage"), 0)


def lost_worker(team: Team, colleague: Colleague) -> None:
    """A worker's machine is lost during a run; another worker finishes the run."""
    source = team.state / "project"
    from tests.tiny_pipeline import change_params

    def longer(params: dict[str, Any]) -> None:
        params["pretrain"]["steps"] += 4

    change_params(source, longer)  # otherwise nothing would be left to train
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "--message", "longer")
    git(source, "push", "--quiet", str(team.local / "source"), "main")
    before = (team.state / "logs" / "worker-cpu.log").stat().st_size
    second = Reproduction(colleague, "second")
    log = team.state / "logs" / "worker-cpu.log"
    deadline = time.monotonic() + RUN_SECONDS
    while b"Running stage" not in log.read_bytes()[before:] and time.monotonic() < deadline:
        time.sleep(1)
    del team.wanted["worker-cpu"]  # the watcher must not start it again
    worker = team.running.pop("worker-cpu")
    worker.kill()
    killed = time.monotonic()
    say("the worker is killed during a run", state=second.state())
    team.start("worker-2", of="worker-cpu", PREFECT_WORKER_WEBSERVER_PORT="8093", TEAM_WORKER="worker-2")
    expect("the killed worker's run", second.wait_for("Completed", "Failed", "Crashed"), ("Completed", 2))
    say("another worker finished it", seconds=round(time.monotonic() - killed))
    restore(team, colleague, "runs/second")
