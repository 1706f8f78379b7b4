"""Re-validates the output of a stage, file by file and sample by sample: `lotlip verify`."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lotlip.core.files import RECORD, read_json, sha256_files, sha256_json
from lotlip.data.duplicates import find_duplicates, hashes
from lotlip.data.index import (
    INDEX_FILE,
    CaptionIndex,
    ShardEntry,
    ShardIndex,
    Totals,
    UnitEntry,
    UnitIndex,
    read_index,
)
from lotlip.data.inspection import (
    CAPTIONS,
    HASH,
    PARTITION,
    SHARD,
    Invariant,
    held_out_images,
    inspect_captions,
    inspect_partition,
    inspect_shard,
    read_keys,
)
from lotlip.data.partitions import MARKER, finished, read_table
from lotlip.data.tars import IDS, INDEX
from lotlip.shard.shards import DONE, finished_shard


class Problem(NamedTuple):
    """A problem found.

    Attributes:
        where: the unit, shard or file.
        what: description of the problem.
    """

    where: str
    what: str


class Verification(NamedTuple):
    """The verification of a folder.

    Attributes:
        kind: "images", "captions" or "shards".
        units: number of units to check.
        samples: number of samples according to index.json.
        problems: checks unit by unit when iterated; yields the problems of each.
    """

    kind: str
    units: int
    samples: int
    problems: Iterator[list[Problem]]


def verify(folder: Path, held_out: Collection[str] = ()) -> Verification:
    """Verifies the output of ingest, a captioner or the shard stage.

    Checks the hash of every file, decodes every image, reads every sample's texts and feature, and finds duplicate keys
    and images and files that are not in index.json. One unit is in memory at a time.

    Args:
        folder: output folder of the stage, with an index.json.
        held_out: hashes of images that must not be in the training data.

    Raises:
        ValueError: the folder has no index.json of one of these stages.
    """
    index = _index(folder)
    if isinstance(index, ShardIndex):
        return Verification("shards", len(index.shards) + 1, index.written, _shards(folder, index, held_out))
    kind, problems = "captions", _captions(folder, index)
    if any((folder / f"{unit.name}.tar").is_file() for unit in index.whole):
        kind, problems = "images", _images(folder, index, held_out)
    return Verification(kind, len(index.whole) + 1, index.written, problems)


def _index(folder: Path) -> ShardIndex | UnitIndex:
    """Reads the index of a folder of any kind, which is recognised by the fields that only it has."""
    path = folder / INDEX_FILE
    kinds: dict[str, type[ShardIndex] | type[UnitIndex]] = {
        "splits": ShardIndex,
        "quality": CaptionIndex,
        "units": UnitIndex,
    }
    fields = read_json(path) if path.is_file() else kinds  # `read_index` reports a missing one
    kind = next((kind for field, kind in kinds.items() if field in fields), None)
    if kind is None:
        raise ValueError(f"{path} was not written by ingest, a captioner or the shard stage")
    return read_index(folder, kind)


# Exceptions of libraries that read damaged files.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, EOFError, tarfile.TarError)


def _check(folder: Path, name: str, suffixes: Sequence[str], check: Callable[[], list[Problem]]) -> list[Problem]:
    """Runs the check of a unit; an unreadable file is a problem."""
    try:
        return check()
    except _UNREADABLE as error:
        file = next((f"{name}{suffix}" for suffix in suffixes if not _readable(folder / f"{name}{suffix}")), name)
        return [Problem(name, f"{file} cannot be read: {' '.join(str(error).split())}")]


def _readable(path: Path) -> bool:
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            pq.read_table(path)
        else:
            sha256_files([path])
    except _UNREADABLE:
        return False
    return True


def _images(folder: Path, index: UnitIndex, held_out: Collection[str]) -> Iterator[list[Problem]]:
    names = [unit.name for unit in index.whole]
    readable = [name for name in names if _has_table(folder, name)]
    all_held_out = held_out_images(folder, readable) | set(held_out)
    suffixes = (".tar", ".parquet")
    for unit in index.whole:

        def check(unit: UnitEntry = unit) -> list[Problem]:
            row = inspect_partition(folder, unit.name, unit.written, all_held_out, sample_size=None)
            return _problems(unit.name, row | _hash_off(folder, unit, suffixes), (HASH, *PARTITION))

        yield _check(folder, unit.name, suffixes, check)
    last = _index_problems(folder, index, {f"{name}{end}" for name in names for end in (*suffixes, MARKER)})
    last += _duplicates(readable, lambda name: read_table(folder, name, ["key"])["key"], "key")
    last += _duplicates(readable, lambda name: read_table(folder, name, ["sha256"])["sha256"], "image")
    yield last


def _captions(folder: Path, index: UnitIndex) -> Iterator[list[Problem]]:
    names = [unit.name for unit in index.whole]
    for unit in index.whole:

        def check(unit: UnitEntry = unit) -> list[Problem]:
            row = inspect_captions(folder, unit.name, unit.written)
            return _problems(unit.name, row | _hash_off(folder, unit, (".parquet",)), (HASH, *CAPTIONS))

        yield _check(folder, unit.name, (".parquet",), check)
    readable = [name for name in names if _has_table(folder, name)]
    yield [
        *_index_problems(folder, index, {f"{name}{end}" for name in names for end in (".parquet", MARKER)}),
        *_duplicates(readable, lambda name: read_table(folder, name, ["key"])["key"], "key"),
    ]


def _has_table(folder: Path, name: str) -> bool:
    return (folder / f"{name}.parquet").is_file() and _readable(folder / f"{name}.parquet")


def _shards(folder: Path, index: ShardIndex, held_out: Collection[str]) -> Iterator[list[Problem]]:
    readable: list[str] = []
    for shard in index.shards:

        def check(shard: ShardEntry = shard) -> list[Problem]:
            row = inspect_shard(folder, shard, index.features, held_out, sample_size=None, rewriters=index.rewriters)
            if row["places_off"] == 0:
                readable.append(shard.name)
            return _problems(shard.name, row, SHARD)

        def marker(shard: ShardEntry = shard) -> list[Problem]:
            report = finished_shard(shard.name, folder)
            if report is None or report.sha256 != shard.sha256:
                return [Problem(shard.name, f"{shard.name}{DONE} is missing or does not match the shard")]
            return []

        yield [
            *_check(folder, shard.name, (".tar", INDEX), check),
            *_check(folder, f"{shard.name}{DONE}", (), marker),
        ]
    known = {f"{shard.name}{end}" for shard in index.shards for end in (".tar", INDEX, IDS, DONE)}
    last = [] if sum(shard.samples for shard in index.shards) == index.written else [_miscounted(index)]
    duplicates = _duplicates(readable, lambda name: read_keys(folder / f"{name}.tar"), "key")
    yield [*last, *_unknown_files(folder, known), *duplicates]


def _hash_off(folder: Path, unit: UnitEntry, suffixes: Sequence[str]) -> dict[str, int | None]:
    files = [folder / f"{unit.name}{suffix}" for suffix in suffixes]
    complete = all(file.is_file() for file in files)
    return {"hash_off": int(sha256_files(files) != unit.sha256) if complete else None}


def _problems(where: str, row: Mapping[str, Any], invariants: Sequence[Invariant]) -> list[Problem]:
    return [
        Problem(where, f"expected: {invariant.what}; found {row[invariant.column]:g}")
        for invariant in invariants
        if not invariant.holds(row[invariant.column])
    ]


def _index_problems(folder: Path, index: UnitIndex, known: Collection[str]) -> list[Problem]:
    """Finds differences between index.json and the units' reports, and files that are not in index.json."""
    problems = _unknown_files(folder, known)
    for unit in index.whole:

        def check(unit: UnitEntry = unit) -> list[Problem]:
            report = finished(unit.name, folder)
            if report is None or report.sha256 != unit.sha256:
                return [Problem(unit.name, f"{unit.name}{MARKER} is missing or does not match the unit")]
            return []

        problems += _check(folder, f"{unit.name}{MARKER}", (), check)
    same = index.hash == sha256_json([[unit.name, unit.sha256] for unit in index.units])
    if not same or sum(unit.written for unit in index.units) != index.written:
        problems.append(_miscounted(index))
    return problems


def _miscounted(index: Totals) -> Problem:
    return Problem(INDEX_FILE, f"its {index.written} samples or its hash do not match the units that it lists")


def _unknown_files(folder: Path, known: Collection[str]) -> list[Problem]:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [
        Problem(file, "this file is not in index.json") for file in files if file not in {*known, INDEX_FILE, RECORD}
    ]


def _duplicates(names: Sequence[str], values: Callable[[str], Any], what: str) -> list[Problem]:
    """Finds duplicate values: the first ten, and the number of the others."""
    shown: list[Problem] = []
    count = 0
    for rows in find_duplicates(hashes(values(name)) for name in names):
        count += len(rows)
        for part, row, first_part, first_row in rows[: max(0, 10 - len(shown))].tolist():
            first = values(names[first_part])[first_row]
            shown.append(Problem(names[part], f"the {what} of row {row} is that of {first} in {names[first_part]}"))
    if count > len(shown):
        shown.append(Problem("…", f"{count - len(shown)} more duplicates"))
    return shown
