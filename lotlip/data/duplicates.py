"""Values that occur more than once, among more of them than fit into memory; duplicate images and keys of ingest."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from lotlip.core.temporary import temporary_folder
from lotlip.data.partitions import place_partition, read_table
from lotlip.data.records import UnitReport

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# DuckDB's share; what does not fit goes to the temporary folder.
MEMORY = "256MB"
THREADS = 4  # each needs memory of its own
BATCH = 2**17  # hashes that are compared at a time

# An image that is in several splits stays in the one that is evaluated.
_PRECEDENCE = ("test", "val", "train")


def hashes(values: pd.Series) -> np.ndarray:
    """64 bits for each value, uint64 [n]; among 10⁸ values two that differ share them once in 3,000 times."""
    return pd.util.hash_pandas_object(values, index=False).to_numpy(copy=True)


def repeats(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Finds the values that occurred before. Memory is bounded: what does not fit is on disk, in the temporary folder.

    Args:
        parts: the hashes of each part's values, uint64 [n]; masked ones (`np.ma`) are left out. Each is read once.

    Yields:
        Some of the values that occurred before, int64 [n, 4]: the part and row of each, and those of its first
        occurrence, which is the lowest part and row. They are sorted by hash.

    Raises:
        OSError: the temporary folder is full.
    """
    value, first = np.empty(0, np.uint64), np.empty(0, np.int64)
    with _loaded(parts) as database:
        # sorted here, and compared below: DuckDB's windows and joins do not always keep to the memory limit
        for batch in database.sql("SELECT value, place FROM hashes ORDER BY value, place").to_arrow_reader(BATCH):
            values, places = (column.to_numpy() for column in batch.columns)
            # the last value of the batch before may go on in this one
            values, places = np.append(value, values), np.append(first, places)
            new = np.ones(len(values), dtype=bool)
            new[1:] = values[1:] != values[:-1]
            firsts = places[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
            found = np.stack([places[~new], firsts[~new]], axis=1)
            yield np.stack([found >> 32, found & 0xFFFFFFFF], axis=2).reshape(-1, 4)
            value, first = values[-1:], firsts[-1:]


def count_repeats(parts: Iterable[np.ndarray]) -> int:
    """How many values occurred before; arguments and errors as of `repeats`."""
    return sum(map(len, repeats(parts)))


@contextmanager
def _loaded(parts: Iterable[np.ndarray]) -> Iterator[DuckDBPyConnection]:
    """A database for the block, with a table `hashes` of values and their places: part · 2³² + row."""
    import duckdb

    with temporary_folder("tables") as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": str(folder),
            "threads": min(THREADS, os.cpu_count() or 1),
            "preserve_insertion_order": False,  # which takes memory; ORDER BY says what order matters
        }
        try:
            with duckdb.connect(":memory:", config=settings) as database:
                database.execute("SET enable_progress_bar = false")
                database.begin()
                database.execute("CREATE TABLE hashes (value UBIGINT, place BIGINT)")
                for part, values in enumerate(parts):
                    value = pa.array(np.ma.getdata(values), mask=np.ma.getmaskarray(values))
                    batch = pa.table({"value": value, "place": (part << 32) + np.arange(len(values))})
                    database.register("batch", batch)
                    database.execute("INSERT INTO hashes SELECT * FROM batch WHERE value IS NOT NULL")
                database.commit()
                yield database
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            # DuckDB takes at most 90 % of the space that is free there, and then calls it memory
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(folder.parent)) from error


# --- ingest -------------------------------------------------------------------------------------------------------


def unique_partitions(
    units: Path,
    reports: Sequence[UnitReport],
    out: Path,
    evaluation: Mapping[str, str],
    near_copies: Callable[[str], Mapping[int, str]] | None = None,
) -> list[UnitReport]:
    """Puts the partitions of ingest's units into `out`, without the images and keys that come again.

    Units are read apart and know nothing of one another, so this is done when all are there. Of images with equal
    bytes the first stays, that of the test split before that of the training split. What is dropped is a `Failure`:
    "duplicate" for a key, "duplicate-image" for an image, "evaluation" for a training image that is in an evaluation
    set, or "near-evaluation" for one that resembles an image there. Tars are linked, not copied: the image of a dropped
    row stays in its tar, and no table names it. Memory grows with what is dropped alone.

    Args:
        units: folder that `write_partitions` filled; it stays as it is.
        reports: of all its partitions, and of units that failed as a whole.
        out: a folder that is empty or not there.
        evaluation: sha256 of an image that must not be trained on → where it is.
        near_copies: a training partition's name → number of a row → why its image is taken for a copy of an
            evaluation image; None: such copies are not looked for.

    Returns:
        The reports as they are now, in their order.
    """
    names = sorted(
        (report.name for report in reports if report.sha256), key=lambda name: (_PRECEDENCE.index(_split(name)), name)
    )
    dropped: dict[str, dict[int, tuple[str, str]]] = {}  # partition → row → kind, reason
    for name in (name for name in names if _split(name) == "train"):
        if near_copies:
            dropped[name] = {row: ("near-evaluation", reason) for row, reason in near_copies(name).items()}
        for row, sha256 in enumerate(read_table(units, name, ["sha256"])["sha256"] if evaluation else ()):
            if sha256 in evaluation:
                reason = f"it is in an evaluation set: {evaluation[sha256]}"
                dropped.setdefault(name, {})[row] = ("evaluation", reason)
    for column, kind, what in (
        ("key", "duplicate", "its key is taken by"),
        ("sha256", "duplicate-image", "it is the same image as"),
    ):

        def read(name: str, column: str = column) -> np.ndarray:
            values = np.ma.masked_array(hashes(read_table(units, name, [column])[column]))
            values[list(dropped.get(name, {}))] = np.ma.masked  # what is dropped already repeats nothing
            return values

        key_of = lru_cache(maxsize=8)(lambda name: read_table(units, name, ["key"])["key"])
        again = [repeat for found in repeats(map(read, names)) for repeat in found.tolist()]
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
