"""A grid of configurations, each point a DVC experiment in its own checkout, some at a time: `python -m flows.sweep`.

A point is a configuration and a seed. What was done before, in this sweep or another, is found and not run again; what
was killed goes on; what fails is tried again and stops nothing else.
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
    claimed_port,
    new_login,
    port_of,
    prefect_client,
    prefect_server,
    print_prefect,
    using_prefect,
)
from flows.runtime.stage import EXPECTED, hash_of, no_answer, unreachable, with_tracebacks
from flows.runtime.supervisor import end_group, ending_well, guarded, start_group
from flows.sweep.trials import Point, Sweep, points, selecting_scores, selection, short
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

DONE, FOUND, FAILED, LEFT_OUT, WAITING = "done", "found done", "failed", "left out", "waiting"


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    Attributes:
        status: of DONE, FOUND, FAILED, LEFT_OUT, WAITING.
        scores: name → share, of those that select the best point; its benchmark may lack some.
        minutes: that its training and evaluation took, whenever that was.
        run_id: of its run in MLflow.
        run: that run's address.
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
        """What the best point is the best by: the mean of its scores, [0, 1]."""
        return mean(self.scores.values()) if self.scores else 0.0


class Workshop:
    """Where points are run: knows the budget, what runs now, and whether all is to stop.

    Args:
        settings: of the sweep.
        params: the project's.
        snapshot: of the project, which every point is run from.
        environment: of the programs that run them.
        flow_run: address of the sweep's flow run in Prefect's UI.
    """

    def __init__(
        self, settings: Sweep, params: Params, snapshot: Snapshot, environment: Mapping[str, str], flow_run: str
    ) -> None:
        from lotlip.tracking.mlflow import Tracker, failure

        self.settings, self.params, self.snapshot, self.flow_run = settings, params, snapshot, flow_run
        # made here, where the store's folder of artifacts is to be, before any point makes it elsewhere
        tracking = params.tracking
        try:
            self.tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
        except Exception as error:  # before anything has run, so that nothing is lost
            raise StageFailed(failure(os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri, error)) from error
        self.environment = dict(environment)
        self.inputs = {
            "shards": hash_of(params.paths.shards / "index.json"),
            "image_tower": hash_of(params.paths.image_tower / "model.safetensors"),
            "code": code_hash(*STAGES),
        }
        self._started, self._begun = time.monotonic(), set[str]()
        self._stopping, self._lock = Event(), Lock()
        self._running: list[subprocess.Popen[Any]] = []

    def experiment(self, point: Point) -> Experiment:
        """A point's experiment, there or not."""
        return Experiment(self.snapshot.root, point.experiment(self.inputs))

    def make(self, point: Point) -> Outcome:
        """Runs a point, unless it is done or the budget is spent.

        Raises:
            StageFailed: it failed, or the sweep is being stopped.
        """
        experiment = self.experiment(point)
        with experiment.alone(self._go_on) as lock:
            self._go_on()
            if experiment.revision():
                return self._result(point, experiment, FOUND)
            if not self._afford(experiment.name):
                return Outcome(LEFT_OUT)
            self._run(point, experiment, lock)
        return self._result(point, experiment, DONE)

    def stop(self) -> None:
        """Ends what runs, and lets nothing begin."""
        self._stopping.set()
        with self._lock:
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            end_group(process)

    @property
    def stopping(self) -> bool:
        """Whether all is to stop."""
        return self._stopping.is_set()

    def _go_on(self) -> None:
        if self.stopping:
            raise StageFailed("the sweep was stopped")

    def _afford(self, name: str) -> bool:
        """Whether the budget allows a point to begin; one that is tried again has begun already."""
        runs, minutes = self.settings.max_runs, self.settings.max_minutes
        with self._lock:
            if name in self._begun:
                return True
            spent = (runs is not None and len(self._begun) >= runs) or (
                minutes is not None and time.monotonic() - self._started >= minutes * 60
            )
            if not spent:
                self._begun.add(name)
            return not spent

    def _run(self, point: Point, experiment: Experiment, lock: IO[Any]) -> None:
        plain = point.params.model_dump(mode="json", exclude_unset=True)
        project = experiment.prepare(self.snapshot, plain, point.changes)
        log = experiment.folder / "log.txt"
        command = [sys.executable, "-m", *experiment.command(f"evaluate@{point.base}", point.changes)]
        environment = {
            **self.environment,
            "MLFLOW_TRACKING_URI": _absolute(self.tracker.uri, self.snapshot.root),
            "DVC_SITE_CACHE_DIR": str(private_folder(project.absolute() / ".dvc" / "tmp" / "site")),
        }
        with log.open("w") as output:
            with self._lock:
                self._go_on()
                process = start_group(
                    guarded(command),
                    cwd=project,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],  # held until all that the point has started has ended
                )
                self._running.append(process)
            try:
                status = process.wait()
            finally:
                end_group(process)
                with self._lock:
                    self._running.remove(process)
        self._go_on()
        if status:
            raise StageFailed(f"{_reason(log, status)} (all it wrote: {log})")
        experiment.collect()

    def _result(self, point: Point, experiment: Experiment, status: str) -> Outcome:
        """The scores of a point that is done, whose run in MLflow is told of this sweep."""
        paths, base = self.params.paths, point.base
        benchmarks = experiment.read(paths.metrics / f"{base}.json", AblationScores).benchmarks
        scores = selecting_scores(self.settings, point, benchmarks)
        files = [paths.stages / f"{stage}-{base}.json" for stage in ("pretrain", "evaluate")]
        seconds = sum(experiment.read(file, StageRecord).seconds for file in files)
        trained = experiment.read(paths.models / base / RUN, Run)
        tags = {f"sweep.{self.settings.name}": self.flow_run, "point": experiment.name}
        tags["mlflow.runName"] = experiment.name
        if status == DONE:
            tags["prefect.flow_run"] = self.flow_run
        run = address = ""
        with self._lock, warn_on_failure(self.tracker.uri, get_run_logger().warning):
            run = self.tracker.ensure_runs(trained)[str(point.seed)]
            self.tracker.set_tags(run, tags)
            address = run_address(self.tracker, run)
        return Outcome(
            status,
            scores,
            seconds / 60,
            run,
            address,
        )


