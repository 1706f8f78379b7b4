"""Deduplication: repeated values in memory or on disk, and which image is kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lotlip.core.console import explain
from lotlip.data.duplicates import count_duplicates, find_duplicates, hashes, unique_partitions
from lotlip.data.partitions import finished, read_records, read_table
from lotlip.data.records import Failure, ImageRecord, ItemWarning, Unit, UnitReport
from tests.partitions import write_partition


def repeats_of(parts: list[list[int]]) -> list[list[int]]:
    return sorted(
        row for rows in find_duplicates(np.array(part, dtype=np.uint64) for part in parts) for row in rows.tolist()
    )


def test_all_but_the_first_of_equal_values_are_found():
    assert repeats_of([[7, 8, 7], [], [9, 8, 7], [2**64 - 1]]) == [[0, 2, 0, 0], [2, 1, 0, 1], [2, 2, 0, 0]]
    assert repeats_of([]) == repeats_of([[]]) == repeats_of([[1, 2]]) == []


def test_masked_values_are_ignored():
    parts = [
        np.ma.masked_array(np.array(part, dtype=np.uint64), [True, False, False]) for part in ([7, 7, 8], [8, 7, 7])
    ]
    assert sorted(row for rows in find_duplicates(parts) for row in rows.tolist()) == [[1, 1, 0, 1], [1, 2, 0, 1]]
    assert count_duplicates(parts) == 2


@pytest.mark.slow
def test_repeats_agree_with_numpy():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 3000, 500, dtype=np.uint64) for _ in range(500)]
    values, first = np.unique(np.concatenate(parts), return_index=True)
    first_of = dict(zip(values.tolist(), first.tolist(), strict=True))
    expected = [
        [*divmod(place, 500), *divmod(first_of[value], 500)]
        for place, value in enumerate(np.concatenate(parts).tolist())
        if first_of[value] != place
    ]
    assert repeats_of([part.tolist() for part in parts]) == expected
    assert count_duplicates(iter(parts)) == len(expected)
    assert count_duplicates([]) == 0


@pytest.mark.integration
def test_large_inputs_use_temporary_files_that_are_removed(tmp_path):
    """Two million values take more than the 64 MB that DuckDB gets here."""
    code = (
        "import numpy as np, lotlip.data.duplicates as r; r.MEMORY, r.THREADS = '64MB', 1; "
        "part = lambda n: np.random.default_rng(n).integers(0, 2**63, 500_000, dtype=np.uint64); "
        "print(sum(map(len, r.find_duplicates(part(n // 2) for n in range(8)))))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "2000000\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_folder_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr("lotlip.data.duplicates.MEMORY", "16MB")
    small = {"max_temp_directory_size": "1MB"}  # DuckDB raises the error of a full disk
    monkeypatch.setattr(
        duckdb, "connect", lambda name, config, connect=duckdb.connect: connect(name, config=config | small)
    )
    with pytest.raises(OSError, match="No space left") as full:
        count_duplicates(np.random.default_rng(n).integers(0, 2**63, 100_000, dtype=np.uint64) for n in range(50))
    assert full.value.filename == tempfile.gettempdir()
    assert "set TMPDIR" in explain(full.value)


def test_hashes_of_different_values_differ():
    assert len(np.unique(hashes(pd.Series(["a", "b", "a", None])))) == 3


# --- partitions ---------------------------------------------------------------------------------------------------


def record(key: str, shade: int) -> ImageRecord:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "png")
    warning = ItemWarning(key, f"{key}.jpg", "it is a PNG", "renamed")
    return ImageRecord(
        key, file.getvalue(), "png", key, 4, 4, hashlib.sha256(file.getvalue()).hexdigest(), warnings=(warning,)
    )


def write(folder: Path, units: dict[str, list[ImageRecord | Failure]]) -> list[UnitReport]:
    reports = []
    for name, items in units.items():
        split, _, index = name.partition("/")
        reports.append(write_partition(Unit(split, int(index), tuple(map(str, range(len(items))))), items, folder))
    return reports


def keys(folder: Path, name: str) -> list[str]:
    return list(read_table(folder, name, ["key"])["key"])


@pytest.mark.slow
def test_of_equal_images_the_held_out_or_first_one_is_kept(tmp_path):
    units = {
        "train/0": [record("a", 1), record("b", 2), record("c", 3)],
        "train/1": [record("d", 2), record("e", 4), record("f", 4)],
        "val/0": [record("g", 3)],
        "test/0": [record("h", 4)],
    }
    reports = write(tmp_path / "units", units)
    unique = unique_partitions(tmp_path / "units", reports, tmp_path / "out", {})
    assert [report.name for report in unique] == [report.name for report in reports]
    assert keys(tmp_path / "out", "train/part-00000") == ["a", "b"]
    assert keys(tmp_path / "out", "train/part-00001") == []
    assert keys(tmp_path / "out", "val/part-00000") == ["g"]
    assert keys(tmp_path / "out", "test/part-00000") == ["h"]
    (lost,) = unique[0].failures
    assert (lost.key, lost.kind, lost.where) == ("c", "duplicate-image", "train/part-00000.tar: c.png")
    assert lost.reason == "it is the same image as g in val/part-00000"
    assert [failure.reason for failure in unique[1].failures] == [
        "it is the same image as b in train/part-00000",
        "it is the same image as h in test/part-00000",
        "it is the same image as h in test/part-00000",
    ]
    assert (unique[1].read, unique[1].written, unique[1].warnings) == (3, 0, [])
    assert [warning.key for warning in unique[0].warnings] == ["a", "b"]
    assert [finished(report.name, tmp_path / "out") for report in unique] == unique
    assert [one.image for one in read_records(tmp_path / "out", "train/part-00000")] == [
        one.image for one in units["train/0"][:2]
    ]


def test_a_copy_of_a_dropped_row_is_kept(tmp_path):
    reports = write(
        tmp_path / "units", {"train/0": [record("a", 1)], "train/1": [record("a", 2)], "train/2": [record("b", 2)]}
    )
    unique = unique_partitions(tmp_path / "units", reports, tmp_path / "out", {})
    assert [report.written for report in unique] == [1, 0, 1]
    assert unique[1].failures[0].reason == "its key is taken by a in train/part-00000"


@pytest.mark.slow
def test_the_table_of_originals_is_read_once_however_many_copies_there_are(tmp_path, monkeypatch):
    units = {f"train/{part}": [record(f"original-{part}", part)] for part in range(10)}
    units |= {f"train/{part}": [record(f"copy-{part}-{n}", n) for n in range(10)] for part in (10, 11)}
    reports = write(tmp_path / "units", units)
    reads: Counter[str] = Counter()

    def counted(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
        reads[name] += columns == ["key"]
        return read_table(folder, name, columns)

    monkeypatch.setattr("lotlip.data.duplicates.read_table", counted)
    unique = unique_partitions(tmp_path / "units", reports, tmp_path / "out", {})
    assert [report.written for report in unique] == [1] * 10 + [0, 0]
    assert unique[11].failures[9].reason == "it is the same image as original-9 in train/part-00009"
    assert reads == {f"train/part-{part:05d}": 2 if part < 10 else 1 for part in range(12)}  # 1: compares the keys


def test_an_image_of_an_evaluation_set_is_dropped_from_training(tmp_path):
    units = {"train/0": [record("a", 1), record("b", 2)], "test/0": [record("c", 3)]}
    evaluation = {units["train/0"][1].sha256: "urban/7.png", units["test/0"][0].sha256: "urban/8.png"}
    unique = unique_partitions(tmp_path / "units", write(tmp_path / "units", units), tmp_path / "out", evaluation)
    (lost,) = unique[0].failures
    assert (lost.key, lost.kind, lost.reason) == ("b", "evaluation", "it is in an evaluation set: urban/7.png")
    assert keys(tmp_path / "out", "test/part-00000") == ["c"]  # the test split keeps it


@pytest.mark.slow
def test_units_are_unchanged_so_that_deduplication_can_be_repeated(tmp_path):
    units = {"train/0": [record("a", 1)], "train/1": [record("b", 1)]}
    reports = write(tmp_path / "units", units)
    lost = UnitReport("part-00009", 1, 0, "", 0, [Failure("part-00009", "9.tar", "gone", "unit")])
    before = {path: path.read_bytes() for path in (tmp_path / "units").rglob("*") if path.is_file()}
    first = unique_partitions(tmp_path / "units", [*reports, lost], tmp_path / "out", {})
    assert unique_partitions(tmp_path / "units", [*reports, lost], tmp_path / "again", {}) == first
    assert first[-1] == lost
    assert {path: path.read_bytes() for path in (tmp_path / "units").rglob("*") if path.is_file()} == before
    assert json.loads((tmp_path / "out/train/part-00001.json").read_text())["written"] == 0
