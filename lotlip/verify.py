"""Looks a finished folder over again, file by file and sample by sample: `lotlip verify`."""

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
    """Something that is not as it should be.

    Attributes:
        where: the unit, shard or file.
        what: what is wrong with it.
    """

    where: str
    what: str


class Contents(NamedTuple):
    """A folder that is looked over.

    Attributes:
        kind: "images", "captions" or "shards".
        units: how many there are to look at.
        samples: in them, as index.json says.
        problems: finds them, a unit at a time; gives an empty list for a unit that is in order.
    """

    kind: str
    units: int
    samples: int
    problems: Iterator[list[Problem]]


def verify(folder: Path, held_out: Collection[str] = ()) -> Contents:
    """Looks over what ingest, a captioner or the shard stage left.

    Every file is compared with its hash, every image is opened, every sample's texts and feature are read, keys and
    images are compared with all others, and files that index.json does not know are told. Memory is that of a unit.

    Args:
        folder: of the stage; it has an index.json.
        held_out: hashes of images that must not be among those trained on.

    Raises:
        ValueError: it has no index.json, or one of another kind.
    """
    index = _index(folder)
    if isinstance(index, ShardIndex):
        return Contents("shards", len(index.shards) + 1, index.written, _shards(folder, index, held_out))
    kind, found = "captions", _captions(folder, index)
    if any((folder / f"{unit.name}.tar").is_file() for unit in index.whole):
        kind, found = "images", _images(folder, index, held_out)
    return Contents(kind, len(index.whole) + 1, index.written, found)


def _index(folder: Path) -> ShardIndex | UnitIndex:
    """The index of a folder of any kind, which is known by the fields that it alone has."""
    path = folder / INDEX_FILE
    kinds: dict[str, type[ShardIndex] | type[UnitIndex]] = {
        "splits": ShardIndex,
        "quality": CaptionIndex,
        "units": UnitIndex,
    }
    fields = read_json(path) if path.is_file() else kinds  # where there is none, `read_index` says so
    kind = next((kind for field, kind in kinds.items() if field in fields), None)
    if kind is None:
        raise ValueError(f"{path} is not of ingest, of a captioner or of shards")
    return read_index(folder, kind)


# What damaged files raise in the libraries that read them.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, EOFError, tarfile.TarError)


def _look(folder: Path, name: str, endings: Sequence[str], look: Callable[[], list[Problem]]) -> list[Problem]:
    """The problems of a unit; that it cannot be read is one of them."""
    try:
        return look()
    except _UNREADABLE as error:
        file = next((f"{name}{ending}" for ending in endings if not _readable(folder / f"{name}{ending}")), name)
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
    whole = [name for name in names if _has_table(folder, name)]
    own = held_out_images(folder, whole) | set(held_out)
    endings = (".tar", ".parquet")
    for unit in index.whole:

        def look(unit: UnitEntry = unit) -> list[Problem]:
            row = inspect_partition(folder, unit.name, unit.written, own, sample_size=None)
            return _problems(unit.name, row | _hash_off(folder, unit, endings), (HASH, *PARTITION))

        yield _look(folder, unit.name, endings, look)
    last = _index_problems(folder, index, {f"{name}{end}" for name in names for end in (*endings, MARKER)})
    last += _again(whole, lambda name: read_table(folder, name, ["key"])["key"], "key")
    last += _again(whole, lambda name: read_table(folder, name, ["sha256"])["sha256"], "image")
    yield last


def _captions(folder: Path, index: UnitIndex) -> Iterator[list[Problem]]:
    names = [unit.name for unit in index.whole]
    for unit in index.whole:

        def look(unit: UnitEntry = unit) -> list[Problem]:
            row = inspect_captions(folder, unit.name, unit.written)
            return _problems(unit.name, row | _hash_off(folder, unit, (".parquet",)), (HASH, *CAPTIONS))

        yield _look(folder, unit.name, (".parquet",), look)
    whole = [name for name in names if _has_table(folder, name)]
    yield [
        *_index_problems(folder, index, {f"{name}{end}" for name in names for end in (".parquet", MARKER)}),
        *_again(whole, lambda name: read_table(folder, name, ["key"])["key"], "key"),
    ]


