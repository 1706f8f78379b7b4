"""The gate after each stage: Great Expectations suites over small tables of statistics, and what a person reads of it.

A stage's tables have a row per unit, and its `stage` table one row for all, read a partition at a time: a gate's
memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lotlip.core.checks import each, share
from lotlip.data.duplicates import count_repeats, hashes
from lotlip.data.index import Totals
from lotlip.data.inspection import (
    Fact,
)
from lotlip.data.partitions import read_table
from lotlip.data.records import UnitReport

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation


def failure_check(
    found: Totals, limit: float, stage: str, apart: Collection[str] = ()
) -> tuple[dict[str, float], Expectation]:
    """The share of a stage's items that failed, and what it may be.

    Args:
        found: sums over the stage's units.
        limit: `max_failure_share` of the stage.
        stage: its section of params.yaml.
        apart: kinds of failures that do not count, since they have a limit of their own.
    """
    kinds = {kind: count for kind, count in found.failure_kinds.items() if kind not in apart}
    failed = sum(kinds.values()) / found.read if found.read else 0.0
    key = f"{stage}.max_failure_share"
    return {"failure_share": failed}, share("failure_share", "items that failed", limit, key, counts(kinds))


def counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def expectation(fact: Fact) -> Expectation:
    return each(fact.column, fact.what, fact.low, fact.high)


def number_table(rows: Sequence[Mapping[str, Any]], facts: Sequence[Fact], about: str, *more: str) -> pd.DataFrame:
    """Rows of numbers as a table, which has its columns though it may have no rows; None is a gap."""
    numbers = [*(fact.column for fact in facts), *more]
    return pd.DataFrame(rows, columns=[about, *numbers]).astype(dict.fromkeys(numbers, float))


def count_repeated(folder: Path, names: Sequence[str], column: str) -> int:
    """How many values of a column come again, in any of the partitions."""
    return count_repeats(hashes(read_table(folder, name, [column])[column]) for name in names)


def non_empty(reports: Sequence[UnitReport]) -> list[UnitReport]:
    """Units that have a table to look at; of one that failed as a whole only its failures are there."""
    return [unit for unit in reports if unit.written]
