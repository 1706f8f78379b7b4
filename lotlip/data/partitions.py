"""Partitions, the output of ingest and caption: a tar of images, tables of captions, and a marker per finished unit.

A partition `train/part-00000` consists of `train/part-00000.tar` and `.parquet` (ingest), or of `.parquet` alone (a
captioner), and of its report, `train/part-00000.json`. The report is written last: if it exists, the partition is
complete. A unit of ingest with items of several splits becomes one partition per split; the one of the first of
`SPLITS` gets its report last, which marks the whole unit as complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lotlip.core.files import atomic_write, remove, sha256_files, write_json
from lotlip.core.record import read_record
from lotlip.data.records import KEY_PATTERN, SPLITS, Caption, Failure, ImageRecord, ItemWarning, Unit, UnitReport
from lotlip.data.tars import TarWriter

if TYPE_CHECKING:
    import pandas as pd

MARKER = ".json"

# `offset` and `size` give the position of the image's bytes in the tar, so that a shard can pick images at random.
RECORDS = pa.schema(
    [
        ("key", pa.string()),
        ("extension", pa.string()),
        ("short_caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("scene", pa.string()),  # JSON; null if the source does not know the picture's content
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)

# The columns from `words` on are null in captions that were not measured: see `MeasuredCaption`.
CAPTIONS = pa.schema(
    [
        ("key", pa.string()),
        ("captioner", pa.string()),
        ("text", pa.string()),
        ("sub_captions", pa.list_(pa.string())),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("revision", pa.string()),
        ("prompt", pa.string()),
        ("words", pa.int32()),
        ("repetition", pa.float64()),
        ("truncated", pa.bool_()),
        ("control", pa.int32()),
        ("mojibake", pa.int32()),
        ("refusal", pa.string()),
        ("reasoning", pa.string()),
        ("agreement", pa.float64()),
        ("own_agreement", pa.float64()),
        ("next_agreement", pa.float64()),
    ]
)


# --- ingest -------------------------------------------------------------------------------------------------------


def write_partitions(
    unit: Unit, items: Iterable[ImageRecord | Failure], folder: Path, split_of: Callable[[str], str]
) -> list[UnitReport]:
    """Writes a unit's images and tables, one partition per split; only one image is in memory at a time.

    Args:
        unit: that was read.
        items: as `Source.read` gives them.
        folder: of the stage.
        split_of: key → split; not called if the unit has a split.

    Returns:
        A report for each split of the unit that has items, in the order of `SPLITS`; the first split always has one.

    Raises:
        ValueError: a key is not valid.
        AssertionError: a unit with a split yields another number of items than it has.
    """
    splits = SPLITS if unit.split is None else (unit.split,)
    for split in splits:
        remove(folder / f"{unit.partition(split)}{MARKER}", ours=is_marker)
    with ExitStack() as stack:
        writers: dict[str, _Partition] = {}
        for item in items:
            split = split_of(item.key) if unit.split is None else unit.split
            if split not in writers:
                writers[split] = stack.enter_context(_Partition(folder / unit.partition(split)))
            writers[split].add(item)
        if splits[0] not in writers:
            writers[splits[0]] = stack.enter_context(_Partition(folder / unit.partition(splits[0])))
    reports = []
    for split in reversed([split for split in splits if split in writers]):
        written = writers[split]
        read = written.read if unit.split is None else len(unit.items)
        name, failures = unit.partition(split), written.failures
        reports.append(_finish(name, folder, read, len(written.rows), failures, written.files, written.warnings))
    return reports[::-1]


class _Partition(AbstractContextManager["_Partition"]):
    """The tar and table of one split of a unit; they are complete when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        self.files = [path.with_name(f"{path.name}{ending}") for ending in (".tar", ".parquet")]
        self.rows: list[dict[str, Any]] = []
        self.failures: list[Failure] = []
        self.warnings: list[ItemWarning] = []

    def __enter__(self) -> _Partition:
        self._stack = ExitStack()
        tar, self._table = (self._stack.enter_context(atomic_write(path)) for path in self.files)
        self._tar = self._stack.enter_context(TarWriter(self._stack.enter_context(tar.open("wb"))))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            pq.write_table(pa.Table.from_pylist(self.rows, RECORDS), self._table)
        return self._stack.__exit__(*error)

    @property
    def read(self) -> int:
        return len(self.rows) + len(self.failures)

    def add(self, item: ImageRecord | Failure) -> None:
        if isinstance(item, Failure):
            self.failures.append(item)
        else:
            self.rows.append(_row(item, self._tar))
            self.warnings += item.warnings


