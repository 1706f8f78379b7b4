"""The benchmark of scale writes consistent bookkeeping, and each part processes all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import PARTS, deduplicate, growth, measure_size, plan_shards, table, write_bookkeeping
from lotlip.data.images import decode_rgb
from lotlip.data.index import CaptionIndex, UnitIndex, read_index
from lotlip.data.partitions import stored_images, unit_names

ROWS, PARTITIONS = 240, 6
COPIES = 6  # two of 40 images in each of the partitions after test, val and the first one of train


@pytest.mark.slow
def test_the_bookkeeping_is_that_of_real_images_and_copies_are_found(tmp_path: Path) -> None:
    assert write_bookkeeping(tmp_path, ROWS, PARTITIONS) == {"rows": ROWS, "partitions": PARTITIONS}
    assert deduplicate(tmp_path) == {"rows": ROWS, "partitions": PARTITIONS, "copies": COPIES}
    index = read_index(tmp_path / "ingest", UnitIndex)
    assert index.failure_kinds == {"duplicate": COPIES // 2, "duplicate-image": COPIES // 2}
    assert read_index(tmp_path / "captions", CaptionIndex).written == ROWS
    images = list(stored_images(tmp_path / "ingest", unit_names(tmp_path / "ingest"), "sha256"))
    assert len(images) == ROWS - COPIES
    for _, sha256, read in images:
        assert hashlib.sha256(read()).hexdigest() == sha256
        assert decode_rgb(read()).size == (8, 8)
    assert plan_shards(tmp_path) == {"rows": ROWS - COPIES - 2 * ROWS // PARTITIONS, "shards": 1}


@pytest.mark.system
def test_each_part_is_measured_and_processes_all_rows(tmp_path: Path) -> None:
    size = measure_size(tmp_path, ROWS, PARTITIONS)
    assert (size["rows"], size["partitions"]) == (ROWS, PARTITIONS)
    parts = size["parts"]
    assert parts.keys() == PARTS.keys()
    assert all(part["seconds"] > 0 and part["cpu_seconds"] > 0 and part["peak_mb"] > 10 for part in parts.values())
    assert all(parts[name]["partitions"] == PARTITIONS for name in ("ingest: plan", "Prefect: units"))
    assert parts["ingest: gate"]["rows"] == parts["ingest: deduplication"]["rows"] - COPIES == ROWS - COPIES
    assert parts["caption: gate"]["rows"] == parts["Prefect: units"]["rows"] == ROWS
    files = 3 * PARTITIONS + 1  # a tar, a table and a report for each, and index.json
    assert {parts[name]["files"] for name in parts if name.startswith("dvc")} == {files}
    assert not list(tmp_path.iterdir())


def test_growth_is_the_exponent_between_the_two_largest_sizes() -> None:
    def size(rows: int, seconds: float) -> dict[str, Any]:
        part = {"seconds": 2 * seconds, "cpu_seconds": seconds, "peak_mb": 1234.5}
        return {"rows": rows, "partitions": rows // 1000, "parts": dict.fromkeys(PARTS, part)}

    sizes = [size(10_000, 1), size(100_000, 2), size(1_000_000, 200)]
    assert growth(sizes, "ingest: gate") == pytest.approx(2)
    lines = table(sizes).splitlines()
    assert "| ingest: gate | 1.0 (2.0) | 2.0 (4.0) | 200.0 (400.0) | 100.00, 20.00, 200.00 | 2.00 |" in lines
    assert "| Prefect: units | 1,234 | 1,234 | 1,234 |" in lines
    assert lines[0].startswith("| CPU time (wall time), s | 0.01 M | 0.1 M | 1 M |")
