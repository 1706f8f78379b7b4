"""Runs the trials of a sweep within its budget, each in a checkout on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from threading import Event, Lock
from typing import IO, Any

from prefect import get_run_logger

from flows.runtime.scratch import StageFailed
from flows.runtime.servers import port_of
from flows.runtime.stage import hash_of
from flows.runtime.supervisor import end_group, start_group, supervised
from flows.sweep.reasons import failure_reason
from flows.sweep.trials import Sweep, Trial, base_of, selection_scores
from flows.sweep.workspaces import Experiment, Snapshot
from lotlip.config.params import Params
from lotlip.core.caches import private_folder
from lotlip.core.code import code_hash
from lotlip.core.files import sha256_tree
from lotlip.core.loopback import HOST
from lotlip.core.stages import STAGES
from lotlip.data.stage_record import StageRecord
from lotlip.evaluate.records import AblationScores
from lotlip.pretrain.records import RUN, Run
from lotlip.tracking.store import warn_on_failure

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


class TrialRunner(ABC):
    """Runs trials within the budget, and stops all of them on request. Subclasses decide where a trial runs.

    Args:
        settings: settings of the sweep.
        params: params.yaml of the project.
        snapshot: snapshot of the project that all trials run from.
        flow_run: URL of the sweep's flow run in Prefect's UI.
    """

    def __init__(self, settings: Sweep, params: Params, snapshot: Snapshot, flow_run: str) -> None:
        from lotlip.tracking.mlflow import Tracker
        from lotlip.tracking.store import failure

        self.settings, self.params, self.snapshot, self.flow_run = settings, params, snapshot, flow_run
        # The tracker creates the store, whose artifact folder is relative to the current folder, before any trial does.
        tracking = params.tracking
        try:
            self.tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
        except Exception as error:  # MLflow raises many types; nothing has run yet
            raise StageFailed(failure(os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri, error)) from error
        self.inputs = {
            "shards": hash_of(params.paths.shards / "index.json"),
            "image_tower": hash_of(params.paths.image_tower / "model.safetensors"),
            "code": code_hash(*STAGES),
        }
        self._hashes: dict[Path, str] = {}
        self._start, self._started_trials = time.monotonic(), set[str]()
        self._stopping, self._lock = Event(), Lock()

    def experiment(self, trial: Trial) -> Experiment:
        """Returns a trial's experiment, which may not exist yet."""
        files = {key: self._hash(path) for key, path in trial.unwatched_inputs()}
        return Experiment(self.snapshot.root, trial.experiment({**self.inputs, **files}))

    def _hash(self, path: Path) -> str:
        """Returns the hash of a file or folder, which is read once in a sweep."""
        if path not in self._hashes:
            self._hashes[path] = sha256_tree(path)
        return self._hashes[path]

    def run(self, trial: Trial) -> Outcome:
        """Runs a trial, unless it is finished or the budget is spent.

        Raises:
            StageFailed: it failed, or the sweep is being stopped.
        """
        experiment = self.experiment(trial)
        with experiment.exclusive(self._check_not_stopping) as lock:
            self._check_not_stopping()
            if self.is_finished(experiment):
                return self._outcome(trial, experiment, REUSED)
            if not self._within_budget(experiment.name) or not self._run_experiment(trial, experiment, lock):
                return Outcome(SKIPPED)
        return self._outcome(trial, experiment, DONE)

    def stop(self) -> None:
        """Ends the running trials and prevents others from starting."""
        self._stopping.set()
        self._end_running()

    @property
    def stopping(self) -> bool:
        """Whether the sweep is being stopped."""
        return self._stopping.is_set()

    @property
    def out_of_time(self) -> bool:
        """Whether no other trial may start, because `max_minutes` have passed."""
        minutes = self.settings.max_minutes
        return minutes is not None and time.monotonic() - self._start >= minutes * 60

    def _check_not_stopping(self) -> None:
        if self.stopping:
            raise StageFailed("the sweep was stopped")

    def _within_budget(self, name: str) -> bool:
        """Whether the budget allows a trial to start; retries are always allowed."""
        runs = self.settings.max_runs
        with self._lock:
            if name in self._started_trials:
                return True
            spent = (runs is not None and len(self._started_trials) >= runs) or self.out_of_time
            if not spent:
                self._started_trials.add(name)
            return not spent

    def is_finished(self, experiment: Experiment) -> bool:
        """Whether a trial's result exists, in which case it is in the project afterwards."""
        return experiment.revision() is not None

    @abstractmethod
    def _run_experiment(self, trial: Trial, experiment: Experiment, lock: IO[Any]) -> bool:
        """Runs a trial, and brings its result into the project.

        Args:
            trial: the trial.
            experiment: its experiment.
            lock: of the experiment, for processes that may outlive this one.

        Returns:
            Whether it ran; otherwise it did not start in time.

        Raises:
            StageFailed: it failed, or the sweep is being stopped.
        """

    @abstractmethod
    def _end_running(self) -> None:
        """Ends the running trials."""

    def _outcome(self, trial: Trial, experiment: Experiment, status: str) -> Outcome:
        """Reads the scores of a finished trial, and tags its run in MLflow with this sweep."""
        # another sweep may have run it, when params.yaml had other names for the same ablation and folders
        own = experiment.params()
        paths, base = own.paths, base_of(own)
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


class LocalRunner(TrialRunner):
    """Runs each trial on this machine, in a checkout of its own.

    Args:
        settings: settings of the sweep.
        params: params.yaml of the project.
        snapshot: snapshot of the project that all trials run from.
        flow_run: URL of the sweep's flow run in Prefect's UI.
        environment: environment variables of the trials' processes.
    """

    def __init__(
        self, settings: Sweep, params: Params, snapshot: Snapshot, flow_run: str, environment: Mapping[str, str]
    ) -> None:
        super().__init__(settings, params, snapshot, flow_run)
        self.environment = dict(environment)
        self._running: list[subprocess.Popen[Any]] = []

    def _end_running(self) -> None:
        with self._lock:
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            end_group(process)

    def _run_experiment(self, trial: Trial, experiment: Experiment, lock: IO[Any]) -> bool:
        plain = trial.params.model_dump(mode="json", exclude_unset=True)
        project = experiment.prepare(self.snapshot, plain, trial.overrides)
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
            text = log.read_text(encoding="utf-8", errors="replace")
            raise StageFailed(f"{failure_reason(text, status)} (log: {log})")
        experiment.collect()
        return True


def _absolute(uri: str, root: Path) -> str:
    """Makes a tracking URI independent of the current folder."""
    prefix = "sqlite:///"
    return f"{prefix}{root / uri.removeprefix(prefix)}" if uri.startswith(prefix) else uri


def mlflow_address(tracker: Any) -> str:
    """Returns the URL of MLflow's UI: that of the tracking server, or that of `make ui` and `make serve`."""
    return tracker.uri.rstrip("/") if tracker.uri.startswith("http") else f"http://{HOST}:{port_of('mlflow')}"


def run_address(tracker: Any, run_id: str) -> str:
    """Returns the URL of a run in MLflow's UI."""
    return f"{mlflow_address(tracker)}/#/experiments/{tracker.experiment_id}/runs/{run_id}"
