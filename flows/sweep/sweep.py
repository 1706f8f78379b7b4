"""Runs a grid of trials, each as a DVC experiment in its own checkout: `python -m flows.sweep`.

A trial is a configuration and a seed. Trials finished in this or another sweep are reused, killed trials are resumed,
and failed trials are retried without stopping the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from threading import Event, Lock
from typing import IO, Any

import httpx
import psutil
import yaml
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import get_run_context
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import ValidationError

from flows.runtime.fork_server import SOCKET, fork_server
from flows.runtime.scratch import SCRATCH, StageFailed
from flows.runtime.servers import (
    listen_for,
    new_login,
    port_at,
    port_of,
    prefect_client,
    prefect_server,
    print_prefect,
    using_prefect,
)
from flows.runtime.stage import EXPECTED, configure_tracebacks, hash_of, is_unreachable, no_answer_message
from flows.runtime.supervisor import end_group, exit_on_signals, start_group, supervised
from flows.sweep.trials import Sweep, Trial, make_grid, selection, selection_scores, short_name
from flows.sweep.workspaces import IDENTITY, Experiment, Snapshot, set_params
from lotlip.config.params import Params, load_params
from lotlip.core.caches import private_folder
from lotlip.core.code import code_hash
from lotlip.core.console import INTERRUPTED
from lotlip.core.files import remove
from lotlip.core.loopback import HOST
from lotlip.core.section import ConfigError
from lotlip.core.stages import STAGES
from lotlip.data.paths import check_inputs
from lotlip.data.stage_record import StageRecord
from lotlip.evaluate.records import AblationScores
from lotlip.pretrain.records import RUN, Run
from lotlip.tracking.mlflow import warn_on_failure

DONE, REUSED, FAILED, SKIPPED, WAITING = "done", "reused", "failed", "skipped", "waiting"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial.

    Attributes:
        status: one of DONE, REUSED, FAILED, SKIPPED, WAITING.
        scores: name → fraction, of the scores that select the best trial; the benchmark may lack some.
        minutes: duration of its training and evaluation.
        run_id: id of its run in MLflow.
        run: URL of that run.
        reason: why it failed.
    """

    status: str
    scores: dict[str, float] = field(default_factory=dict)
    minutes: float = 0.0
    run_id: str = ""
    run: str = ""
    reason: str = ""

    @property
    def measure(self) -> float:
        """The measure that selects the best trial: the mean of its scores, [0, 1]."""
        return mean(self.scores.values()) if self.scores else 0.0


