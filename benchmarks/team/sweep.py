"""A sweep on two workers, one of which is killed, and the reuse of its trials."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.team.common import (
    SWEEP_SECONDS,
    Colleague,
    create_project,
    expect,
    git,
    log_of,
    run,
    say,
    wait_for_line,
)
from benchmarks.team.native import GIT_SERVER, Machine, Team

SOURCE = f"git://{GIT_SERVER}/source"


TRIALS = {"corner_tokens": [0, 1, 2], "seeds": [0, 1]}


TRAINING = "Running stage 'pretrain@lotlip'"


TRIAL_RUNS = """
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
with get_client(sync_client=True) as client:
    deployment = client.read_deployment_by_name("trial-on-pool/cpu")
    for run in client.read_flow_runs(sort=FlowRunSort.ID_DESC, limit=200):
        if run.deployment_id == deployment.id:
            print(run.id, run.state.name, run.run_count)
"""


class Checkout:
    """A colleague's checkout of the project.

    Args:
        team: its servers.
        colleague: whose it is.
        folder: of the checkout.
    """

    def __init__(self, team: Team, colleague: Colleague, folder: Path) -> None:
        self.folder, self.environment = (
            folder,
            {
                **colleague.environment,
                "DVC_SITE_CACHE_DIR": str(team.state / f"{folder.name}-site"),
            },
        )
        dvc = [sys.executable, "-m", "dvc"]
        run([*dvc, "remote", "add", "--local", "--default", "team", "s3://dvc"], folder, self.environment)
        endpoint = ["endpointurl", "https://localhost:8445"]
        run([*dvc, "remote", "modify", "--local", "team", *endpoint], folder, self.environment)

    def sweep(self, **settings: Any) -> subprocess.Popen[bytes]:
        """Starts a sweep on the pool; its output is in the file sweep.txt."""
        command = [sys.executable, "-m", "flows.sweep", json.dumps({"pool": "cpu", **settings}, allow_nan=False)]
        with (self.folder / "sweep.txt").open("w") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def counts(self, sweep: subprocess.Popen[bytes]) -> str:
        """Waits until a sweep has ended, and returns how many trials it has done and reused.

        Raises:
            SystemExit: it failed.
        """
        status = sweep.wait(SWEEP_SECONDS)
        text = (self.folder / "sweep.txt").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^\d+ trials: (.*)\.$", text, re.MULTILINE)
        if status or not found:
            sys.exit(f"error: the sweep ended with {status}\n{text[-6000:]}")
        return found[1]


def sweep(team: Team) -> None:
    """Two machines share a sweep; one is lost, and its trial is finished by the other. Nobody trains it again."""
    from tests.tiny_pipeline import smallest

    def short(params: dict[str, Any]) -> None:
        smallest(params)
        params["pretrain"]["steps"] = 12

    colleague = Colleague(team)
    project = create_project(team, colleague, short)
    serve_git(team)
    git(project, "remote", "add", "origin", SOURCE)
    first = Checkout(team, colleague, project)

    machines = {number: Machine(team.state, number) for number in (1, 2)}
    for machine in machines.values():
        start_worker(team, machine)
    started = time.monotonic()
    running = first.sweep(name="shared", **TRIALS)
    wait_for_line(team, "machine-1", TRAINING, running, times=2)
    say("a worker is killed in its second trial", seconds=round(time.monotonic() - started))
    team.running.pop("machine-1").kill()
    machines[1].cut()
    expect("the sweep", first.counts(running), "6 done")
    say("the sweep has ended", seconds=round(time.monotonic() - started))
    runs = [line.split() for line in colleague.python("-c", TRIAL_RUNS).splitlines() if line.count("-") >= 4]
    expect(
        "starts of completed flow runs",
        sorted(count for _, state, count in runs if state == "Completed"),
        ["1", "1", "1", "1", "1", "2"],
    )
    taken = {number: runs_of(team, machine.name) for number, machine in machines.items()}
    say("flow runs of each worker", **{machines[number].name: len(ids) for number, ids in taken.items()})
    expect("flow runs that both workers started", len(taken[1] & taken[2]), 1)
    expect("flow runs that some worker started", len(taken[1] | taken[2]), 6)
    expect("whether both finished some", (len(taken[1]) > 1, len(taken[2]) > 1), (True, True))
    expect("the sweep again", first.counts(first.sweep(name="again", **TRIALS)), "6 reused")

    git(project, "add", "dvc.lock")
    git(project, "commit", "--quiet", "--message", "data")
    git(project, "push", "--quiet", "origin", "main")
    team.running.pop("machine-2").kill()
    reuse(team, colleague)


def reuse(team: Team, colleague: Colleague) -> None:
    """Another checkout and a third machine find what the sweep's workers have shared."""
    clone = team.state / "clone"
    run(["git", "clone", "--quiet", "--branch", "main", SOURCE, str(clone)])
    second = Checkout(team, colleague, clone)
    expect("the sweep in a colleague's clone", second.counts(second.sweep(name="other", **TRIALS)), "6 reused")
    name = git(clone, "for-each-ref", "--format=%(refname:lstrip=4)", "--count=1", "refs/exps").strip()
    run([sys.executable, "-m", "flows.sweep", "--apply", name], clone, second.environment)
    say("a trial is applied in that clone", name=name, diff=git(clone, "diff", "--stat").strip().splitlines()[-1])
    git(clone, "checkout", "--quiet", "params.yaml")
    start_worker(team, Machine(team.state, 3))
    scored = {"evaluate.max_conditioned_pairs": [7]}
    counts = second.counts(second.sweep(name="scores", corner_tokens=[1], seeds=[0], other=scored))
    expect("a trial that differs in its evaluation", counts, "1 done")
    text = log_of(team, "machine-3")
    expect("trainings of a new machine", text.count(TRAINING), 0)
    expect("trainings from the run cache", text.count("Stage 'pretrain@lotlip' is cached - skipping run"), 1)


def serve_git(team: Team) -> None:
    """Serves the repository that workers clone, until the namespace ends."""
    options = ["--export-all", "--enable=receive-pack", f"--base-path={team.local}"]
    subprocess.Popen(["git", "daemon", *options, str(team.local)])


def start_worker(team: Team, machine: Machine) -> None:
    """Starts a worker on a machine, which runs one flow run at a time."""
    team.start(machine.name, of="worker-cpu", machine=machine, TEAM_WORKER=machine.name, TEAM_WORKER_RUNS="1")


def runs_of(team: Team, worker: str) -> set[str]:
    """Returns the ids of the flow runs that a worker has taken."""
    return set(re.findall(r"submitting flow run '([0-9a-f-]{36})'", log_of(team, worker)))
