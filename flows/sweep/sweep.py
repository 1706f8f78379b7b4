"""Runs a grid of trials, each as a DVC experiment in its own checkout: `python -m flows.sweep`.

A trial is a configuration and a seed. Trials finished in this or another sweep are reused, killed trials are resumed,
and failed trials are retried without stopping the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import get_run_context
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import ValidationError

from flows.reproduce import PULL, remove_outdated_records
from flows.runtime.fork_server import SOCKET, fork_server
from flows.runtime.scratch import SCRATCH, StageFailed
from flows.runtime.servers import (
    listen_for,
    new_login,
    port_at,
    prefect_client,
    prefect_server,
    print_prefect,
    using_prefect,
)
from flows.runtime.stage import EXPECTED, configure_tracebacks, is_unreachable, no_answer_message
from flows.runtime.supervisor import end_group, exit_on_signals, start_group, supervised
from flows.sweep.pool_runner import PoolRunner, check_remotes, find_deployment, publish
from flows.sweep.reasons import failure_reason
from flows.sweep.runners import (
    DONE,
    FAILED,
    REUSED,
    SKIPPED,
    WAITING,
    LocalRunner,
    Outcome,
    TrialRunner,
    mlflow_address,
)
from flows.sweep.trials import AXES, Sweep, Trial, make_grid, selection, short_name
from flows.sweep.workspaces import IDENTITY, Experiment, Snapshot, set_params
from lotlip.config.params import load_params
from lotlip.core.console import INTERRUPTED
from lotlip.core.differences import format_differences, format_value, replacements
from lotlip.core.section import ConfigError
from lotlip.core.temporary import temporary_folder
from lotlip.core.yaml import parse_yaml, read_yaml
from lotlip.data.paths import check_inputs
from lotlip.tracking.store import warn_on_failure


@task(name="trial", task_run_name="{name}", cache_policy=NO_CACHE)
def run_trial(name: str, runner: TrialRunner, trial: Trial) -> Outcome:
    """Runs a trial as a Prefect task."""
    outcome = runner.run(trial)
    if outcome.run:
        create_link_artifact(outcome.run, link_text=name, key=_key(name), description="the trial's run in MLflow")
    return outcome


@flow(name="sweep", flow_run_name="sweep-{settings.name}")
def sweep(settings: Sweep) -> None:
    """Trains and evaluates each trial of a grid; a table of all trials is among the flow's artifacts.

    Args:
        settings: the grid, its budget, and the number of parallel trials.
    """
    log, root, params = get_run_logger(), Path.cwd(), load_params()
    grid = make_grid(settings, params)
    check_inputs(params.inputs())
    log.info("sweep %s: %d trials", settings.name, len(grid))
    outdated = remove_outdated_records(params)
    environment = _environment()
    unwatched = set[str]().union(*(trial.unwatched_stages() for trial in grid))
    with ExitStack() as stack:
        runner: TrialRunner
        if settings.pool:
            deployment = find_deployment(settings.pool, log.warning)
            check_remotes(root)
            _update_data(environment, pull=not outdated)
            snapshot = Snapshot.take(root, unwatched)
            commit = publish(snapshot, params, settings.name, environment)
            runner = PoolRunner(settings, params, snapshot, flow_run_address(), deployment, commit)
        else:
            _update_data(environment)
            snapshot = Snapshot.take(root, unwatched)
            runner = LocalRunner(settings, params, snapshot, flow_run_address(), environment)
            stack.enter_context(_fork_server_for(runner, grid))
        stack.callback(runner.stop)
        outcomes = _run_all(runner, grid, log)
    conclude(settings, runner, grid, outcomes)


def _run_all(runner: TrialRunner, grid: Sequence[Trial], log: Any) -> list[Outcome]:
    """Runs the grid and keeps its table artifact up to date; returns the outcomes in the grid's order."""
    settings = runner.settings
    names = [runner.experiment(trial).name for trial in grid]
    outcomes = {name: Outcome(WAITING) for name in names}
    started = time.monotonic()
    # The flow's default task runner has one thread per core; `parallelism` decides instead.
    pool: ThreadPoolTaskRunner[Outcome] = ThreadPoolTaskRunner(max_workers=settings.parallel)
    with pool:
        try:
            configured = run_trial.with_options(
                retries=settings.retries, retry_condition_fn=lambda *_: not runner.stopping
            )
            futures: dict[PrefectFuture[Outcome], str] = {
                pool.submit(configured, {"name": name, "runner": runner, "trial": trial}): name
                for name, trial in zip(names, grid, strict=True)
            }
            for done, future in enumerate(as_completed(list(futures)), 1):
                name = futures[future]
                try:
                    outcomes[name] = future.result()
                except Exception as error:
                    outcomes[name] = Outcome(FAILED, reason=str(error))
                    log.warning("%s failed after all retries: %s", name, error)
                left = time_left(time.monotonic() - started, outcomes.values(), settings.parallel)
                log.info("%d of %d trials: %s%s", done, len(grid), _counts(outcomes), left)
                create_table_artifact(
                    _table(grid, names, outcomes), key=_key(f"sweep-{settings.name}"), description=_counts(outcomes)
                )
        except BaseException:
            runner.stop()
            raise
    return list(outcomes.values())