class TrialRunner:
    """Runs trials within the budget, and stops all of them on request.

    Args:
        settings: settings of the sweep.
        params: params.yaml of the project.
        snapshot: snapshot of the project that all trials run from.
        environment: environment variables of the trials' processes.
        flow_run: URL of the sweep's flow run in Prefect's UI.
    """

    def __init__(
        self, settings: Sweep, params: Params, snapshot: Snapshot, environment: Mapping[str, str], flow_run: str
    ) -> None:
        from lotlip.tracking.mlflow import Tracker, failure

        self.settings, self.params, self.snapshot, self.flow_run = settings, params, snapshot, flow_run
        # The tracker creates the store, whose artifact folder is relative to the current folder, before any trial does.
        tracking = params.tracking
        try:
            self.tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
        except Exception as error:  # MLflow raises many types; nothing has run yet
            raise StageFailed(failure(os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri, error)) from error
        self.environment = dict(environment)
        self.inputs = {
            "shards": hash_of(params.paths.shards / "index.json"),
            "image_tower": hash_of(params.paths.image_tower / "model.safetensors"),
            "code": code_hash(*STAGES),
        }
        self._start, self._started_trials = time.monotonic(), set[str]()
        self._stopping, self._lock = Event(), Lock()
        self._running: list[subprocess.Popen[Any]] = []

    def experiment(self, trial: Trial) -> Experiment:
        """Returns a trial's experiment, which may not exist yet."""
        return Experiment(self.snapshot.root, trial.experiment(self.inputs))

    def run(self, trial: Trial) -> Outcome:
        """Runs a trial, unless it is finished or the budget is spent.

        Raises:
            StageFailed: it failed, or the sweep is being stopped.
        """
        experiment = self.experiment(trial)
        with experiment.exclusive(self._check_not_stopping) as lock:
            self._check_not_stopping()
            if experiment.revision():
                return self._outcome(trial, experiment, REUSED)
            if not self._within_budget(experiment.name):
                return Outcome(SKIPPED)
            self._run_experiment(trial, experiment, lock)
        return self._outcome(trial, experiment, DONE)

    def stop(self) -> None:
        """Ends the running trials and prevents others from starting."""
        self._stopping.set()
        with self._lock:
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            end_group(process)

    @property
    def stopping(self) -> bool:
        """Whether the sweep is being stopped."""
        return self._stopping.is_set()

    def _check_not_stopping(self) -> None:
        if self.stopping:
            raise StageFailed("the sweep was stopped")

    def _within_budget(self, name: str) -> bool:
        """Whether the budget allows a trial to start; retries are always allowed."""
        runs, minutes = self.settings.max_runs, self.settings.max_minutes
        with self._lock:
            if name in self._started_trials:
                return True
            spent = (runs is not None and len(self._started_trials) >= runs) or (
                minutes is not None and time.monotonic() - self._start >= minutes * 60
            )
            if not spent:
                self._started_trials.add(name)
            return not spent

    def _run_experiment(self, trial: Trial, experiment: Experiment, lock: IO[Any]) -> None:
        plain = trial.params.model_dump(mode="json", exclude_unset=True)
        project = experiment.prepare(self.snapshot, plain, trial.changes)
        log = experiment.folder / "log.txt"
        command = [sys.executable, "-m", *experiment.command(f"evaluate@{trial.base}", trial.changes)]
        environment = {
            **self.environment,
            "MLFLOW_TRACKING_URI": _absolute(self.tracker.uri, self.snapshot.root),
            "DVC_SITE_CACHE_DIR": str(private_folder(project.absolute() / ".dvc" / "tmp" / "site")),
        }
        with log.open("w") as output:
            with self._lock:
                self._check_not_stopping()
                process = start_group(
                    supervised(command),
                    cwd=project,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],  # held until all processes of the trial have ended
                )
                self._running.append(process)
            try:
                status = process.wait()
            finally:
                end_group(process)
                with self._lock:
                    self._running.remove(process)
        self._check_not_stopping()
        if status:
            raise StageFailed(f"{_reason(log, status)} (log: {log})")
        experiment.collect()

    def _outcome(self, trial: Trial, experiment: Experiment, status: str) -> Outcome:
        """Reads the scores of a finished trial, and tags its run in MLflow with this sweep."""
        paths, base = self.params.paths, trial.base
        benchmarks = experiment.read(paths.metrics / f"{base}.json", AblationScores).benchmarks
        scores = selection_scores(self.settings, trial, benchmarks)
        files = [paths.stages / f"{stage}-{base}.json" for stage in ("pretrain", "evaluate")]
        seconds = sum(experiment.read(file, StageRecord).seconds for file in files)
        trained = experiment.read(paths.models / base / RUN, Run)
        tags = {f"sweep.{self.settings.name}": self.flow_run, "trial": experiment.name}
        tags["mlflow.runName"] = experiment.name
        if status == DONE:
            tags["prefect.flow_run"] = self.flow_run
        run = address = ""
        with self._lock, warn_on_failure(self.tracker.uri, get_run_logger().warning):
            run = self.tracker.ensure_runs(trained)[str(trial.seed)]
            self.tracker.set_tags(run, tags)
            address = run_address(self.tracker, run)
        return Outcome(
            status,
            scores,
            seconds / 60,
            run,
            address,
        )


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
    environment = _environment()
    _update_data(environment)
    with ExitStack() as stack:
        snapshot = Snapshot.take(root)
        if SOCKET not in environment:
            environment = stack.enter_context(_snapshot_fork_server(snapshot, environment))
        runner = TrialRunner(settings, params, snapshot, environment, flow_run_address())
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
    pool: ThreadPoolTaskRunner[Outcome] = ThreadPoolTaskRunner(max_workers=settings.parallelism)
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
                left = time_left(time.monotonic() - started, outcomes.values(), settings.parallelism)
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
        return [f"It passed the gate; `{registration.uri}` loads version {registration.version} in MLflow's registry."]
    return ["The registry's gate rejected the best model:", *(f"- {reason}" for reason in registration.refusals)]


