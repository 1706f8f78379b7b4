"""The gate after sharding."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from lotlip.core.checks import Check, each_value, max_share, one_value, run_gate
from lotlip.data.checks import expectation, failure_check, number_table
from lotlip.data.duplicates import count_duplicates, hashes
from lotlip.data.index import ShardIndex
from lotlip.data.inspection import (
    SHARD,
    inspect_shard,
    read_keys,
)
from lotlip.data.separation import Separation
from lotlip.shard.config import ShardConfig


def gate_shard(
    settings: ShardConfig,
    folder: Path,
    index: ShardIndex,
    expected_samples: int,
    held_out: Collection[str],
    separated: Separation | None,
    report: Path,
) -> list[Check]:
    """Checks that the shards match their index, and that every planned sample is in a shard or has failed.

    Args:
        settings: of the stage.
        folder: of the shards.
        index: their index.json.
        expected_samples: number of planned samples.
        held_out: hashes of images that must not be trained on.
        separated: how well the tower separates the pictures; None: not measured.
        report: scratch folder.
    """
    rows = [
        inspect_shard(folder, shard, settings.store_features, held_out, rewriters=index.rewriters)
        for shard in index.shards
    ]
    indexed = [folder / f"{row['shard']}.tar" for row in rows if row["places_off"] == 0]
    failures, few_failures = failure_check(index, settings.max_failure_share, "shard")
    table = number_table(rows, SHARD, "shard", "samples", "uncaptioned")
    samples = index.written
    stage = {
        "stage": "shard",
        "samples": samples + index.failed,
        "repeated_keys": count_duplicates(hashes(read_keys(path)) for path in indexed),
        "train": index.splits["train"].samples if "train" in index.splits else 0,
        "widths": len({width for row in rows for width in row["widths"]}),
        "uncaptioned": table["uncaptioned"].sum() / max(samples, 1),
        **failures,
    }
    expected = f"samples written and failed add up to the {expected_samples} planned ones"
    largest = settings.samples_per_shard
    key = "shard.max_uncaptioned_share"
    captioned = [max_share("uncaptioned", "samples without a long caption", settings.max_uncaptioned_share, key)]
    ratio = settings.min_caption_similarity_ratio
    better = []
    if ratio is not None and separated is not None:
        stage["caption_similarity_ratio"] = separated.tower / max(separated.pixels, 1e-12)
        what = "captions of nearest neighbours by the image tower are more similar than by raw pixels (ratio)"
        key = "shard.min_caption_similarity_ratio"
        better = [one_value("caption_similarity_ratio", what, low=ratio, key=key)]
    suites = {
        "stage": [
            few_failures,
            one_value("samples", expected, expected_samples, expected_samples),
            one_value("train", "the train split has samples", low=1),
            one_value("repeated_keys", "keys are unique", high=0),
            one_value("widths", "all features have the same dimension (number of dimensions)", high=1),
            *better,
            *(captioned if index.describers else []),  # only if captioners describe the images
        ],
        "shards": [
            *(expectation(invariant) for invariant in SHARD),
            each_value("samples", f"a shard has from 1 to {largest} samples", 1, largest),
        ],
    }
    return run_gate("shard", {"stage": pd.DataFrame([stage]), "shards": table}, suites, report)
