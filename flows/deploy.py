"""Sets up a team's Prefect server: work pools, deployments, and an automation that finishes the runs of dead workers.

`python -m flows.deploy REPOSITORY BRANCH` uses the server of PREFECT_API_URL. It can run again after an upgrade.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists
from prefect.runner.storage import GitRepository
from prefect.workers.process import ProcessWorker

from flows.pool import reproduce_on_pool

POOLS = {"cpu": 4, "gpu": 1}  # name → number of flow runs at a time, for a new pool
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
SILENCE = timedelta(seconds=90)  # three heartbeats of infra/compose.yaml's workers
AUTOMATION = "Reschedule runs whose worker died"


def create_pools() -> None:
    """Creates the pools that do not exist; existing ones keep their limits."""
    with get_client(sync_client=True) as client:
        for name, limit in POOLS.items():
            pool = WorkPoolCreate(
                name=name,
                type=ProcessWorker.type,
                base_job_template=ProcessWorker.get_default_base_job_template(),
                concurrency_limit=limit,
            )
            try:
                client.create_work_pool(pool)
            except ObjectAlreadyExists:
                continue


def deploy(repository: str, branch: str) -> list[str]:
    """Creates or updates the deployments of each pool, and returns their names.

    Args:
        repository: address of the git repository that workers clone.
        branch: of the repository.
    """
    names = []
    for pool in POOLS:
        deployment = reproduce_on_pool.to_deployment(
            pool, work_pool_name=pool, entrypoint_type=EntrypointType.MODULE_PATH
        )
        assert isinstance(deployment, RunnerDeployment)  # a coroutine only in async code
        deployment.storage = GitRepository(repository, branch=branch)
        deployment.apply()
        names.append(f"{reproduce_on_pool.name}/{pool}")
    return names


def reschedule_runs_of_dead_workers() -> None:
    """Creates the automation by which another worker starts a run whose worker has been silent for SILENCE."""
    automation = Automation(
        name=AUTOMATION,
        description="A worker that was killed cannot report it; another worker of the pool takes the run.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="its worker died")],
    )
    try:
        existing = Automation.read(name=AUTOMATION)
    except ValueError:
        automation.create()
        return
    assert isinstance(existing, Automation)  # a coroutine only in async code
    automation.id = existing.id
    automation.update()


def main(repository: str, branch: str) -> None:
    """Sets up the server, and prints the deployments."""
    create_pools()
    reschedule_runs_of_dead_workers()
    print(f"deployments: {', '.join(deploy(repository, branch))}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m flows.deploy REPOSITORY BRANCH")
    main(*sys.argv[1:])