def _table(grid: Sequence[Trial], names: Sequence[str], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Returns a row for each trial."""
    keys = list(grid[0].changes) if grid else []
    scores = list(dict.fromkeys(score for name in names for score in outcomes[name].scores))
    return [
        {
            "trial": name,
            "status": outcomes[name].status,
            **{short_name(key, keys): _cell(trial.changes[key]) for key in keys},
            **{score: _share(outcomes[name].scores.get(score)) for score in scores},
            "minutes": f"{outcomes[name].minutes:.1f}" if outcomes[name].minutes else "",
            "MLflow": f"[run]({outcomes[name].run})" if outcomes[name].run else "",
            "reason": outcomes[name].reason,
        }
        for name, trial in zip(names, grid, strict=True)
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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


def _update_data(environment: Mapping[str, str]) -> None:
    """Runs `dvc repro shard`, so that the shards are up to date.

    Raises:
        StageFailed: a stage failed.
    """
    log = SCRATCH / "sweeps" / "data.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        command = supervised([sys.executable, "-m", "flows.runtime.dvc", "repro", "shard"])
        process = start_group(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            status = process.wait()
        finally:
            end_group(process)
    if status:
        raise StageFailed(
            f"the data is not up to date and `dvc repro shard` failed: {_reason(log, status)} (log: {log})"
        )


@contextmanager
def _snapshot_fork_server(snapshot: Snapshot, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Runs a fork server with the snapshot's code, because the project may change during the sweep."""
    folder = snapshot.root / SCRATCH / "sweeps" / f"code-{os.getpid()}"
    for stale in folder.parent.glob("code-*"):  # left by killed sweeps
        if stale == folder or not psutil.pid_exists(int(stale.name.removeprefix("code-"))):
            remove(stale)
    try:
        snapshot.unpack(folder)
        with fork_server({**environment, "PYTHONPATH": str(folder)}, folder) as extended:
            yield extended
    finally:
        remove(folder)


# Patterns of lines that name an error, most specific first: a stage's message, the last line of a traceback, a log
# record, DVC's summary.
_ERRORS = (
    r"error in ",
    r"error: ",
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failed|Stopped)(?::|$)",
    r"[\d:. -]+\| (?:ERROR|CRITICAL) ",
    r"ERROR: ",
)


def _reason(log: Path, status: int) -> str:
    """Finds the line of a log that names the error; without one, describes how the program ended.

    Args:
        log: the program's output.
        status: exit status; after a signal N it is -N, or 128 + N from the supervisor.
    """
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for pattern in _ERRORS:
        if matching := [line for line in lines if re.match(pattern, line)]:
            return matching[0]
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        out_of_memory = "; the machine may be out of memory" if number == signal.SIGKILL else ""
        return f"it was killed by {signal.Signals(number).name}{out_of_memory}"
    return f"it exited with status {status} without an error message"


def _absolute(uri: str, root: Path) -> str:
    """Makes a tracking URI independent of the current folder."""
    prefix = "sqlite:///"
    return f"{prefix}{root / uri.removeprefix(prefix)}" if uri.startswith(prefix) else uri


def flow_run_address() -> str:
    """Returns the URL of this flow run in Prefect's UI."""
    run = get_run_context().flow_run  # type: ignore[union-attr]
    base = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    return f"{base}/runs/flow-run/{run.id}" if run else ""


def mlflow_address(tracker: Any) -> str:
    """Returns the URL of MLflow's UI: that of the tracking server, or that of `make ui` and `make serve`."""
    return tracker.uri.rstrip("/") if tracker.uri.startswith("http") else f"http://{HOST}:{port_of('mlflow')}"


def run_address(tracker: Any, run_id: str) -> str:
    """Returns the URL of a run in MLflow's UI."""
    return f"{mlflow_address(tracker)}/#/experiments/{tracker.experiment_id}/runs/{run_id}"


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
        changes = Experiment(Path.cwd(), chosen.apply).overrides()
        changes.pop("pretrain.seeds", None)
        set_params(Path("params.yaml"), changes)
        print(f"params.yaml now has {', '.join(f'{key}={value}' for key, value in changes.items())}")
        return
    configure_tracebacks()
    settings = read_sweep(chosen.sweep)
    make_grid(settings, load_params())  # fails on invalid settings before anything starts
    with ExitStack() as stack:
        stack.enter_context(exit_on_signals())
        if not PREFECT_API_URL.value():
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


def read_sweep(text: str) -> Sweep:
    """Reads a sweep from a YAML file or from JSON text.

    Raises:
        ConfigError: it is invalid; the message says why.
    """
    try:
        content = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        return Sweep.model_validate(yaml.safe_load(content))
    except yaml.YAMLError as error:
        raise ConfigError(f"{text} is neither YAML nor JSON: {error}") from error
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