def _has_table(folder: Path, name: str) -> bool:
    return (folder / f"{name}.parquet").is_file() and _readable(folder / f"{name}.parquet")


def _shards(folder: Path, index: ShardIndex, held_out: Collection[str]) -> Iterator[list[Problem]]:
    whole: list[str] = []
    for shard in index.shards:

        def look(shard: ShardEntry = shard) -> list[Problem]:
            row = inspect_shard(folder, shard, index.features, held_out, sample_size=None)
            if row["places_off"] == 0:
                whole.append(shard.name)
            return _problems(shard.name, row, SHARD)

        def marker(shard: ShardEntry = shard) -> list[Problem]:
            report = finished_shard(shard.name, folder)
            if report is None or report.sha256 != shard.sha256:
                return [Problem(shard.name, f"{shard.name}{DONE} is missing, or of another file")]
            return []

        yield [
            *_look(folder, shard.name, (".tar", INDEX), look),
            *_look(folder, f"{shard.name}{DONE}", (), marker),
        ]
    known = {f"{shard.name}{end}" for shard in index.shards for end in (".tar", INDEX, IDS, DONE)}
    last = [] if sum(shard.samples for shard in index.shards) == index.written else [_miscounted(index)]
    yield [*last, *_strays(folder, known), *_again(whole, lambda name: read_keys(folder / f"{name}.tar"), "key")]


def _hash_off(folder: Path, unit: UnitEntry, endings: Sequence[str]) -> dict[str, int | None]:
    files = [folder / f"{unit.name}{ending}" for ending in endings]
    there = all(file.is_file() for file in files)
    return {"hash_off": int(sha256_files(files) != unit.sha256) if there else None}


def _problems(where: str, row: Mapping[str, Any], invariants: Sequence[Invariant]) -> list[Problem]:
    return [
        Problem(where, f"expected: {invariant.what}; found {row[invariant.column]:g}")
        for invariant in invariants
        if not invariant.holds(row[invariant.column])
    ]


def _index_problems(folder: Path, index: UnitIndex, known: Collection[str]) -> list[Problem]:
    """Where index.json differs from the units' own reports, and files that it does not know."""
    found = _strays(folder, known)
    for unit in index.whole:

        def look(unit: UnitEntry = unit) -> list[Problem]:
            report = finished(unit.name, folder)
            if report is None or report.sha256 != unit.sha256:
                return [Problem(unit.name, f"{unit.name}{MARKER} is missing, or of other files")]
            return []

        found += _look(folder, f"{unit.name}{MARKER}", (), look)
    same = index.hash == sha256_json([[unit.name, unit.sha256] for unit in index.units])
    if not same or sum(unit.written for unit in index.units) != index.written:
        found.append(_miscounted(index))
    return found


def _miscounted(index: Totals) -> Problem:
    return Problem(INDEX_FILE, f"its {index.written} samples or its hash are not those of what it lists")


def _strays(folder: Path, known: Collection[str]) -> list[Problem]:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [
        Problem(file, "index.json does not know this file")
        for file in files
        if file not in {*known, INDEX_FILE, RECORD}
    ]


def _again(names: Sequence[str], values: Callable[[str], Any], what: str) -> list[Problem]:
    """The first of the values that come again, and how many more there are."""
    shown: list[Problem] = []
    count = 0
    for found in find_duplicates(hashes(values(name)) for name in names):
        count += len(found)
        for part, row, first_part, first_row in found[: max(0, 10 - len(shown))].tolist():
            first = values(names[first_part])[first_row]
            shown.append(Problem(names[part], f"the {what} of row {row} is that of {first} in {names[first_part]}"))
    if count > len(shown):
        shown.append(Problem("…", f"{count - len(shown)} more come twice"))
    return shown
