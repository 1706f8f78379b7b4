"""Finds duplicates among more values than fit into memory; removes duplicate images and keys from ingest's output."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from lotlip.core.cores import available_cores
from lotlip.core.temporary import temporary_folder
from lotlip.data.partitions import link_partition, read_table
from lotlip.data.records import UnitReport

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# DuckDB's memory limit; more than that goes to the temporary folder.
MEMORY = "256MB"
THREADS = 4  # each needs its own memory
BATCH = 2**17  # hashes compared at a time

# An image in several splits stays in the first of these, so that evaluation keeps it.
_PRECEDENCE = ("test", "val", "train")


def hashes(values: pd.Series) -> np.ndarray:
    """A 64-bit hash of each value, uint64 [n]; among 10⁸ different values the chance of a collision is 1 in 3,000."""
    return pd.util.hash_pandas_object(values, index=False).to_numpy(copy=True)


def find_duplicates(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Finds the values that occurred before, with bounded memory: the rest is on disk, in the temporary folder.

    Args:
        parts: hashes of the values of each part, uint64 [n]; masked ones (`np.ma`) are skipped. Each is read once.

    Yields:
        Batches of duplicates, int64 [n, 4]: part and row of each, and part and row of its first occurrence, which is
        the lowest part and row. They are sorted by hash.
    Raises:
        OSError: the temporary folder is full.
    """
    value, first = np.empty(0, np.uint64), np.empty(0, np.int64)
    with _loaded(parts) as database:
        # sorted by DuckDB, compared below: its windows and joins do not always keep to the memory limit
        for batch in database.sql("SELECT value, place FROM hashes ORDER BY value, place").to_arrow_reader(BATCH):
            values, places = (column.to_numpy() for column in batch.columns)
            # a run of equal values may continue from the previous batch
            values, places = np.append(value, values), np.append(first, places)
            new = np.ones(len(values), dtype=bool)
            new[1:] = values[1:] != values[:-1]
            firsts = places[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
            pairs = np.stack([places[~new], firsts[~new]], axis=1)
            yield np.stack([pairs >> 32, pairs & 0xFFFFFFFF], axis=2).reshape(-1, 4)
            value, first = values[-1:], firsts[-1:]


def find_by_count(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], most: int = 2**62, least: int = 0
) -> Iterator[np.ndarray]:
    """Finds the rows that have a value which occurs more than `most` or fewer than `least` times in all parts.

    Args:
        parts: hashes of the values of each part, uint64 [n], and the row that has each, int64 [n]. Each is read once.
        most, least: limits of how often a value may occur.

    Yields:
        Batches of part and row, int64 [n, 2], each row once, sorted.
    Raises:
        OSError: the temporary folder is full.
    """
    query = """
        SELECT DISTINCT place FROM hashes
        WHERE value IN (SELECT value FROM hashes GROUP BY value HAVING count(*) > ? OR count(*) < ?)
        ORDER BY place
    """
    with _loaded(parts) as database:
        for batch in database.sql(query, params=[most, least]).to_arrow_reader(BATCH):
            places = batch.column(0).to_numpy()
            yield np.stack([places >> 32, places & 0xFFFFFFFF], axis=1)


def count_duplicates(parts: Iterable[np.ndarray]) -> int:
    """How many values occurred before; arguments and errors are those of `find_duplicates`."""
    return sum(map(len, find_duplicates(parts)))


@contextmanager
def _loaded(parts: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]]) -> Iterator[DuckDBPyConnection]:
    """A database for the block, with a table `hashes` of values and places, where place = part · 2³² + row.

    A part has a value for each row, or values and their rows.
    """
    import duckdb

    with temporary_folder("tables") as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": str(folder),
            "threads": min(THREADS, available_cores()),
            "preserve_insertion_order": False,  # keeping it takes memory; ORDER BY gives the order that matters
        }
        try:
            with duckdb.connect(":memory:", config=settings) as database:
                database.execute("SET enable_progress_bar = false")
                database.begin()
                database.execute("CREATE TABLE hashes (value UBIGINT, place BIGINT)")
                for part, given in enumerate(parts):
                    values, rows = given if isinstance(given, tuple) else (given, np.arange(len(given)))
                    value = pa.array(np.ma.getdata(values), mask=np.ma.getmaskarray(values))
                    batch = pa.table({"value": value, "place": (part << 32) + rows})
                    database.register("batch", batch)
                    database.execute("INSERT INTO hashes SELECT * FROM batch WHERE value IS NOT NULL")
                database.commit()
                yield database
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            # DuckDB uses at most 90 % of the free space there, and then reports that it is out of memory
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(folder.parent)) from error


# --- ingest -------------------------------------------------------------------------------------------------------


def unique_partitions(
    units: Path,
    reports: Sequence[UnitReport],
    out: Path,
    evaluation: Mapping[str, str],
    near_copies: Callable[[str], Mapping[int, str]] | None = None,
    by_texts: Callable[[Sequence[str], Mapping[str, Collection[int]]], Mapping[str, Mapping[int, tuple[str, str]]]]
    | None = None,
) -> list[UnitReport]:
    """Links or copies the partitions of ingest's units into `out`, without duplicate images and keys.

    Units are read independently, so this runs after all of them. Of images with equal bytes the first one stays; the
    test split comes before the training split. A dropped item becomes a `Failure`: "duplicate" for a key,
    "duplicate-image" for an image, "evaluation" for a training image that is in an evaluation set, or
    "near-evaluation" for one that resembles an image there. Tars are linked, not copied: the image of a dropped row
    stays in its tar, but no table names it. Memory grows only with the number of dropped items.

    Args:
        units: folder that `write_partitions` filled; it is not changed.
        reports: of all its partitions, and of units that failed as a whole.
        out: a folder that is empty or does not exist.
        evaluation: sha256 of an image that must not be trained on → where it is.
        near_copies: a training partition's name → row → why its image counts as a copy of an evaluation image; None:
            do not search for such copies.
        by_texts: names of the training partitions, and the rows of each that are dropped already → partition → row →
            kind and reason of a failure; None: keep all texts.

    Returns:
        The updated reports, in the same order.
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
            values[list(dropped.get(name, {}))] = np.ma.masked  # rows that are already dropped are not originals
            return values

        key_of = lru_cache(maxsize=1)(lambda name: read_table(units, name, ["key"])["key"])
        duplicates = np.concatenate([np.empty((0, 4), np.int64), *find_duplicates(map(read, names))])
        by_first = duplicates[np.argsort(duplicates[:, 2])]  # so that `key_of` reads each partition once
        for part, row, first_part, first_row in map(np.ndarray.tolist, by_first):
            first = names[first_part]
            reason = f"{what} {key_of(first)[first_row]} in {first}"
            dropped.setdefault(names[part], {})[row] = (kind, reason)
    if by_texts:
        train = [name for name in names if _split(name) == "train"]
        for name, rows in by_texts(train, dropped).items():
            dropped[name] = {**rows, **dropped.get(name, {})}
    return [
        link_partition(units, report, out, dropped.get(report.name, {})) if report.sha256 else report
        for report in reports
    ]


def _split(name: str) -> str:
    return name.partition("/")[0]