def time_left(seconds: float, outcomes: Collection[Outcome], parallelism: int) -> str:
    """Estimates the remaining time; "" before any trial was run. Reused trials are ignored.

    Running trials are assumed to be half done.
    """
    statuses = [outcome.status for outcome in outcomes]
    finished, waiting = statuses.count(DONE) + statuses.count(FAILED), statuses.count(WAITING)
    if not finished or not waiting:
        return ""
    running = min(parallelism, waiting) / 2
    return f", about {seconds / (finished + running) * (waiting - running) / 60:.1f} minutes left"


def conclude(settings: Sweep, runner: TrialRunner, grid: Sequence[Trial], outcomes: Sequence[Outcome]) -> None:
    """Reports the best trial and how to apply it, and fails if a trial failed.

    Raises:
        StageFailed: trials failed; the message has their names and reasons.
    """
    names = [runner.experiment(trial).name for trial in grid]
    results = list(zip(grid, names, outcomes, strict=True))
    scored = [(trial, name, outcome) for trial, name, outcome in results if outcome.scores]
    failed = [f"{name}: {outcome.reason}" for _, name, outcome in results if outcome.status == FAILED]
    counts = _counts(dict(zip(names, outcomes, strict=True)))
    lines = [f"# Sweep {settings.name}", f"{len(grid)} trials: {counts}."]
    if scored:
        groups: dict[str, list[tuple[str, Outcome]]] = {}
        for trial, name, outcome in scored:
            key = json.dumps(trial.configuration, sort_keys=True, allow_nan=False)
            groups.setdefault(key, []).append((name, outcome))
        chosen, members = max(groups.items(), key=lambda group: mean(outcome.measure for _, outcome in group[1]))
        benchmark, _ = selection(settings, grid[0].params)
        name, best = max(members, key=lambda member: member[1].measure)
        average = mean(member.measure for _, member in members)
        lines += [
            f"Best by {' and '.join(best.scores)} of {benchmark}, mean over {len(members)} seed(s): "
            f"{average:.1%} with `{chosen}`.",
            f"Its best seed is [{name}]({best.run}), {best.measure:.1%}. To write its parameters to params.yaml, "
            "keeping the seeds and comments there:",
            f"    python -m flows.sweep --apply {name}",
        ]
        with warn_on_failure(runner.tracker.uri, lambda line: lines.append(f"- {line}")):
            link = runner.tracker.comparison_link(mlflow_address(runner.tracker), settings.name)
            lines.append(f"[Compare all its runs]({link}) in MLflow.")
            if best.run_id:
                lines += _register(settings, runner, best.run_id)
    lines += [f"- failed: {line}" for line in failed]
    text = "\n\n".join(lines)
    create_markdown_artifact(text, key=_key(f"sweep-{settings.name}-result"), description="the best trial")
    get_run_logger().info("%s", text)
    if failed:
        raise StageFailed(f"{len(failed)} of {len(grid)} trials failed:\n  - " + "\n  - ".join(failed))


def _register(settings: Sweep, runner: TrialRunner, run_id: str) -> list[str]:
    """Registers the best run's model if it passes the registry's gate; returns the result as lines."""
    if runner.params.registry is None:
        return []
    from lotlip.tracking.registry import register

    registration = register(runner.tracker, run_id, runner.params.registry, settings.name)
    if registration.uri:
        lines = [f"It passed the gate; `{registration.uri}` loads version {registration.version} in MLflow's registry."]
    else:
        lines = ["The registry's gate rejected the best model:", *(f"- {reason}" for reason in registration.refusals)]
    return [*lines, f"- {registration.note}"] if registration.note else lines


