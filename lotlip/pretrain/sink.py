"""Destinations for the curves of a training process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Sink(Protocol):
    """Receives the curves of a training process."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs the values of one step."""

    def close(self) -> None:
        """Flushes buffered values."""


class NullSink:
    """Discards all values, so that callers need no check for whether tracking is on."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


# Tracking URI and run ID → sink. Without a run, the sink discards its values.
OpenSink = Callable[[str, str | None], Sink]