@task(name="point", task_run_name="{name}", cache_policy=NO_CACHE)
def run_point(name: str, workshop: Workshop, point: Point) -> Outcome:
    """A point of the grid, in Prefect."""
    outcome = workshop.make(point)
    if outcome.run:
        create_link_artifact(outcome.run, link_text=name, key=_key(name), description="the point's run in MLflow")
    return outcome


@flow(name="sweep", flow_run_name="sweep-{settings.name}")
def sweep(settings: Sweep) -> None:
    """Trains and evaluates each point of a grid, some at a time; a table of all points is among its artifacts.

    Args:
        settings: the grid, its budget, and how many points are run at a time.
    """
    log, root, params = get_run_logger(), Path.cwd(), load_params()
    grid = points(settings, params)
    check_inputs(params.inputs())
    log.info("sweep %s: %d points", settings.name, len(grid))
    environment = _environment()
    _bring_data(environment)
    with ExitStack() as stack:
        snapshot = Snapshot.take(root)
        if SOCKET not in environment:
            environment = stack.enter_context(_warm_code(snapshot, environment))
        workshop = Workshop(settings, params, snapshot, environment, flow_run_address())
        stack.callback(workshop.stop)
        outcomes = _run_all(workshop, grid, log)
    conclude(settings, workshop, grid, outcomes)


