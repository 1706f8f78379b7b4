"""The gate after captioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lotlip.caption.config import CaptionConfig
from lotlip.caption.quality import RULES, Agreement
from lotlip.core.checks import SHOWN_ROWS, Check, each_value, max_share, one_value, run_gate
from lotlip.data.checks import count_repeated, counts, expectation, failure_check, non_empty, number_table
from lotlip.data.index import Totals
from lotlip.data.inspection import (
    CAPTIONS,
    inspect_captions,
)
from lotlip.data.partitions import read_captions
from lotlip.data.records import UnitReport

REPEATED_REWRITES = 0.9  # largest share of rewrites that equal another, as for the short captions themselves
ENOUGH_CAPTIONS = 30  # in a partition, for its mean length to be meaningful


def gate_caption(
    settings: CaptionConfig, folder: Path, reports: Sequence[UnitReport], report: Path, rewrites: bool = False
) -> list[Check]:
    """Checks that a captioner's captions exist, belong to their images, and are neither broken nor all the same.

    Args:
        settings: of the stage.
        folder: of the captions.
        reports: of all partitions.
        report: scratch folder.
        rewrites: whether the captions reword the short ones; more of them may be equal then (`REPEATED_REWRITES`).
    """
    rows, agreements = [], {}
    for unit in non_empty(reports):
        row = inspect_captions(folder, unit.name, unit.written)
        rows.append(row)
        if row["missing_files"]:
            continue
        measured = read_captions(
            folder, unit.name, ["words", "truncated", "reasoning", "own_agreement", "next_agreement"]
        )
        agreements[unit.name] = Agreement.of(measured)
        enough = len(measured) >= ENOUGH_CAPTIONS
        row["words"] = float(measured["words"].astype(float).mean()) if enough else None
        row["truncated"] = int(measured["truncated"].eq(True).sum())
        row["reasoning"] = int(measured["reasoning"].fillna("").ne("").sum())
    names = list(agreements)
    table = number_table(rows, CAPTIONS, "unit", "words", "truncated", "reasoning")
    table["length_ratio"] = _from_median(table["words"])
    captions = sum(unit.written for unit in reports)
    sums = Totals.of(reports)
    filtered = {rule: count for rule, count in sums.failure_kinds.items() if rule in RULES}
    failures, few_failures = failure_check(sums, settings.max_failure_share, "caption", RULES)
    missing = [unit.name for unit in reports if not unit.written and (not unit.sha256 or unit.read >= ENOUGH_CAPTIONS)]
    swapped, agreeing = _swapped(agreements, settings.min_agreement_ratio)
    written = captions + sum(filtered.values())
    stage = {
        "stage": "caption",
        "captions": captions,
        "filtered_share": sum(filtered.values()) / max(written, 1),
        "reasoning_share": (table["reasoning"].sum() + filtered.get("reasoning", 0)) / max(written, 1),
        "truncated_share": table["truncated"].sum() / max(captions, 1),
        "missing_share": len(missing) / max(len(reports), 1),
        "repeated_keys": count_repeated(folder, names, "key"),
        "repeated_share": count_repeated(folder, names, "text") / max(captions, 1),
        "swapped": len(swapped),
        **failures,
    }
    shares = {
        "filtered_share": ("captions that the quality rules drop", "max_filtered_share"),
        "reasoning_share": ("captions that show the model's reasoning", "max_reasoning_share"),
        "truncated_share": ("captions that are cut off", "max_truncated_share"),
        "missing_share": ("partitions without any caption", "max_missing_partitions"),
        "repeated_share": ("captions that equal another", "max_repeated_share"),
    }
    limits = {"repeated_share": max(settings.max_repeated_share, REPEATED_REWRITES)} if rewrites else {}
    details = {
        "filtered_share": counts(filtered),
        "missing_share": _names(missing),
    }
    lengths = f"a partition's mean length is within {settings.max_length_ratio:g} times the median partition's"
    suites = {
        "stage": [
            few_failures,
            one_value("captions", "there are captions", low=1),
            one_value("repeated_keys", "no image has two captions", high=0),
            *(
                max_share(name, what, limits.get(name, getattr(settings, key)), f"caption.{key}", details.get(name, ""))
                for name, (what, key) in shares.items()
            ),
            one_value(
                "swapped",
                f"captions are their own images': they share {settings.min_agreement_ratio:g} times as many words with "
                "their short captions as with the next ones' (number of partitions that do not)",
                high=0,
                detail=agreeing,
                key="caption.min_agreement_ratio",
            ),
        ],
        "units": [
            *(expectation(invariant) for invariant in CAPTIONS),
            each_value("length_ratio", lengths, high=settings.max_length_ratio, key="caption.max_length_ratio"),
        ],
    }
    return run_gate("caption", {"stage": pd.DataFrame([stage]), "units": table}, suites, report)


def _from_median(means: pd.Series) -> pd.Series:
    """The ratio of a partition's mean to the median of all, or its inverse if larger; NaN without a mean."""
    means = means.astype(float)
    ratio = means / means.median()
    return pd.concat([ratio, 1 / ratio], axis=1).max(axis=1, skipna=False)


def _swapped(agreements: Mapping[str, Agreement], ratio: float) -> tuple[list[str], str]:
    """Partitions whose captions certainly belong to other images (or "all together"), and the measured agreement."""
    together = sum(agreements.values(), Agreement())
    verdicts = {name: agreement.is_own(ratio) for name, agreement in agreements.items()}
    swapped = [name for name, own in verdicts.items() if own is False]
    if not swapped and together.is_own(ratio) is False:
        swapped = ["all together"]
    unknown = [name for name, own in verdicts.items() if own is None]
    parts = [str(together), *([_names(swapped)] if swapped else [])]
    if unknown:
        parts.append(f"undecided for {len(unknown)} of {len(verdicts)} partitions: too few captions to compare")
    return swapped, "; ".join(parts)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_ROWS]) + (", …" if len(names) > SHOWN_ROWS else "")
