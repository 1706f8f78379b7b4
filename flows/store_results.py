"""Adds this run's scores to the table of stored results: `python -m flows.store_results [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from flows.runtime.scratch import EXPECTED, StageFailed
from lotlip.config.params import Params, load_params
from lotlip.core.console import answer_help
from lotlip.report.stored import add_rows, rows_of_run


def store(params: Params, path: Path | None = None) -> Iterator[str]:
    """Adds the scores of all ablations on disk to the table; adding them again changes nothing.

    Args:
        params: params.yaml of the project.
        path: of the table; None: `report.stored_results`.

    Yields:
        A line for each ablation that was left out, and one for the table.

    Raises:
        StageFailed: no table is named, or there is nothing to store.
        ValueError: the file is not such a table.
    """
    path = path or params.report.stored_results
    if path is None:
        raise StageFailed("name a file, such as results/demo.csv, or set report.stored_results in params.yaml")
    rows, left_out = rows_of_run(params, Path())
    yield from (f"left out: {line}" for line in left_out)
    if not rows:
        raise StageFailed(
            f"{params.paths.metrics} has no scores of the current params.yaml; run `make reproduce` first"
        )
    added, replaced = add_rows(path, rows)
    yield f"{path}: {added} rows added, {replaced} replaced"


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        if len(sys.argv) > 2:
            raise StageFailed("give one file, or none for report.stored_results")
        for message in store(load_params(), Path(sys.argv[1]) if sys.argv[1:] else None):
            print(message)
    except EXPECTED as error:
        sys.exit(f"error: {error}")
