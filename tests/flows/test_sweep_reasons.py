"""What a sweep says of a point: why it failed, and on which benchmark it was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.sweep.sweep import _reason, first_benchmark
from lotlip.config.params import load_params
from tests.flows.conftest import ROOT

INFO = "12:00:01.123 | INFO    | Flow run 'pretrain-lotlip' - lotlip seed 0: step 10/400"
DVC = "ERROR: failed to reproduce 'pretrain@lotlip': failed to run: python -m flows pretrain lotlip, exited with 1"


@pytest.mark.parametrize(
    ("lines", "status", "expected"),
    [
        (
            [INFO, "error in pretrain a: the loss is nan", INFO, DVC],
            1,
            "error in pretrain a: the loss is nan",
        ),
        ([INFO, "Traceback (most recent call last):", "KeyError: 'x'", DVC, INFO], 1, "KeyError: 'x'"),
        ([INFO, "torch.OutOfMemoryError: CUDA out of memory.", DVC], 1, "torch.OutOfMemoryError: CUDA out of memory."),
        (
            [INFO, "12:00:02.000 | ERROR   | Flow run 'a' - went wrong", INFO],
            1,
            "| ERROR   | Flow run 'a' - went wrong",
        ),
        ([INFO, DVC, INFO], 255, DVC),
        ([INFO, INFO], -9, "ended by SIGKILL"),
        ([INFO, INFO], 137, "ended by SIGKILL"),
        ([INFO], 3, "status 3"),
        ([], 1, "status 1"),
    ],
)
def test_the_reason_is_an_error_and_never_a_line_of_information(
    tmp_path: Path, lines: list[str], status: int, expected: str
):
    log = tmp_path / "log.txt"
    log.write_text("\n".join(lines))
    found = _reason(log, status)
    assert expected in found
    assert "INFO" not in found


def test_points_are_measured_on_the_first_benchmark_of_params_yaml():
    params = load_params(ROOT / "params.yaml")
    (settings,) = params.evaluate.benchmarks.values()
    evaluate = params.evaluate.model_copy(update={"benchmarks": {"scenes": settings, "coco": settings}})
    params = params.model_copy(update={"evaluate": evaluate})
    assert first_benchmark({"coco": 1, "scenes": 2}, params) == 2  # as JSON sorts them
    assert first_benchmark({"coco": 1, "scenes-partial": 2}, params) == 2
