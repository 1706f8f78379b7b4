"""Curves of a training that is running."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from lotlip.pretrain.sink import NullSink, Sink
from lotlip.tracking.store import failure, open_store

TRACKING_WARNING = "tracking warning: "  # prefix of the line by which a training process reports a tracking failure


class MlflowSink:
    """Sends curves to an MLflow run, several steps at a time, from a separate thread.

    A write to the store takes as long as a training step, and importing MLflow as long as the rest of the start-up.

    Args:
        uri: of the tracking server or store.
        run_id: of the run.
        steps_held: number of steps that are sent at a time.
        warn: called with one line when the store fails; nothing more is sent afterwards, because tracking must neither
            end nor delay training. None: `close` raises the error.
    """

    def __init__(
        self, uri: str, run_id: str, steps_held: int = 10, warn: Callable[[str], object] | None = None
    ) -> None:
        self._uri, self._run_id = uri, run_id
        self._steps_held, self._warn = steps_held, warn
        self._held: list[tuple[int, int, dict[str, float]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._error: Exception | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records the values of one step; sends the recorded steps when there are enough."""
        self._held.append((int(time.time() * 1000), step, dict(metrics)))
        if len(self._held) >= self._steps_held:
            self._send()

    def close(self) -> None:
        """Sends the recorded steps and waits until everything has been sent, or sending has failed."""
        self._send()
        self._thread.shutdown()
        if self._error and not self._warn:
            raise self._error

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._thread.submit(self._log, held)

    def _log(self, held: list[tuple[int, int, dict[str, float]]]) -> None:
        if self._error:
            return
        try:
            from mlflow.entities import Metric

            points = [
                Metric(f"train.{name}", value, when, step)
                for when, step, metrics in held
                for name, value in metrics.items()
            ]
            open_store(self._uri).log_batch(self._run_id, metrics=points)
        except Exception as error:
            self._error = error
            if self._warn:
                self._warn(failure(self._uri, error))


def open_sink(uri: str, run_id: str | None, warn: Callable[[str], object]) -> Sink:
    """The sink of a training run, which continues if the store fails; without a run, one that does nothing.

    Args:
        uri: of the tracking server or store.
        run_id: of the run.
        warn: called with one line when the store fails.
    """
    return MlflowSink(uri, run_id, warn=warn) if run_id else NullSink()
