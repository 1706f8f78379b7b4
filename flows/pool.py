"""Flows that any worker of a pool can run, each in a clone of its own, with data through DVC's remote."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows import reproduce as reproduction
from flows.runtime.dvc import RUN_CACHE, run_dvc
from flows.runtime.git import run_git
from flows.runtime.scratch import StageFailed
from flows.runtime.supervisor import exit_on_signals, group, supervised
from flows.sweep.reasons import failure_reason
from flows.sweep.workspaces import TRIALS, message_of, set_params
from lotlip.config.params import Params, load_params

BRANCHES = "runs"  # a run's dvc.lock is on the branch runs/<name of the flow run>
# Commits of workers, whose user has no name.
IDENTITY = ("-c", "user.name=lotlip", "-c", "user.email=lotlip@localhost")
WORKER_DIED = "WorkerDied"  # name of the state of a crashed run that the server schedules again (flows.deploy)
LINES = 2000  # of a trial's output, in which the reason of a failure is searched


@flow(name="reproduce-on-pool")
def reproduce_on_pool(what: Literal["default", "all"] = "default", ablations: tuple[str, ...] = ()) -> None:
    """Runs the pipeline in a worker's clone, then shares its outputs.

    Outputs that dvc.lock lists are pulled, and so are trainings in the remote's run cache, so only what nobody has run
    yet is run. New outputs are pushed to DVC's default remote, and the new dvc.lock to a branch of the repository, from
    which `dvc pull` restores everything.

    Args:
        what: "default" for the ablations of `reproduce` in params.yaml, or "all".
        ablations: names of ablations in params.yaml; overrides `what`.

    Raises:
        ConfigError: params.yaml has no such ablation.
        StageFailed: a stage failed, or the outputs could not be shared.
    """
    params = load_params()
    os.environ[RUN_CACHE] = "1"
    reproduction.reproduce(params, runs(params, what, ablations), pull=True)
    branch = f"{BRANCHES}/{flow_run.name or 'unnamed'}"
    share(branch)
    get_run_logger().info("outputs are shared; to get them: git fetch origin %s, git switch, dvc pull", branch)


@flow(name="trial-on-pool")
def trial_on_pool(name: str, commit: str, changes: dict[str, Any], base: str) -> None:
    """Runs a trial of a sweep in a worker's clone, then shares its result.

    Trainings in the remote's run cache are pulled. The result is the branch trials/NAME: a commit like that of a DVC
    experiment, whose data is in DVC's default remote.

    Args:
        name: of the trial.
        commit: of `origin`, with the sweep's code and configuration.
        changes: dotted parameter → value.
        base: ablation that the trial trains.

    Raises:
        StageFailed: a stage failed, or the result could not be shared.
    """
    log = get_run_logger()
    if _git("ls-remote", "origin", f"refs/heads/{TRIALS}/{name}"):
        log.info("%s is already shared", name)  # by a worker that died afterwards
        return
    _git("fetch", "--quiet", "--depth", "2", "origin", commit)
    _git("checkout", "--quiet", "--detach", commit)
    set_params(Path("params.yaml"), changes)
    target = f"evaluate@{base}"
    # a program of its own, because this one has imported the code of the deployment's branch
    command = [sys.executable, "-m", "flows.reproduce", reproduction.PULL, target]
    lines: deque[str] = deque(maxlen=LINES)
    with (
        exit_on_signals(),
        group(
            supervised(command),
            env={**os.environ, RUN_CACHE: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
        status = process.wait()
    if status:
        raise StageFailed(failure_reason("".join(lines), status))
    share_trial(name, commit, changes, target)
    log.info("%s is shared as the branch %s/%s", name, TRIALS, name)


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
    _push_data()
    _git("add", "dvc.lock")
    _git("commit", "--quiet", "--allow-empty", "--message", f"Outputs of {branch}")
    _git("push", "--quiet", "--force", "origin", f"HEAD:refs/heads/{branch}")


def share_trial(name: str, snapshot: str, changes: Mapping[str, Any], target: str) -> None:
    """Pushes a trial's outputs to DVC's default remote, and its parameters and dvc.lock to a branch of the repository.

    Args:
        name: of the trial.
        snapshot: commit that the trial was run from.
        changes: dotted parameter → value.
        target: stage of the trial. Other stages in dvc.lock may have outputs that no worker has.

    Raises:
        StageFailed: DVC or git failed.
    """
    _push_data("--with-deps", target)
    _git("add", "dvc.lock", "params.yaml")
    tree = _git("write-tree").strip()
    settings = {key: value for key, value in changes.items() if "." in key}  # the others are sections without ablations
    # as DVC does, the experiment follows the commit that it is based on, and contains what was not committed
    commit = _git("commit-tree", tree, "-p", f"{snapshot}^", "-m", message_of(settings)).strip()
    _git("push", "--quiet", "--force", "origin", f"{commit}:refs/heads/{TRIALS}/{name}")


def _push_data(*targets: str) -> None:
    if run_dvc(["push", "--quiet", "--run-cache", *targets], {**os.environ, RUN_CACHE: "1"}):
        raise StageFailed("`dvc push` failed (see above); all outputs are in the worker's cache")


def _git(name: str, *arguments: str) -> str:
    done = run_git(*IDENTITY, name, *arguments)
    if done.returncode:
        kept = "; the outputs are in DVC's remote" if name == "push" else ""
        raise StageFailed(f"`git {name}` failed: {done.stderr.strip()}{kept}")
    return done.stdout
