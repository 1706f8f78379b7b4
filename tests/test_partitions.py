"""Partitions are read as written, written atomically, and reproducible to the byte."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from lotlip.data.index import CaptionIndex, UnitIndex, read_index, write_index
from lotlip.data.partitions import (
    RECORDS,
    finished,
    finished_unit,
    read_captions,
    read_image,
    read_records,
    read_table,
    unit_names,
    write_captions,
    write_partitions,
)
from lotlip.data.records import Caption, Failure, ImageRecord, ItemWarning, Unit, UnitReport
from tests.partitions import write_partition


def record(key: str, shade: int = 0, scene: dict | None = None) -> ImageRecord:
    file = io.BytesIO()
    Image.new("RGB", (6 + shade, 5), (shade, 0, 0)).save(file, "png")
    image = file.getvalue()
    return ImageRecord(
        key, image, "png", f"shade “{shade}”", 6 + shade, 5, hashlib.sha256(image).hexdigest(), scene=scene
    )


def unit(count: int, index: int = 0, split: str = "train") -> Unit:
    return Unit(split, index, tuple(map(str, range(count))))


def caption(key: str, text: str = "One dog. Two cats.") -> Caption:
    return Caption(key, "llava", text, ["One dog", "Two cats"], 4, "stop", "r1", "Describe.")


BROKEN = Failure("k9", "k9.png", "the image is broken", "unreadable")


def test_records_are_read_as_written(tmp_path):
    records = [record("k0", 0, {"b": [1, {"c": None}], "a": "ä"}), record("k1", 30)]
    report = write_partition(unit(3), [records[0], BROKEN, records[1]], tmp_path)
    assert (report.name, report.read, report.written, report.failures) == ("train/part-00000", 3, 2, [BROKEN])
    assert list(read_records(tmp_path, report.name)) == records


def test_the_table_locates_each_image(tmp_path):
    records = [record(f"k{number}", number) for number in range(5)] + [record("long" * 60)]
    report = write_partition(unit(6), records, tmp_path)
    table = read_table(tmp_path, report.name)
    assert pq.read_schema(tmp_path / "train/part-00000.parquet") == RECORDS
    assert list(table["key"]) == [each.key for each in records]
    assert table["scene"].isna().all()
    for row, each in zip(table.itertuples(), records, strict=True):
        assert read_image(tmp_path, report.name, row.offset, row.size) == each.image
    assert list(read_table(tmp_path, report.name, ["key", "width"]).columns) == ["key", "width"]


def test_the_tar_is_a_valid_tar(tmp_path):
    records = [record("k0"), record("k1", 3)]
    write_partition(unit(2), records, tmp_path)
    path = tmp_path / "train/part-00000.tar"
    with tarfile.open(path) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == {
            "k0.png": records[0].image,
            "k1.png": records[1].image,
        }
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in tar} == {(0, 0, 0, 0o644)}
    assert [sample["__key__"] for sample in wds.WebDataset(str(path), shardshuffle=False)] == ["k0", "k1"]


def test_bytes_depend_on_the_items_only(tmp_path):
    records = [record("k0", 0, {"a": 1, "b": 2}), record("k1")]
    first = write_partition(unit(2), records, tmp_path / "first")
    records[0] = replace(records[0], scene={"b": 2, "a": 1})
    second = write_partition(unit(2), records, tmp_path / "second")
    assert first == second
    changed = write_partition(unit(2), [records[0], replace(records[1], short_caption="other")], tmp_path / "second")
    assert changed.sha256 != first.sha256
    assert first.bytes == sum(
        (tmp_path / f"first/train/part-00000{end}").stat().st_size for end in (".tar", ".parquet")
    )


def test_a_lost_item_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="lost without a reason"):
        write_partition(unit(2), [record("k0")], tmp_path)
    assert finished_unit(unit(2), tmp_path) is None


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "ä"])
def test_an_invalid_key_is_an_error(tmp_path, key):
    with pytest.raises(ValueError, match="is not a valid key"):
        write_partition(unit(1), [record(key)], tmp_path)


def test_an_interrupted_unit_writes_nothing_and_is_repeated(tmp_path):
    def broken() -> Iterator[ImageRecord]:
        yield record("k0")
        raise ConnectionError("the disk went away")

    with pytest.raises(ConnectionError):
        write_partition(unit(2), broken(), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    write_partition(unit(1), [record("k0")], tmp_path)
    with pytest.raises(ConnectionError):  # an interrupted repetition does not count as the first run
        write_partition(unit(2), broken(), tmp_path)
    assert finished_unit(unit(2), tmp_path) is None


def test_the_marker_is_the_report(tmp_path):
    assert finished_unit(unit(1), tmp_path) is None
    report = write_partition(unit(1), [record("k0")], tmp_path)
    assert finished_unit(unit(1), tmp_path) == [finished("train/part-00000", tmp_path)] == [report]


def test_a_unit_of_failures_can_be_read(tmp_path):
    report = write_partition(unit(1), [BROKEN], tmp_path)
    assert report.written == 0
    assert list(read_records(tmp_path, report.name)) == []


def test_a_unit_of_several_splits_writes_a_partition_for_each(tmp_path):
    keys = ["a0", "b1", "a2", "c3", "b4"]
    items: list[ImageRecord | Failure] = [record(key, number) for number, key in enumerate(keys[:4])]
    items.append(replace(BROKEN, key="b4"))
    whole_tar = Unit(None, 7, ("00007.tar",))

    def split(key: str) -> str:
        return {"a": "train", "b": "test", "c": "val"}[key[0]]

    assert finished_unit(whole_tar, tmp_path) is None
    reports = write_partitions(whole_tar, items, tmp_path, split)
    assert [(report.name, report.read, report.written) for report in reports] == [
        ("train/part-00007", 2, 2),
        ("val/part-00007", 1, 1),
        ("test/part-00007", 2, 1),
    ]
    assert list(read_records(tmp_path, "test/part-00007")) == [items[1]]
    assert finished_unit(whole_tar, tmp_path) == reports
    (tmp_path / "train/part-00007.json").unlink()  # a killed process has not written it, because it is the last one
    assert finished_unit(whole_tar, tmp_path) is None
    only_test = write_partitions(whole_tar, [items[1]], tmp_path, split)
    assert [(report.name, report.written) for report in only_test] == [("train/part-00007", 0), ("test/part-00007", 1)]
    assert unit_names(tmp_path) == ["test/part-00007", "train/part-00007"]


def test_warnings_are_stored_and_counted(tmp_path):
    warning = ItemWarning("k0", "k0.jpg", "it is a PNG", "renamed")
    report = write_partition(unit(1), [replace(record("k0"), warnings=(warning,))], tmp_path)
    assert finished(report.name, tmp_path).warnings == [warning]
    index = write_index(tmp_path, [report], UnitIndex)
    assert (index.warning_kinds, index.warnings[0].reason) == ({"renamed": 1}, "it is a PNG")


def test_units_are_named_in_order_and_by_split(tmp_path):
    for split, index in (("val", 0), ("train", 10), ("train", 2)):
        write_partition(unit(1, index, split), [record("k0")], tmp_path)
    write_index(tmp_path, [], UnitIndex)
    (tmp_path / "train/part-00011.parquet").touch()  # not finished without a report
    assert unit_names(tmp_path) == ["train/part-00002", "train/part-00010", "val/part-00000"]
    assert unit_names(tmp_path, "val") == ["val/part-00000"]
    assert unit_names(tmp_path, "test") == []


def test_captions_are_read_as_written(tmp_path):
    captions = [caption("k0"), replace(caption("k1", "Eins."), sub_captions=["Eins"], finish_reason="length")]
    report = write_captions("train/part-00000", [*captions, BROKEN], 3, tmp_path)
    assert (report.read, report.written, report.failures) == (3, 2, [BROKEN])
    names = [field.name for field in fields(Caption)]
    rows = read_captions(tmp_path, "train/part-00000", names).to_dict("records")
    assert [Caption(**row) for row in rows] == captions
    assert finished("train/part-00000", tmp_path) == report
    assert list(read_captions(tmp_path, "train/part-00000", ["tokens"]).columns) == ["tokens"]


def test_a_captioner_that_skips_an_image_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="lost without a reason"):
        write_captions("train/part-00000", [caption("k0")], 2, tmp_path)


def report_of(index: int, sha256: str, failed: int = 0) -> UnitReport:
    failures = [Failure(f"k{number}", "here", "why", "empty" if number % 2 else "missing") for number in range(failed)]
    return UnitReport(f"train/part-{index:05d}", 10 + failed, 10, sha256, 5, failures)


def test_the_index_has_totals_and_is_reproducible(tmp_path):
    reports = [report_of(0, "a", 3), report_of(1, "b", 200)]
    index_written = write_index(tmp_path, reports, CaptionIndex, revision="r1")
    assert index_written == read_index(tmp_path, CaptionIndex)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["units"][1] == {"name": "train/part-00001", "written": 10, "bytes": 5, "sha256": "b"}
    assert (index["read"], index["written"], index["failed"]) == (223, 20, 203)
    assert index["failure_kinds"] == {"empty": 101, "missing": 102}
    assert len(index["failures"]) == 100
    assert index["failures"][0] == {"key": "k0", "where": "here", "reason": "why", "kind": "missing"}
    assert index["revision"] == "r1"
    first = (tmp_path / "index.json").read_bytes()
    write_index(tmp_path, reports, CaptionIndex, revision="r1")
    assert (tmp_path / "index.json").read_bytes() == first


def test_the_index_hash_changes_with_any_unit(tmp_path):
    hashes = [
        write_index(tmp_path, reports, UnitIndex).hash
        for reports in (
            [report_of(0, "a"), report_of(1, "b")],
            [report_of(0, "a"), report_of(1, "c")],
            [report_of(0, "a")],
            [report_of(0, "b"), report_of(1, "a")],
        )
    ]
    assert len(set(hashes)) == 4


def test_a_missing_index_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"index\.json does not exist.*dvc repro"):
        read_index(tmp_path, UnitIndex)
