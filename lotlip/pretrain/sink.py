"""Where a training process sends its curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Sink(Protocol):
    """Where a training process sends its curves."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the values of one step."""

    def close(self) -> None:
        """Hands over what is still held back."""


class NullSink:
    """Tracks nothing, so that callers need not ask whether there is tracking."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


# Tracking URI and run ID → sink; without a run, the sink does nothing.
OpenSink = Callable[[str, str | None], Sink]
