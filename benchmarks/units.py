"""Measures what a unit of work costs on each task runner: `python -m benchmarks.units`.

Units that do nothing run as a stage's units do. The start is the time until the first one is finished; the rest is
divided by the number of the others. Task runners whose packages are missing are left out. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, get_args

from prefect import flow
from prefect.futures import as_completed

from flows.runtime.runners import task_runner
from flows.runtime.scratch import StageFailed
from flows.runtime.servers import prefect_for_program
from flows.runtime.stage import run_unit
from flows.runtime.unit_work import UnitWork
from lotlip.core.compute import Compute

RUNNERS = get_args(Compute.model_fields["task_runner"].annotation)


@flow
def measure(runner: str, units: int, workers: int) -> dict[str, float]:
    """Measures one task runner. Returns the seconds of the start and of each further unit."""
    started = time.monotonic()
    with task_runner(Compute(task_runner=runner, workers=workers), on_gpu=False) as submit:
        futures = [submit(run_unit, UnitWork(list)) for _ in range(units)]  # units without reports
        finished = []
        for future in as_completed(futures):
            assert future.result() == []
            finished.append(time.monotonic())
    ended = time.monotonic()
    return {
        "start": finished[0] - started,
        "unit": (finished[-1] - finished[0]) / (units - 1),
        "end": ended - finished[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=RUNNERS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with prefect_for_program():
        for runner in arguments.runners:
            try:
                results[runner] = measure(runner, arguments.units, arguments.workers)
            except StageFailed as error:
                results[runner] = {"missing": str(error)}
    if arguments.json:
        print(json.dumps(results, allow_nan=False))
        return
    for runner, found in results.items():
        print(runner, *(f"{name} {value:.3f} s" if name != "missing" else value for name, value in found.items()))


if __name__ == "__main__":
    main()