def _run_all(workshop: Workshop, grid: Sequence[Point], log: Any) -> list[Outcome]:
    """Runs the grid, and keeps the table of it up to date; the outcomes are in the grid's order."""
    settings = workshop.settings
    names = [workshop.experiment(point).name for point in grid]
    outcomes = {name: Outcome(WAITING) for name in names}
    started = time.monotonic()
    # the flow's own runner has as many threads as there are cores; a point's place is `parallelism`'s to give
    runner: ThreadPoolTaskRunner[Outcome] = ThreadPoolTaskRunner(max_workers=settings.parallelism)
    with runner:
        try:
            configured = run_point.with_options(
                retries=settings.retries, retry_condition_fn=lambda *_: not workshop.stopping
            )
            futures: dict[PrefectFuture[Outcome], str] = {
                runner.submit(configured, {"name": name, "workshop": workshop, "point": point}): name
                for name, point in zip(names, grid, strict=True)
            }
            for done, future in enumerate(as_completed(list(futures)), 1):
                name = futures[future]
                try:
                    outcomes[name] = future.result()
                except Exception as error:
                    outcomes[name] = Outcome(FAILED, reason=str(error))
                    log.warning("%s failed for good: %s", name, error)
                left = time_left(time.monotonic() - started, outcomes.values(), settings.parallelism)
                log.info("%d of %d points: %s%s", done, len(grid), _counts(outcomes), left)
                create_table_artifact(
                    _table(grid, names, outcomes), key=_key(f"sweep-{settings.name}"), description=_counts(outcomes)
                )
        except BaseException:
            workshop.stop()
            raise
    return list(outcomes.values())


def time_left(seconds: float, outcomes: Collection[Outcome], parallelism: int) -> str:
    """How long the rest will take, in words; "" before a point was run: those that were found done tell nothing.

    Those that run now are taken for half done.
    """
    every = [outcome.status for outcome in outcomes]
    made, waiting = every.count(DONE) + every.count(FAILED), every.count(WAITING)
    if not made or not waiting:
        return ""
    running = min(parallelism, waiting) / 2
    return f", about {seconds / (made + running) * (waiting - running) / 60:.1f} minutes left"


def conclude(settings: Sweep, workshop: Workshop, grid: Sequence[Point], outcomes: Sequence[Outcome]) -> None:
    """Says which point is the best and how to take it up, and fails if a point did.

    Raises:
        StageFailed: points failed; the message has their names and reasons.
    """
    names = [workshop.experiment(point).name for point in grid]
    scored = [(point, name, found) for point, name, found in zip(grid, names, outcomes, strict=True) if found.scores]
    failed = [f"{name}: {found.reason}" for name, found in zip(names, outcomes, strict=True) if found.status == FAILED]
    counts = _counts(dict(zip(names, outcomes, strict=True)))
    lines = [f"# Sweep {settings.name}", f"Of {len(grid)} points: {counts}."]
    if scored:
        groups: dict[str, list[tuple[str, Outcome]]] = {}
        for point, name, found in scored:
            key = json.dumps(point.configuration, sort_keys=True, allow_nan=False)
            groups.setdefault(key, []).append((name, found))
        chosen, members = max(groups.items(), key=lambda group: mean(found.measure for _, found in group[1]))
        benchmark, _ = selection(settings, grid[0].params)
        name, found = max(members, key=lambda member: member[1].measure)
        average = mean(member.measure for _, member in members)
        lines += [
            f"Best by {' and '.join(found.scores)} of {benchmark}, the mean over {len(members)} seed(s): "
            f"{average:.1%} with `{chosen}`.",
            f"Its best seed is [{name}]({found.run}), {found.measure:.1%}. This brings its parameters into params.yaml,"
            " whose seeds and comments stay:",
            f"    python -m flows.sweep --apply {name}",
        ]
        with warn_on_failure(workshop.tracker.uri, lambda line: lines.append(f"- {line}")):
            link = workshop.tracker.comparison_link(mlflow_address(workshop.tracker), settings.name)
            lines.append(f"[All of its runs]({link}), side by side in MLflow.")
            if found.run_id:
                lines += _registered(settings, workshop, found.run_id)
    lines += [f"- failed: {line}" for line in failed]
    text = "\n\n".join(lines)
    create_markdown_artifact(text, key=_key(f"sweep-{settings.name}-result"), description="the best point")
    get_run_logger().info("%s", text)
    if failed:
        raise StageFailed(f"{len(failed)} of {len(grid)} points failed:\n  - " + "\n  - ".join(failed))


