"""Values that come again, among more of them than fit into memory; images and keys of ingest that do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from lotlip.data.partitions import place_partition, read_table
from lotlip.data.records import UnitReport

# Hashes that are compared at a time: about 250 MB.
AT_ONCE = 2**23

# An image that is in several splits stays in the one that is evaluated.
_PRECEDENCE = ("test", "val", "train")


def hashes(values: pd.Series) -> np.ndarray:
    """64 bits for each value, uint64 [n]; among 10⁸ values two that differ share them once in 3,000 times."""
    return pd.util.hash_pandas_object(values, index=False).to_numpy(copy=True)


def repeats(parts: int, read: Callable[[int], np.ndarray], values: int, at_once: int = AT_ONCE) -> Iterator[np.ndarray]:
    """Finds the values that come again, in constant memory: all parts are read once for every `at_once` values.

    Args:
        parts: how many there are.
        read: a part's number → the hashes of its values, uint64 [n]; the same at every call.
        values: about how many there are in all.
        at_once: how many are held at a time.

    Yields:
        Some of the values that came before, int32 [n, 4]: the part and row of each, and those where it was first, which
        is the lowest part and row.
    """
    turns = max(1, -(-values // at_once))
    for turn in range(turns):
        found = [_of_turn(part, read(part), turn, turns) for part in range(parts)]
        if not found:
            return
        value, place = (np.concatenate(columns) for columns in zip(*found, strict=True))
        order = np.argsort(value, kind="stable")
        new = np.ones(len(order), dtype=bool)
        new[1:] = value[order][1:] != value[order][:-1]
        first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))  # where each run of equals begins
        yield np.hstack([place[order[~new]], place[order[first[~new]]]])


def _of_turn(part: int, values: np.ndarray, turn: int, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of a part whose turn it is, and their part and row, int32 [n, 2]."""
    rows = np.flatnonzero(values % np.uint64(turns) == turn)
    return values[rows], np.stack([np.full(len(rows), part), rows], axis=1).astype(np.int32)


def count_repeats(parts: int, read: Callable[[int], np.ndarray], values: int) -> int:
    """How many values come again; as of `repeats`."""
    return sum(map(len, repeats(parts, read, values)))


# --- ingest -------------------------------------------------------------------------------------------------------


def unique_partitions(
    units: Path, reports: Sequence[UnitReport], out: Path, evaluation: Mapping[str, str]
) -> list[UnitReport]:
    """Puts the partitions of ingest's units into `out`, without the images and keys that come again.

    Units are read apart and know nothing of one another, so this is done when all are there. Of images with equal
    bytes the first stays, that of the test split before that of the training split. What is dropped is a `Failure`:
    "duplicate" for a key, "duplicate-image" for an image, or "evaluation" for a training image that is in an evaluation
    set. Tars are linked, not copied: the image of a dropped row stays in its tar, and no table names it. Memory grows
    with what is dropped alone.

    Args:
        units: folder that `write_partitions` filled; it stays as it is.
        reports: of all its partitions, and of units that failed as a whole.
        out: a folder that is empty or not there.
        evaluation: sha256 of an image that must not be trained on → where it is.

    Returns:
        The reports as they are now, in their order.
    """
    names = sorted(
        (report.name for report in reports if report.sha256), key=lambda name: (_PRECEDENCE.index(_split(name)), name)
    )
    rows = sum(report.written for report in reports)
    dropped: dict[str, dict[int, tuple[str, str]]] = {}  # partition → row → kind, reason
    if evaluation:
        for name in (name for name in names if _split(name) == "train"):
            for row, sha256 in enumerate(read_table(units, name, ["sha256"])["sha256"]):
                if sha256 in evaluation:
                    reason = f"it is in an evaluation set: {evaluation[sha256]}"
                    dropped.setdefault(name, {})[row] = ("evaluation", reason)
    for column, kind, what in (
        ("key", "duplicate", "its key is taken by"),
        ("sha256", "duplicate-image", "it is the same image as"),
    ):

        def read(part: int, column: str = column) -> np.ndarray:
            values = hashes(read_table(units, names[part], [column])[column])
            gone = list(dropped.get(names[part], {}))
            # what is dropped already repeats nothing: its row gets a value of its own
            values[gone] = [_own(names[part], row) for row in gone]
            return values

        key_of = lru_cache(maxsize=8)(lambda name: read_table(units, name, ["key"])["key"])
        again = [repeat for found in repeats(len(names), read, rows) for repeat in found.tolist()]
        for part, row, first_part, first_row in sorted(again):
            first = names[first_part]
            reason = f"{what} {key_of(first)[first_row]} in {first}"
            dropped.setdefault(names[part], {})[row] = (kind, reason)
    return [
        place_partition(units, report, out, dropped.get(report.name, {})) if report.sha256 else report
        for report in reports
    ]


def _split(name: str) -> str:
    return name.partition("/")[0]


def _own(name: str, row: int) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(f"{name}#{row}".encode()).digest()[:8], "little"))
