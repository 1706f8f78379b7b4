"""The gate after ingest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd

from lotlip.core.checks import Check, one, run_gate, share
from lotlip.data.checks import count_repeated, counts, expectation, failure_check, non_empty, number_table
from lotlip.data.index import Totals
from lotlip.data.inspection import (
    PARTITION,
    held_out_images,
    inspect_partition,
)
from lotlip.data.records import Failure, UnitReport
from lotlip.ingest.config import IngestConfig


def gate_ingest(
    settings: IngestConfig,
    folder: Path,
    reports: Sequence[UnitReport],
    units: int,
    evaluation: Collection[str],
    report: Path,
) -> list[Check]:
    """Every item is accounted for, every key and image comes once, and none that is evaluated on is trained on.

    Args:
        settings: the stage's.
        folder: where the partitions are.
        reports: of all partitions, and of units that failed as a whole.
        units: how many there were to read.
        evaluation: hashes of images, beside the held-out splits', that must not be trained on.
        report: scratch folder.

    Raises:
        GateFailed: see `run_gate`, as for every gate below.
    """
    there = non_empty(reports)
    names = [unit.name for unit in there]
    held_out = held_out_images(folder, names) | set(evaluation)
    rows = [inspect_partition(folder, unit.name, unit.written, held_out) for unit in there]
    table = number_table(rows, PARTITION, "unit", "opened", "constant")
    whole = table.loc[table["missing_files"] == 0, "unit"].tolist()
    written = sum(unit.written for unit in reports)
    again = {column: count_repeated(folder, whole, column) for column in ("key", "sha256", "short_caption")}
    found = Totals.of(reports)
    failures, few_failures = failure_check(found, settings.max_failure_share, "ingest", LEFT_OUT)
    left_out = {kind: count for kind, count in found.failure_kinds.items() if kind in LEFT_OUT}
    stage = {
        "stage": "ingest",
        "left_out": sum(left_out.values()) / max(found.read, 1),
        "train": sum(unit.written for unit in reports if unit.name.startswith("train/")),
        "repeated_keys": again["key"],
        "repeated_images": again["sha256"],
        "repeated_captions": again["short_caption"] / max(written, 1),
        "constant_share": table["constant"].sum() / max(table["opened"].sum(), 1),
        "broken_units": sum(failure.kind in BROKEN_UNIT for failure in _one_each(reports)) / max(units, 1),
        **failures,
    }
    suites = {
        "stage": [
            few_failures,
            share(
                "left_out",
                "images left out as copies or evaluation images",
                settings.max_left_out_share,
                "ingest.max_left_out_share",
                counts(left_out),
            ),
            share(
                "broken_units",
                "source files that are broken or cut off",
                settings.max_broken_unit_share,
                "ingest.max_broken_unit_share",
            ),
            one("train", "the train split has images", low=1),
            one("repeated_keys", "no key comes twice", high=0),
            one("repeated_images", "no image comes twice", high=0),
            share(
                "repeated_captions",
                "short captions that repeat another",
                settings.max_repeated_caption_share,
                "ingest.max_repeated_caption_share",
            ),
            share(
                "constant_share",
                "images looked at that are one colour all over",
                settings.max_constant_share,
                "ingest.max_constant_share",
            ),
        ],
        "units": [expectation(fact) for fact in PARTITION],
    }
    return run_gate("ingest", {"stage": pd.DataFrame([stage]), "units": table}, suites, report)


# Kinds of failures of images that are left out on purpose.
LEFT_OUT = ("duplicate-image", "evaluation", "near-evaluation")


# Kinds of failures that tell of a whole file of the source; its items were not all counted.
BROKEN_UNIT = ("unit", "truncated", "unreadable-shard")


def _one_each(reports: Sequence[UnitReport]) -> Iterator[Failure]:
    """The failures, but one alone for a unit that failed as a whole."""
    for unit in reports:
        yield from unit.failures[:1] if not unit.sha256 else unit.failures
