"""Units of work on every task runner: the same bytes, lost workers, cancelling."""

from __future__ import annotations

import sys
import threading

import pytest

from flows.runtime.runners import task_runner
from flows.runtime.scratch import StageFailed
from flows.runtime.worker import picklable
from lotlip.core.compute import Compute
from lotlip.data.records import NonRetryableError


@pytest.mark.parametrize("runner", ["ray", "dask"])
def test_a_missing_package_is_an_error_with_a_remedy(monkeypatch, runner) -> None:
    monkeypatch.setitem(sys.modules, f"prefect_{runner}", None)
    remedy = rf"prefect_{runner} is not installed: pip install 'lotlip\[{runner}\]', or set it to threads or processes"
    with pytest.raises(StageFailed, match=f"compute.task_runner is {runner}, and {remedy}"):
        task_runner(Compute(task_runner=runner), on_gpu=False).__enter__()


class Refused(NonRetryableError):
    """Cannot be pickled, like an error that holds a connection."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.connection = threading.Lock()


def test_an_error_that_cannot_be_pickled_becomes_a_plain_one() -> None:
    error = OSError(28, "No space left")
    assert picklable(error) is error
    assert type(picklable(Refused("no key"))) is NonRetryableError
    assert str(picklable(Refused("no key"))) == "Refused: no key"
