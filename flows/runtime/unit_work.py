"""The work of a unit, which may be sent to another process. Nothing here imports Prefect, so workers start fast."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lotlip.data.records import NonRetryableError, UnitReport


class UnitWork:
    """The work of a unit, which runs in the current folder, also in another process or on another machine.

    It hides its contents from Prefect, which would search a task's arguments for futures.

    Args:
        work: processes the unit.
    """

    def __init__(self, work: Callable[..., list[UnitReport]]) -> None:
        self.work = work
        self.folder = Path.cwd()

    def call(self) -> list[UnitReport]:
        """Returns the unit's reports; an error that it raises can be sent to other processes."""
        if Path.cwd() != self.folder:  # a cluster's worker starts in another folder
            os.chdir(self.folder)
        try:
            return self.work()
        except Exception as error:
            raise picklable(error) from error


def answer(request: bytes, *arguments: Any) -> Any:
    """Runs pickled work, `UnitWork` or `SentUnit`, that another process sent; returns its result or its error."""
    try:
        return pickle.loads(request).call(*arguments)  # noqa: S301 - from the flow that uses this worker
    except Exception as error:
        return picklable(error)


def picklable(error: Exception) -> Exception:
    """Returns an error that other processes can receive: a plain one where unpickling would fail, as openai's do."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - of this process
    except Exception:
        kind = NonRetryableError if isinstance(error, NonRetryableError) else RuntimeError
        return kind(f"{type(error).__name__}: {error}")
    return error
