"""Helpers for the gates after each stage: Great Expectations suites over small tables of statistics.

A stage's tables have one row per unit, and its `stage` table has one row in all. Partitions are read one at a time, so
a gate's memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lotlip.core.checks import each_value, max_share
from lotlip.data.duplicates import count_duplicates, hashes
from lotlip.data.index import Totals
from lotlip.data.inspection import Invariant
from lotlip.data.partitions import read_table
from lotlip.data.records import UnitReport

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation


def failure_check(
    totals: Totals, limit: float, stage: str, excluded: Collection[str] = ()
) -> tuple[dict[str, float], Expectation]:
    """The share of a stage's items that failed, and the expectation that limits it.

    Args:
        totals: sums over the stage's units.
        limit: `max_failure_share` of the stage.
        stage: its section of params.yaml.
        excluded: kinds of failures that do not count, because they have their own limit.
    """
    kinds = {kind: count for kind, count in totals.failure_kinds.items() if kind not in excluded}
    failed = sum(kinds.values()) / totals.read if totals.read else 0.0
    key = f"{stage}.max_failure_share"
    return {"failure_share": failed}, max_share("failure_share", "items that failed", limit, key, counts(kinds))


def counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def expectation(invariant: Invariant) -> Expectation:
    return each_value(invariant.column, invariant.what, invariant.low, invariant.high)


def number_table(
    rows: Sequence[Mapping[str, Any]], invariants: Sequence[Invariant], about: str, *more: str
) -> pd.DataFrame:
    """Rows of numbers as a table, which has all its columns even without rows; None becomes a missing value."""
    numbers = [*(invariant.column for invariant in invariants), *more]
    return pd.DataFrame(rows, columns=[about, *numbers]).astype(dict.fromkeys(numbers, float))


def count_repeated(folder: Path, names: Sequence[str], column: str) -> int:
    """How many values of a column duplicate an earlier one, over all the partitions."""
    return count_duplicates(hashes(read_table(folder, name, [column])[column]) for name in names)


def non_empty(reports: Sequence[UnitReport]) -> list[UnitReport]:
    """Units that have a table; a unit that failed as a whole has only failures."""
    return [unit for unit in reports if unit.written]
