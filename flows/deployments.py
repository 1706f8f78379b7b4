"""What can be started from Prefect's UI: `reproduce` and `sweep`, by hand or by a schedule, which is there and off.

Prefect's runner imports flows from where they are defined, so that they are not beside the program that serves them.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect import Flow, flow
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.schedules import Cron, Schedule

from flows import reproduce as reproduction
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
    """Runs the pipeline: the ablations of reproduce.ablations in params.yaml, all of them, or those named.

    Args:
        what: "default" or "all".
        ablations: names in params.yaml, which go before `what`.

    Raises:
        ConfigError: params.yaml has no such ablation.
    """
    params = load_params()
    for name in ablations:
        params.ablation(name)  # complains of those that are not there
    chosen = list(ablations) or (params.reproduce.ablations if what == "default" else [])
    reproduction.reproduce(params, reproduction.of_ablations(params, chosen))


def deployments() -> list[RunnerDeployment]:
    """What Prefect's UI can start."""
    scheduled = ((NIGHTLY, "0 2 * * *"), (WEEKLY, "0 3 * * 6"))
    return [
        _deployed(reproduce, "by-hand"),
        _deployed(sweep, "by-hand"),
        *(
            _deployed(sweep, settings.name, {"settings": settings.model_dump(mode="json")}, Cron(when, active=False))
            for settings, when in scheduled
        ),
    ]


def _deployed(
    what: Flow[..., Any], name: str, parameters: dict[str, Any] | None = None, schedule: Schedule | None = None
) -> RunnerDeployment:
    made = what.to_deployment(
        name, parameters=parameters, schedule=schedule, entrypoint_type=EntrypointType.MODULE_PATH
    )
    assert isinstance(made, RunnerDeployment)  # a coroutine only inside another
    return made
