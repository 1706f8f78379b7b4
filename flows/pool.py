"""Reproductions that any worker of a pool can run, each in a clone of its own, with data through DVC's remote."""

from __future__ import annotations

import os
import subprocess
from typing import Literal

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows import reproduce as reproduction
from flows.runtime.dvc import run_dvc
from flows.runtime.scratch import StageFailed
from lotlip.config.params import Params, load_params

BRANCHES = "runs"  # a run's dvc.lock is on the branch runs/<name of the flow run>
# Commits of workers, whose user has no name.
IDENTITY = ("-c", "user.name=lotlip", "-c", "user.email=lotlip@localhost")


@flow(name="reproduce-on-pool")
def reproduce_on_pool(what: Literal["default", "all"] = "default", ablations: tuple[str, ...] = ()) -> None:
    """Runs the pipeline in a worker's clone, then shares its outputs.

    Outputs that dvc.lock lists are pulled, so only what nobody has run yet is run. New outputs are pushed to DVC's
    default remote, and the new dvc.lock to a branch of the repository, from which `dvc pull` restores everything.

    Args:
        what: "default" for the ablations of `reproduce` in params.yaml, or "all".
        ablations: names of ablations in params.yaml; overrides `what`.

    Raises:
        ConfigError: params.yaml has no such ablation.
        StageFailed: a stage failed, or the outputs could not be shared.
    """
    params = load_params()
    reproduction.reproduce(params, runs(params, what, ablations), pull=True)
    branch = f"{BRANCHES}/{flow_run.name or 'unnamed'}"
    share(branch)
    get_run_logger().info("outputs are shared; to get them: git fetch origin %s, git switch, dvc pull", branch)


def runs(params: Params, what: Literal["default", "all"], ablations: tuple[str, ...]) -> list[list[str]]:
    """Returns the arguments of each `dvc repro`.

    Args:
        params: params.yaml of the project.
        what: "default" or "all".
        ablations: names of ablations in params.yaml; overrides `what`.

    Raises:
        ConfigError: params.yaml has no such ablation.
    """
    for name in ablations:
        params.ablation(name)  # raises ConfigError for unknown names
    chosen = list(ablations) or (params.reproduce.ablations if what == "default" else [])
    return reproduction.runs_of_ablations(params, chosen)


def share(branch: str) -> None:
    """Pushes all outputs to DVC's default remote, and dvc.lock to a branch of the repository.

    Args:
        branch: is replaced if it exists.

    Raises:
        StageFailed: DVC or git failed.
    """
    if run_dvc(["push", "--quiet"], os.environ):
        raise StageFailed("`dvc push` failed (see above); all outputs are in the worker's cache")
    for name, *arguments in (
        ("add", "dvc.lock"),
        ("commit", "--quiet", "--allow-empty", "--message", f"Outputs of {branch}"),
        ("push", "--quiet", "--force", "origin", f"HEAD:refs/heads/{branch}"),
    ):
        done = subprocess.run(["git", *IDENTITY, name, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise StageFailed(f"`git {name}` failed: {done.stderr.strip()}; the outputs are in DVC's remote")