def link_partition(folder: Path, report: UnitReport, out: Path, dropped: Mapping[int, tuple[str, str]]) -> UnitReport:
    """Links a finished partition of images into another folder, without some of its rows.

    Args:
        folder: with the partition.
        report: of the partition.
        out: the other folder.
        dropped: row → kind and reason of the `Failure` that it becomes.

    Returns:
        The report of the new partition.
    """
    name = report.name
    files = [out / f"{name}.tar", out / f"{name}.parquet"]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    _link(folder / f"{name}.tar", files[0])
    if not dropped:
        _link(folder / f"{name}.parquet", files[1])
        write_json(out / f"{name}{MARKER}", asdict(report))
        return report
    table = pq.read_table(folder / f"{name}.parquet")
    keep = np.ones(len(table), dtype=bool)
    keep[list(dropped)] = False
    with atomic_write(files[1]) as partial:
        pq.write_table(table.filter(pa.array(keep)), partial)
    rows = table.select(["key", "extension"]).take(sorted(dropped)).to_pylist()
    failures = [
        Failure(row["key"], f"{name}.tar: {row['key']}.{row['extension']}", reason, kind)
        for row, (_, (kind, reason)) in zip(rows, sorted(dropped.items()), strict=True)
    ]
    dropped_keys = {failure.key for failure in failures}
    warnings = [warning for warning in report.warnings if warning.key not in dropped_keys]
    return _finish(name, out, report.read, int(keep.sum()), [*report.failures, *failures], files, warnings)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without links
        shutil.copyfile(source, target)


def finished_unit(unit: Unit, folder: Path) -> list[UnitReport] | None:
    """The reports of a unit that `write_partitions` completed; None if it did not."""
    if unit.split is not None:
        report = finished(unit.name, folder)
        return None if report is None else [report]
    reports = [report for split in SPLITS if (report := finished(unit.partition(split), folder))]
    return reports if reports and reports[0].name == unit.partition(SPLITS[0]) else None


def _row(record: ImageRecord, tar: TarWriter) -> dict[str, Any]:
    if not KEY_PATTERN.fullmatch(record.key):
        raise ValueError(f"{record.key!r} is not a valid key: sources must use only letters, digits, _ and -")
    offset = tar.add(f"{record.key}.{record.extension}", record.image)
    scene = None if record.scene is None else json.dumps(record.scene, sort_keys=True, allow_nan=False)
    row = {name: getattr(record, name) for name in ("key", "extension", "short_caption", "width", "height", "sha256")}
    return {**row, "scene": scene, "offset": offset, "size": len(record.image)}