def _registered(settings: Sweep, workshop: Workshop, run_id: str) -> list[str]:
    """Has the best run's model go through the gate of the registry; gives what became of it."""
    if workshop.params.registry is None:
        return []
    from lotlip.tracking.registry import register

    made = register(workshop.tracker, run_id, workshop.params.registry, settings.name)
    if made.uri:
        return [f"Its gate passed, so that `{made.uri}` loads version {made.version} in MLflow's registry."]
    return ["The registry's gate refused the best model:", *(f"- {reason}" for reason in made.refusals)]


def _table(grid: Sequence[Point], names: Sequence[str], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """A row for each point."""
    keys = list(grid[0].changes) if grid else []
    scores = list(dict.fromkeys(score for name in names for score in outcomes[name].scores))
    return [
        {
            "point": name,
            "status": outcomes[name].status,
            **{short(key, keys): _cell(point.changes[key]) for key in keys},
            **{score: _share(outcomes[name].scores.get(score)) for score in scores},
            "minutes": f"{outcomes[name].minutes:.1f}" if outcomes[name].minutes else "",
            "MLflow": f"[run]({outcomes[name].run})" if outcomes[name].run else "",
            "reason": outcomes[name].reason,
        }
        for name, point in zip(names, grid, strict=True)
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _counts(outcomes: Mapping[str, Outcome]) -> str:
    every = [outcome.status for outcome in outcomes.values()]
    kinds = [status for status in (DONE, FOUND, FAILED, LEFT_OUT, WAITING) if status in every]
    return ", ".join(f"{every.count(status)} {status}" for status in kinds)


def _key(text: str) -> str:
    """A name as Prefect wants artifacts' to be."""
    return text.lower().replace("_", "-").replace(".", "-")


def _environment() -> dict[str, str]:
    """Of the programs that the sweep runs: they report to the same Prefect, and are no flow runs of its runner."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT__")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    # a flow run that Prefect started has them as settings
    if api := PREFECT_API_URL.value():
        environment["PREFECT_API_URL"] = api
    if login := PREFECT_API_AUTH_STRING.value():
        environment["PREFECT_API_AUTH_STRING"] = login
    return {**environment, **{key: value for key, value in IDENTITY.items() if key not in environment}}


def _bring_data(environment: Mapping[str, str]) -> None:
    """Has DVC make the shards that points read, if they are not up to date.

    Raises:
        StageFailed: a stage failed.
    """
    log = SCRATCH / "sweeps" / "data.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        command = guarded([sys.executable, "-m", "flows.runtime.dvc", "repro", "shard"])
        process = start_group(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            status = process.wait()
        finally:
            end_group(process)
    if status:
        raise StageFailed(
            f"the data is not up to date and cannot be made so: {_reason(log, status)} (all of it: {log})"
        )


@contextmanager
def _warm_code(snapshot: Snapshot, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Keeps a warm process with the snapshot's code: the project's may change while the sweep runs."""
    folder = snapshot.root / SCRATCH / "sweeps" / f"code-{os.getpid()}"
    for left in folder.parent.glob("code-*"):  # by sweeps that were killed
        if left == folder or not psutil.pid_exists(int(left.name.removeprefix("code-"))):
            remove(left)
    try:
        snapshot.unpack(folder)
        with fork_server({**environment, "PYTHONPATH": str(folder)}, folder) as found:
            yield found
    finally:
        remove(folder)


# What a line that names an error looks like, the most telling kind first: a stage's own words, the last line of a
# traceback, a logger's record, DVC's summary.
_ERRORS = (
    r"error in ",
    r"error: ",
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failed|Stopped)(?::|$)",
    r"[\d:. -]+\| (?:ERROR|CRITICAL) ",
    r"ERROR: ",
)


def _reason(log: Path, status: int) -> str:
    """The line of a log that says what went wrong; where none does, how the program ended.

    Args:
        log: what the program wrote.
        status: that it ended with; that of a program that a signal has ended is -N, or 128 + N behind a guard.
    """
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for pattern in _ERRORS:
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[0]
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        out_of_memory = "; the machine may be out of memory" if number == signal.SIGKILL else ""
        return f"it was ended by {signal.Signals(number).name}{out_of_memory}"
    return f"it ended with status {status} and named no error"


def _absolute(uri: str, root: Path) -> str:
    """A tracking store's address that means the same in another folder."""
    prefix = "sqlite:///"
    return f"{prefix}{root / uri.removeprefix(prefix)}" if uri.startswith(prefix) else uri


def flow_run_address() -> str:
    """Of this flow run in Prefect's UI."""
    run = get_run_context().flow_run  # type: ignore[union-attr]
    base = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    return f"{base}/runs/flow-run/{run.id}" if run else ""


def mlflow_address(tracker: Any) -> str:
    """Of MLflow's UI: the tracking server's, or the one that `make ui` and `make serve` show."""
    return tracker.uri.rstrip("/") if tracker.uri.startswith("http") else f"http://{HOST}:{port_of('mlflow')}"


def run_address(tracker: Any, run_id: str) -> str:
    """Of a run in MLflow's UI."""
    return f"{mlflow_address(tracker)}/#/experiments/{tracker.experiment_id}/runs/{run_id}"


def main(arguments: Sequence[str]) -> None:
    """Runs a sweep as a program, or brings a point's parameters into params.yaml.

    Raises:
        StageFailed, ConfigError: as the sweep.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("sweep", nargs="?", help="a YAML file, or JSON: name, corner_tokens, … (docs/sweeps.md)")
    what.add_argument("--apply", metavar="POINT", help="writes the parameters of a point into params.yaml")
    chosen = parser.parse_args(arguments)
    if chosen.apply:
        changes = Experiment(Path.cwd(), chosen.apply).overrides()
        changes.pop("pretrain.seeds", None)
        set_params(Path("params.yaml"), changes)
        print(f"params.yaml now has {', '.join(f'{key}={value}' for key, value in changes.items())}")
        return
    with_tracebacks()
    settings = read_sweep(chosen.sweep)
    points(settings, load_params())  # complaints come before anything starts
    with ExitStack() as stack:
        stack.enter_context(ending_well())
        if not PREFECT_API_URL.value():
            port, login = stack.enter_context(claimed_port(port_of("prefect"))), new_login()
            stack.enter_context(prefect_server(port, login))
            stack.enter_context(using_prefect(prefect_client(port, login)))
            print_prefect(port, login)
        try:
            sweep(settings)
        except (httpx.TransportError, RuntimeError) as error:
            if not unreachable(error):
                raise
            raise StageFailed(f"{no_answer()}; start the same sweep again: finished points are kept") from error


def read_sweep(text: str) -> Sweep:
    """A sweep from a YAML file's name, or from JSON.

    Raises:
        ConfigError: it cannot be used; the message says why.
    """
    try:
        content = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        return Sweep.model_validate(yaml.safe_load(content))
    except yaml.YAMLError as error:
        raise ConfigError(f"{text} is neither YAML nor JSON: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"{text} is no sweep:", lines) from None


def run(arguments: Sequence[str]) -> None:
    """Runs `main` as a program: a failure is one clear line, and Ctrl-C says how to resume."""
    try:
        main(arguments)
    except EXPECTED as error:
        if with_tracebacks():
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; start the same sweep again: finished points are kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
