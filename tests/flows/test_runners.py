"""Units of work on every task runner: the same bytes, lost workers, cancelling."""

from __future__ import annotations

import sys

import pytest

from flows.runtime.runners import task_runner
from flows.runtime.scratch import StageFailed
from flows.runtime.stage import picklable
from lotlip.core.compute import Compute
from lotlip.data.records import NonRetryableError


@pytest.mark.parametrize("runner", ["ray", "dask"])
def test_a_missing_package_is_an_error_with_a_remedy(monkeypatch, runner) -> None:
    monkeypatch.setitem(sys.modules, f"prefect_{runner}", None)
    remedy = rf"prefect_{runner} is not installed: pip install 'lotlip\[{runner}\]', or set it to threads or processes"
    with pytest.raises(StageFailed, match=f"compute.task_runner is {runner}, and {remedy}"):
        task_runner(Compute(task_runner=runner), on_gpu=False).__enter__()


class Refused(NonRetryableError):
    """Pickles, but does not unpickle: its `args` are not the arguments of `__init__`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")


def test_an_error_that_cannot_be_unpickled_becomes_a_plain_one() -> None:
    error = OSError(28, "No space left")
    assert picklable(error) is error
    assert type(picklable(Refused(403, "no key"))) is NonRetryableError
    assert str(picklable(Refused(403, "no key"))) == "Refused: 403 no key"
