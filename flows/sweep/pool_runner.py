"""Runs the trials of a sweep as flow runs of a work pool, which any of its workers takes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import WorkPoolStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, State

from flows.pool import WORKER_DIED, trial_on_pool
from flows.runtime.git import run_git
from flows.runtime.scratch import StageFailed
from flows.sweep.runners import TrialRunner
from flows.sweep.trials import Sweep, Trial
from flows.sweep.workspaces import TRIALS, Experiment, Snapshot
from lotlip.config.params import Params
from lotlip.core.section import nearest

POLL_SECONDS = 5
RESCHEDULED_WITHIN = timedelta(minutes=5)  # after its worker died; later, nothing will do it
RUNS = 200  # flow runs of a trial


def find_deployment(pool: str, warn: Callable[[str], object]) -> UUID:
    """Returns the deployment that runs trials on a pool.

    Args:
        pool: its name.
        warn: called with a line if the pool has no worker.

    Raises:
        StageFailed: Prefect's server has no such pool, or the pool no such deployment.
    """
    address = PREFECT_API_URL.value()
    if not address:
        raise StageFailed(f"pool {pool}: set PREFECT_API_URL to the Prefect server that has the pool (docs/team.md)")
    with get_client(sync_client=True) as client:
        try:
            found = client.read_work_pool(pool)
        except ObjectNotFound as error:
            names = sorted(one.name for one in client.read_work_pools())
            raise StageFailed(
                f"no work pool {pool!r} on {address}{nearest(pool, names)} (there are: {', '.join(names) or 'none'})"
            ) from error
        name = f"{trial_on_pool.name}/{pool}"
        try:
            deployment = client.read_deployment_by_name(name).id
        except ObjectNotFound as error:
            raise StageFailed(
                f"pool {pool} has no deployment {name}; `python -m flows.deploy REPOSITORY BRANCH` creates it"
            ) from error
    if found.status != WorkPoolStatus.READY:
        warn(f"pool {pool} has no worker online; trials wait for one")
    return deployment


def check_remotes(root: Path) -> None:
    """Checks that the project can be shared with workers.

    Raises:
        StageFailed: git has no `origin`, or DVC no default remote.
    """
    if run_git("remote", "get-url", "origin", cwd=root).returncode:
        raise StageFailed(
            "a sweep on a pool needs the repository that workers clone as git's remote: `git remote add origin URL`"
        )
    from dvc.config import Config

    if not Config(str(root / ".dvc"))["core"].get("remote"):
        raise StageFailed(
            "a sweep on a pool shares data through DVC's default remote, and there is none: "
            "`dvc remote add --default NAME URL`"
        )


def publish(snapshot: Snapshot, params: Params, name: str, environment: Mapping[str, str]) -> str:
    """Pushes the snapshot to `origin`, and its data to DVC's default remote; returns the commit.

    Args:
        snapshot: of the project.
        params: params.yaml of the project.
        name: of the sweep.
        environment: environment variables of DVC.

    Raises:
        StageFailed: an input is on this machine only, or a push failed.
    """
    missing = [f"{key}: {path}" for key, path in params.inputs() if snapshot.lacks(path)]
    if missing:
        raise StageFailed(
            "workers cannot read these files, which no commit has, and no .dvc file of a commit; commit them, or use "
            "absolute paths on a file system of all workers:\n  - " + "\n  - ".join(missing)
        )
    command = [sys.executable, "-m", "flows.runtime.dvc", "push", "--quiet", "--with-deps", "shard"]
    done = subprocess.run(
        command, cwd=snapshot.root, env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise StageFailed(f"`dvc push` to the default remote failed: {reason}")
    return snapshot.publish(name)


class FlowRuns:
    """Flow runs of a deployment, each under the name of a trial.

    Args:
        deployment: runs trials on the pool.
        tag: of the sweep, for its flow runs.
    """

    def __init__(self, deployment: UUID, tag: str) -> None:
        self.deployment, self.tag = deployment, tag
        self._own: set[UUID] = set()  # unfinished
        self._stopping, self._lock = Event(), Lock()

    def run(self, name: str, parameters: Mapping[str, Any], out_of_time: Callable[[], bool]) -> State | None:
        """Runs a trial on the pool, or waits for its unfinished flow run, of any sweep.

        Args:
            name: of the trial.
            parameters: of the flow run.
            out_of_time: whether runs that no worker has taken are cancelled.

        Returns:
            The state in which the flow run has ended; None if no worker has taken it in time.

        Raises:
            StageFailed: `stop` was called.
        """
        with get_client(sync_client=True) as client:
            run = self._submit(client, name, parameters)
            state = self._wait(client, run, out_of_time)
            with self._lock:
                self._own.discard(run)
            return state

    def stop(self) -> None:
        """Cancels this sweep's unfinished flow runs, and ends the waiting for others."""
        self._stopping.set()
        with self._lock:
            own = list(self._own)
        if own:
            with suppress(httpx.HTTPError, RuntimeError), get_client(sync_client=True) as client:
                for run in own:
                    _cancel(client, run)

    def _submit(self, client: SyncPrefectClient, name: str, parameters: Mapping[str, Any]) -> UUID:
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[self.deployment])),
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=RUNS,
        )
        run = next((run for run in runs if run.state and not _has_ended(run.state)), None)
        if run is None:
            run = client.create_flow_run_from_deployment(
                self.deployment,
                name=name,
                parameters=dict(parameters),
                tags=[self.tag],
                # two sweeps that request it at the same time get the same run
                idempotency_key=f"{name}-{len(runs)}",
            )
        if self.tag in run.tags:  # otherwise another sweep needs it too
            with self._lock:
                self._own.add(run.id)
            if self._stopping.is_set():  # `stop` has not seen it
                _cancel(client, run.id)
        return run.id

    def _wait(self, client: SyncPrefectClient, run: UUID, out_of_time: Callable[[], bool]) -> State | None:
        while True:
            found = client.read_flow_run(run)
            if found.state and _has_ended(found.state):
                return found.state
            if found.state and found.state.is_scheduled() and not found.run_count and out_of_time():
                if run in self._own:
                    _cancel(client, run)
                return None
            if self._stopping.wait(POLL_SECONDS):
                raise StageFailed("the sweep was stopped")


