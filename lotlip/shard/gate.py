"""The gate after sharding."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from lotlip.core.checks import Check, each, one, run_gate, share
from lotlip.data.checks import expectation, failure_check, number_table
from lotlip.data.duplicates import count_repeats, hashes
from lotlip.data.index import ShardIndex
from lotlip.data.inspection import (
    SHARD,
    inspect_shard,
    read_keys,
)
from lotlip.shard.config import ShardConfig


def gate_shard(
    settings: ShardConfig,
    folder: Path,
    index: ShardIndex,
    expected_samples: int,
    held_out: Collection[str],
    report: Path,
) -> list[Check]:
    """The shards on disk are those of the index, and every sample that was planned is in one or has failed.

    Args:
        settings: the stage's.
        folder: where the shards are.
        index: their index.json.
        expected_samples: that were planned.
        held_out: hashes of the images that must not be trained on.
        report: scratch folder.
    """
    rows = [inspect_shard(folder, shard, settings.store_features, held_out) for shard in index.shards]
    whole = [folder / f"{row['shard']}.tar" for row in rows if row["places_off"] == 0]
    failures, few_failures = failure_check(index, settings.max_failure_share, "shard")
    table = number_table(rows, SHARD, "shard", "samples", "uncaptioned")
    samples = index.written
    stage = {
        "stage": "shard",
        "samples": samples + index.failed,
        "repeated_keys": count_repeats(hashes(read_keys(path)) for path in whole),
        "train": index.splits["train"].samples if "train" in index.splits else 0,
        "widths": len({width for row in rows for width in row["widths"]}),
        "uncaptioned": table["uncaptioned"].sum() / max(samples, 1),
        **failures,
    }
    expected = f"samples written and failed are the {expected_samples} that were planned"
    largest = settings.samples_per_shard
    key = "shard.max_uncaptioned_share"
    described = [share("uncaptioned", "samples without a long caption", settings.max_uncaptioned_share, key)]
    suites = {
        "stage": [
            few_failures,
            one("samples", expected, expected_samples, expected_samples),
            one("train", "the train split has samples", low=1),
            one("repeated_keys", "no key comes twice", high=0),
            one("widths", "all features have one width (as many as this)", high=1),
            *(described if set(index.statistics) - {"raw"} else []),  # where there are captioners
        ],
        "shards": [
            *(expectation(fact) for fact in SHARD),
            each("samples", f"a shard has from 1 to {largest} samples", 1, largest),
        ],
    }
    return run_gate("shard", {"stage": pd.DataFrame([stage]), "shards": table}, suites, report)
