"""Deployments for Prefect's UI: `reproduce` and `sweep`, with schedules that are initially inactive.

Prefect's runner imports flows from the module that defines them, so they are not defined in the serving program.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect import Flow, flow
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.schedules import Cron, Schedule

from flows import reproduce as reproduction
from flows.pool import runs
from flows.sweep.sweep import sweep
from flows.sweep.trials import Sweep
from lotlip.config.params import load_params

NIGHTLY = Sweep(name="nightly", corner_tokens=[0, 1, 2], sub_captions=[1, 3], seeds=[0], max_minutes=240)
WEEKLY = Sweep(
    name="weekly",
    corner_tokens=[0, 1, 2, 3, 4],
    corner_mask=[True, False],
    sub_captions=[0, 1, 3, 5, 7],
    seeds=[0, 1, 2],
    max_minutes=24 * 60,
)


@flow(name="reproduce", flow_run_name="reproduce-{what}")
def reproduce(what: Literal["default", "all"] = "default", ablations: tuple[str, ...] = ()) -> None:
    """Runs the pipeline for the default ablations (reproduce.ablations in params.yaml), for all, or for given ones.

    Args:
        what: "default" or "all".
        ablations: names of ablations in params.yaml; overrides `what`.

    Raises:
        ConfigError: params.yaml has no such ablation.
    """
    params = load_params()
    reproduction.reproduce(params, runs(params, what, ablations))


def deployments() -> list[RunnerDeployment]:
    """Returns the deployments of Prefect's UI."""
    scheduled = ((NIGHTLY, "0 2 * * *"), (WEEKLY, "0 3 * * 6"))
    return [
        _deployment(reproduce, "by-hand"),
        _deployment(sweep, "by-hand"),
        *(
            _deployment(sweep, settings.name, {"settings": settings.model_dump(mode="json")}, Cron(when, active=False))
            for settings, when in scheduled
        ),
    ]


def _deployment(
    flow: Flow[..., Any], name: str, parameters: dict[str, Any] | None = None, schedule: Schedule | None = None
) -> RunnerDeployment:
    deployment = flow.to_deployment(
        name, parameters=parameters, schedule=schedule, entrypoint_type=EntrypointType.MODULE_PATH
    )
    assert isinstance(deployment, RunnerDeployment)  # a coroutine only in async code
    return deployment