def _has_ended(state: State) -> bool:
    if state.name == WORKER_DIED and datetime.now(UTC) - state.timestamp < RESCHEDULED_WITHIN:
        return False
    return state.is_final()


def _cancel(client: SyncPrefectClient, run: UUID) -> None:
    with suppress(ObjectNotFound):
        client.set_flow_run_state(run, Cancelling())


class PoolRunner(TrialRunner):
    """Runs each trial as a flow run of a work pool; if its worker dies, another one takes the run (flows.deploy).

    Args:
        settings: settings of the sweep.
        params: params.yaml of the project.
        snapshot: snapshot of the project that all trials run from.
        flow_run: URL of the sweep's flow run in Prefect's UI.
        deployment: runs trials on the pool.
        commit: of the snapshot, in `origin`.
    """

    def __init__(
        self, settings: Sweep, params: Params, snapshot: Snapshot, flow_run: str, deployment: UUID, commit: str
    ) -> None:
        super().__init__(settings, params, snapshot, flow_run)
        self.commit = commit
        self._runs = FlowRuns(deployment, f"sweep.{settings.name}")

    def is_finished(self, experiment: Experiment) -> bool:
        return super().is_finished(experiment) or experiment.fetch()

    def _run_experiment(self, trial: Trial, experiment: Experiment, lock: IO[Any]) -> bool:
        name = experiment.name
        parameters = {"name": name, "commit": self.commit, "changes": trial.overrides, "base": trial.base}
        state = self._runs.run(name, parameters, lambda: self.out_of_time)
        if state is None:
            return False
        if not state.is_completed():
            raise StageFailed(reason(state))
        if not experiment.fetch():
            raise StageFailed(
                f"its flow run has completed, but `origin` has no branch {TRIALS}/{name}; `origin` must be the "
                "repository that the pool's workers clone"
            )
        return True

    def _end_running(self) -> None:
        self._runs.stop()


def reason(state: State) -> str:
    """Returns why a flow run has not completed: the message of its error, without Prefect's introduction."""
    message = re.sub(r"^Flow run encountered an exception: (\w+: )?", "", state.message or "")
    return message or f"its flow run is {state.name}"
