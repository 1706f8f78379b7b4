"""Sets up a team's Prefect server: work pools, deployments, and automations that finish the runs of dead workers.

`python -m flows.deploy REPOSITORY BRANCH [POOL=TYPE…]` uses the server of PREFECT_API_URL. It can run again after an
upgrade. Without pools, it sets up those of infra/compose.yaml. A type is the name that Prefect has for the workers'
infrastructure, such as process, kubernetes or, with the package `prefect-slurm`, slurm. A YAML file replaces Prefect's
job template: `cluster=kubernetes:infra/pools/kubernetes.yaml`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists
from prefect.runner.storage import GitRepository
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.workers.utilities import (
    get_available_work_pool_types,
    get_default_base_job_template_for_infrastructure_type,
)

from flows.pool import WORKER_DIED, reproduce_on_pool, trial_on_pool
from flows.runtime.scratch import EXPECTED
from lotlip.core.console import answer_help
from lotlip.core.section import ConfigError, nearest
from lotlip.core.yaml import read_yaml

PROCESS = "process"
POOLS = {"cpu": 4, "gpu": 1}  # name → number of flow runs at a time, for a new pool
FLOWS = (reproduce_on_pool, trial_on_pool)
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
SILENCE = timedelta(seconds=90)  # three heartbeats of infra/compose.yaml's workers
MARKING = "Mark runs whose worker died"
RESCHEDULING = "Reschedule runs whose worker died"


@dataclass(frozen=True)
class Pool:
    """A work pool to set up.

    Attributes:
        name: its name.
        kind: Prefect's name for its workers' infrastructure.
        limit: number of flow runs at a time; None: no limit.
        template: YAML file with its job template; None: Prefect's default.
    """

    name: str
    kind: str = PROCESS
    limit: int | None = None
    template: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Pool:
        """Reads POOL=TYPE or POOL=TYPE:FILE.

        Raises:
            ConfigError: it is neither.
        """
        name, _, rest = text.partition("=")
        kind, _, file = rest.partition(":")
        if not name or not kind:
            raise ConfigError(f"{text!r} is not POOL=TYPE or POOL=TYPE:FILE")
        return cls(name, kind, template=Path(file) if file else None)

    def job_template(self) -> dict[str, Any]:
        """Returns the template of its workers' jobs.

        Raises:
            ConfigError: no installed package has such workers, or the file is not a template.
            OSError: the file cannot be read.
        """
        default = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type(self.kind))
        if default is None:
            kinds = run_coro_as_sync(get_available_work_pool_types()) or []
            raise ConfigError(
                f"no installed package has workers of the type {self.kind!r}{nearest(self.kind, kinds)} "
                f"(there are: {', '.join(kinds)})"
            )
        if self.template is None:
            return default
        template = read_yaml(self.template)
        if not isinstance(template, dict):
            raise ConfigError(f"{self.template} is not a job template, which is a mapping")
        return template


def create_pools(pools: Sequence[Pool]) -> None:
    """Creates the pools that do not exist; existing ones keep their limits and templates."""
    with get_client(sync_client=True) as client:
        for pool in pools:
            new = WorkPoolCreate(
                name=pool.name,
                type=pool.kind,
                base_job_template=pool.job_template(),
                concurrency_limit=pool.limit,
            )
            try:
                client.create_work_pool(new)
            except ObjectAlreadyExists:
                continue


def deploy(repository: str, branch: str, pools: Sequence[Pool]) -> list[str]:
    """Creates or updates the deployments of each pool, and returns their names.

    Args:
        repository: address of the git repository that workers clone.
        branch: of the repository.
        pools: existing pools.
    """
    names = []
    for pool in pools:
        for flow in FLOWS:
            deployment = flow.to_deployment(
                pool.name, work_pool_name=pool.name, entrypoint_type=EntrypointType.MODULE_PATH
            )
            assert isinstance(deployment, RunnerDeployment)  # a coroutine only in async code
            deployment.storage = GitRepository(repository, branch=branch)
            deployment.apply()
            names.append(f"{flow.name}/{pool.name}")
    return names


def reschedule_runs_of_dead_workers() -> None:
    """Creates the automations by which another worker starts a run whose worker has been silent for SILENCE.

    The first one marks the run as crashed, which the server refuses for a run that has ended: its last event may be
    late, or lost with a restored database. The second one schedules the runs that were marked.
    """
    run = {"prefect.resource.id": ["prefect.flow-run.*"]}
    silence = EventTrigger(
        after={HEARTBEAT},
        expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
        match=run,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    marked = EventTrigger(
        expect={f"prefect.flow-run.{WORKER_DIED}"},
        match=run,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    _create_or_update(
        Automation(
            name=MARKING,
            description="A worker that was killed cannot report it.",
            trigger=silence,
            actions=[ChangeFlowRunState(state=StateType.CRASHED, name=WORKER_DIED, message="its worker is silent")],
        )
    )
    _create_or_update(
        Automation(
            name=RESCHEDULING,
            description="Another worker of the pool takes the run.",
            trigger=marked,
            actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="its worker died")],
        )
    )


def _create_or_update(automation: Automation) -> None:
    try:
        existing = Automation.read(name=automation.name)
    except ValueError:
        automation.create()
        return
    assert isinstance(existing, Automation)  # a coroutine only in async code
    automation.id = existing.id
    automation.update()


def main(repository: str, branch: str, *pools: str) -> None:
    """Sets up the server, and prints the deployments."""
    chosen = [Pool.parse(text) for text in pools] or [Pool(name, limit=limit) for name, limit in POOLS.items()]
    create_pools(chosen)
    reschedule_runs_of_dead_workers()
    print(f"deployments: {', '.join(deploy(repository, branch, chosen))}")


if __name__ == "__main__":
    answer_help(__doc__)
    if len(sys.argv) < 3:
        sys.exit("usage: python -m flows.deploy REPOSITORY BRANCH [POOL=TYPE[:FILE]…]")
    try:
        main(*sys.argv[1:])
    except EXPECTED as error:
        sys.exit(f"error: {error}")