def _table(grid: Sequence[Trial], names: Sequence[str], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Returns a row for each trial."""
    keys = list(grid[0].changes) if grid else []
    scores = list(dict.fromkeys(score for name in names for score in outcomes[name].scores))
    return [
        {
            "trial": name,
            "status": outcomes[name].status,
            **{short_name(key, keys): format_value(trial.changes[key]) for key in keys},
            **{score: _share(outcomes[name].scores.get(score)) for score in scores},
            "minutes": f"{outcomes[name].minutes:.1f}" if outcomes[name].minutes else "",
            "MLflow": f"[run]({outcomes[name].run})" if outcomes[name].run else "",
            "reason": outcomes[name].reason,
        }
        for name, trial in zip(names, grid, strict=True)
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _counts(outcomes: Mapping[str, Outcome]) -> str:
    statuses = [outcome.status for outcome in outcomes.values()]
    present = [status for status in (DONE, REUSED, FAILED, SKIPPED, WAITING) if status in statuses]
    return ", ".join(f"{statuses.count(status)} {status}" for status in present)


def _key(text: str) -> str:
    """Converts a name to a valid Prefect artifact key."""
    return text.lower().replace("_", "-").replace(".", "-")


def _environment() -> dict[str, str]:
    """Environment of the sweep's programs. They use the same Prefect server but are not part of this flow run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT__")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    # In a flow run started by Prefect, these are settings rather than environment variables.
    if api := PREFECT_API_URL.value():
        environment["PREFECT_API_URL"] = api
    if login := PREFECT_API_AUTH_STRING.value():
        environment["PREFECT_API_AUTH_STRING"] = login
    return {**environment, **{key: value for key, value in IDENTITY.items() if key not in environment}}


def _update_data(environment: Mapping[str, str], pull: bool = False) -> None:
    """Runs `dvc repro shard`, so that the shards are up to date.

    Args:
        environment: environment variables of DVC.
        pull: whether missing outputs that dvc.lock lists are pulled from DVC's default remote.

    Raises:
        StageFailed: a stage failed.
    """
    log = SCRATCH / "sweeps" / "data.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        command = supervised([sys.executable, "-m", "flows.runtime.dvc", "repro", *([PULL] if pull else []), "shard"])
        process = start_group(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            status = process.wait()
        finally:
            end_group(process)
    if status:
        raise StageFailed(
            "the data is not up to date and `dvc repro shard` failed: "
            f"{failure_reason(log.read_text(encoding='utf-8', errors='replace'), status)} (log: {log})"
        )


@contextmanager
def _fork_server_for(runner: LocalRunner, grid: Sequence[Trial]) -> Iterator[None]:
    """Runs a fork server for the trials of a grid, unless one is given or all trials are finished.

    It has the snapshot's code, because the project may change during the sweep.
    """
    if SOCKET in runner.environment or all(runner.is_finished(runner.experiment(trial)) for trial in grid):
        yield
        return
    with temporary_folder("sweep") as temporary:
        code = temporary / "code"
        runner.snapshot.unpack(code)
        with fork_server({**runner.environment, "PYTHONPATH": str(code)}, code) as environment:
            runner.environment = environment
            yield


def flow_run_address() -> str:
    """Returns the URL of this flow run in Prefect's UI."""
    run = get_run_context().flow_run  # type: ignore[union-attr]
    base = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    return f"{base}/runs/flow-run/{run.id}" if run else ""


def main(arguments: Sequence[str]) -> None:
    """Runs a sweep, or writes a trial's parameters to params.yaml.

    Raises:
        StageFailed, ConfigError: the sweep failed or is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("sweep", nargs="?", help="YAML file, or JSON text, with name, corner_tokens, … (docs/sweeps.md)")
    what.add_argument("--apply", metavar="TRIAL", help="write the parameters of a trial to params.yaml")
    chosen = parser.parse_args(arguments)
    if chosen.apply:
        apply(chosen.apply)
        return
    configure_tracebacks()
    settings = read_sweep(chosen.sweep)
    make_grid(settings, load_params())  # fails on invalid settings before anything starts
    with ExitStack() as stack:
        stack.enter_context(exit_on_signals())
        if settings.pool:
            find_deployment(settings.pool, lambda _: None)  # fails before the sweep has a flow run
        elif not PREFECT_API_URL.value():
            listener, login = listen_for("prefect", any_port=True), new_login()
            port = port_at(listener)
            stack.enter_context(prefect_server(listener, login))
            stack.enter_context(using_prefect(prefect_client(port, login)))
            print_prefect(port, login)
        try:
            sweep(settings)
        except (httpx.TransportError, RuntimeError) as error:
            if not is_unreachable(error):
                raise
            raise StageFailed(f"{no_answer_message()}; rerun the same sweep: finished trials are kept") from error


def apply(name: str) -> None:
    """Writes to params.yaml all settings of a trial that decide its result, except its seed.

    Its changes alone are not enough: another sweep, with other values in params.yaml, may have run it.

    Raises:
        StageFailed: there is no such experiment.
        ConfigError: params.yaml is not valid, or its other ablations are not valid with these settings.
    """
    trial, current = Experiment(Path.cwd(), name).params(), load_params()
    given = trial.model_dump(mode="json", exclude_unset=True)
    changes = replacements(trial.decisive_sections(), current.decisive_sections(), given)
    changes.pop(AXES["seeds"], None)
    if not changes:
        print(f"params.yaml already has the settings of {name}")
        return
    set_params(Path("params.yaml"), changes)
    print(f"params.yaml now has {format_differences(changes)}")
    load_params()


def read_sweep(text: str) -> Sweep:
    """Reads a sweep from a YAML file or from JSON text.

    Raises:
        ConfigError: it is invalid; the message says why.
    """
    try:
        is_content = text.lstrip().startswith("{")
        return Sweep.model_validate(parse_yaml(text, text) if is_content else read_yaml(Path(text)))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"{text} is not a valid sweep:", lines) from None


def run(arguments: Sequence[str]) -> None:
    """Runs `main` as a program: failures are printed on one line, and Ctrl-C says how to resume."""
    try:
        main(arguments)
    except EXPECTED as error:
        if configure_tracebacks():
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; rerun the same sweep to resume: finished trials are kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
