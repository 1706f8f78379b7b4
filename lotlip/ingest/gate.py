"""The gate after ingest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd

from lotlip.core.checks import Check, max_share, one_value, run_gate
from lotlip.data.checks import count_repeated, counts, expectation, failure_check, non_empty, number_table
from lotlip.data.index import Totals
from lotlip.data.inspection import (
    PARTITION,
    held_out_images,
    inspect_partition,
)
from lotlip.data.records import Failure, UnitReport
from lotlip.ingest.config import IngestConfig
from lotlip.ingest.text_rules import KINDS


def gate_ingest(
    settings: IngestConfig,
    folder: Path,
    reports: Sequence[UnitReport],
    units: int,
    evaluation: Collection[str],
    report: Path,
) -> list[Check]:
    """Checks that all items are accounted for, keys and images are unique, and no training image is for evaluation.

    Args:
        settings: of the stage.
        folder: of the partitions.
        reports: of all partitions, and of units that failed as a whole.
        units: number of units of the source.
        evaluation: hashes of images that must not be trained on, besides those of the held-out splits.
        report: scratch folder.

    Raises:
        GateFailed: a check fails; see `run_gate`.
    """
    present = non_empty(reports)
    names = [unit.name for unit in present]
    held_out = held_out_images(folder, names) | set(evaluation)
    rows = [inspect_partition(folder, unit.name, unit.written, held_out) for unit in present]
    table = number_table(rows, PARTITION, "unit", "opened", "constant")
    complete = table.loc[table["missing_files"] == 0, "unit"].tolist()
    written = sum(unit.written for unit in reports)
    repeated = {column: count_repeated(folder, complete, column) for column in ("key", "sha256", "short_caption")}
    sums = Totals.of(reports)
    failures, few_failures = failure_check(sums, settings.max_failure_share, "ingest", LEFT_OUT)
    left_out = {kind: count for kind, count in sums.failure_kinds.items() if kind in LEFT_OUT}
    stage = {
        "stage": "ingest",
        "left_out": sum(left_out.values()) / max(sums.read, 1),
        "train": sum(unit.written for unit in reports if unit.name.startswith("train/")),
        "repeated_keys": repeated["key"],
        "repeated_images": repeated["sha256"],
        "repeated_captions": repeated["short_caption"] / max(written, 1),
        "constant_share": table["constant"].sum() / max(table["opened"].sum(), 1),
        "broken_units": sum(failure.kind in BROKEN_UNIT for failure in _unit_failures(reports)) / max(units, 1),
        **failures,
    }
    suites = {
        "stage": [
            few_failures,
            max_share(
                "left_out",
                "images left out as copies or evaluation images",
                settings.max_left_out_share,
                "ingest.max_left_out_share",
                counts(left_out),
            ),
            max_share(
                "broken_units",
                "source files that are broken or truncated",
                settings.max_broken_unit_share,
                "ingest.max_broken_unit_share",
            ),
            one_value("train", "the train split has images", low=1),
            one_value("repeated_keys", "keys are unique", high=0),
            one_value("repeated_images", "images are unique", high=0),
            max_share(
                "repeated_captions",
                "short captions that equal another",
                settings.max_repeated_caption_share,
                "ingest.max_repeated_caption_share",
            ),
            max_share(
                "constant_share",
                "sampled images that have a single colour",
                settings.max_constant_share,
                "ingest.max_constant_share",
            ),
        ],
        "units": [expectation(invariant) for invariant in PARTITION],
    }
    return run_gate("ingest", {"stage": pd.DataFrame([stage]), "units": table}, suites, report)


# Kinds of failures of images that are left out on purpose.
LEFT_OUT = ("duplicate-image", "evaluation", "near-evaluation", *KINDS)


# Kinds of failures that concern a whole file of the source, whose items were not all counted.
BROKEN_UNIT = ("unit", "truncated", "unreadable-shard")


def _unit_failures(reports: Sequence[UnitReport]) -> Iterator[Failure]:
    """The failures, but only the first one of a unit that failed as a whole."""
    for unit in reports:
        yield from unit.failures[:1] if not unit.sha256 else unit.failures