def read_table(folder: Path, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A unit's table; ingest's units have the columns of `RECORDS`."""
    return pq.read_table(folder / f"{name}.parquet", columns=None if columns is None else list(columns)).to_pandas()


def read_image(folder: Path, name: str, offset: int, size: int) -> bytes:
    """One image's bytes, from their position in the unit's tar."""
    with (folder / f"{name}.tar").open("rb") as file:
        file.seek(offset)
        return file.read(size)


def stored_images(
    folder: Path, units: Iterable[str], column: str = "key"
) -> Iterator[tuple[str, Any, Callable[[], bytes]]]:
    """For each image of some of ingest's units: its key, another column's value, and a function that reads it."""
    for unit in units:
        table = read_table(folder, unit, list(dict.fromkeys(["key", "offset", "size", column])))
        for key, value, at, size in zip(table["key"], table[column], table["offset"], table["size"], strict=True):
            yield key, value, partial(read_image, folder, unit, int(at), int(size))


def read_records(folder: Path, name: str) -> Iterator[ImageRecord]:
    """A unit's images with their short captions, in order; only one is in memory at a time."""
    rows = read_table(folder, name).to_dict("records")
    with (folder / f"{name}.tar").open("rb") as file:
        for row in rows:
            file.seek(row.pop("offset"))
            image = file.read(row.pop("size"))
            scene = row.pop("scene")
            known = json.loads(scene) if isinstance(scene, str) else None
            yield ImageRecord(**{str(name): value for name, value in row.items()}, image=image, scene=known)


# --- caption ------------------------------------------------------------------------------------------------------


def write_captions(
    name: str, items: Iterable[Caption | Failure], read: int, folder: Path, schema: pa.Schema = CAPTIONS
) -> UnitReport:
    """Writes the captions of a unit.

    Args:
        name: of the unit, as in ingest.
        items: as `Captioner.caption` yields them, or captions with their measures.
        read: number of images that the captioner got.
        folder: of the captioner.
        schema: the columns.

    Raises:
        AssertionError: `items` does not have one entry per image.
    """
    path = folder / f"{name}.parquet"
    remove(folder / f"{name}{MARKER}", ours=is_marker)
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    for item in items:
        if isinstance(item, Failure):
            failures.append(item)
        else:
            rows.append(vars(item))  # `asdict` would copy the lists
    with atomic_write(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial)
    return _finish(name, folder, read, len(rows), failures, [path])


def read_captions(folder: Path, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A unit's captions, with the columns of `CAPTIONS`; sub-captions are lists."""
    table = read_table(folder, name, columns)
    if "sub_captions" in table:
        import pandas as pd

        table["sub_captions"] = pd.Series([list(parts) for parts in table["sub_captions"]], table.index, object)
    return table


# --- resuming units ---------------------------------------------------------------------------------------------------


def reuse_or_write(
    name: str,
    inputs: str | None,
    folder: Path,
    finished: Callable[[], list[UnitReport] | None],
    write: Callable[[], list[UnitReport]],
) -> list[UnitReport]:
    """Returns the reports of a finished unit whose inputs are unchanged; otherwise writes the unit.

    The hash of the inputs is kept beside the outputs, not in them: published files must not depend on the times of
    files.

    Args:
        name: of the unit.
        inputs: a hash of the unit's inputs, taken before it is written; None: unknown, so the unit is written.
        folder: of the unit's outputs.
        finished: returns the reports of the unit's outputs if they are complete.
        write: writes the outputs and returns their reports.
    """
    record = _record_of_inputs(name, folder)
    if inputs is not None and inputs == recorded_inputs(name, folder) and (reports := finished()):
        return reports
    remove(record)
    reports = write()
    if inputs is not None:
        write_json(record, inputs)  # last: after an interruption before this line the unit is written again
    return reports


def recorded_inputs(name: str, folder: Path) -> str | None:
    """The hash of the inputs that a unit in a folder was last written from; None if unknown."""
    record = _record_of_inputs(name, folder)
    return read_record(record, str) if record.is_file() else None


def _record_of_inputs(name: str, folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-inputs") / f"{name}.json"


# --- markers ------------------------------------------------------------------------------------------------------


def _finish(
    name: str,
    folder: Path,
    read: int,
    written: int,
    failures: list[Failure],
    files: Sequence[Path],
    warnings: Sequence[ItemWarning] = (),
) -> UnitReport:
    size = sum(file.stat().st_size for file in files)
    report = UnitReport(name, read, written, sha256_files(files), size, failures, list(warnings))
    write_json(folder / f"{name}{MARKER}", asdict(report))
    return report


def finished(name: str, folder: Path) -> UnitReport | None:
    """The report of a complete partition; None if the partition is not complete."""
    marker = folder / f"{name}{MARKER}"
    return read_record(marker, UnitReport) if marker.is_file() else None


def is_marker(path: Path) -> bool:
    """Whether a file is the report of a partition or shard."""
    try:
        read_record(path, UnitReport)
    except ValueError:
        return False
    return True


def unit_names(folder: Path, split: str | None = None) -> list[str]:
    """Names of the finished units of a split (of all splits if None), sorted."""
    markers = folder.glob(f"{split or '*'}/part-*{MARKER}")
    return sorted(marker.relative_to(folder).as_posix().removesuffix(MARKER) for marker in markers)
