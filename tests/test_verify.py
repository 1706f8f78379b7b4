"""`lotlip verify` passes a valid data set and reports each defect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lotlip.cli import app
from lotlip.core.files import RECORD
from lotlip.data.partitions import read_table
from lotlip.verify import verify
from tests.defects import World
from tests.test_defects import edit_sample, flip_bit, set_column, swap_places

FOLDERS = ("ingest", "captions/llava", "shards")


def reported_problems(folder: Path) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problems in verify(folder).problems for problem in problems]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_valid_data_set_has_no_problems(clean: World, folder: str) -> None:
    done = CliRunner().invoke(app, ["verify", str(clean.folder / folder)])
    assert done.exit_code == 0, done.output
    samples = {"ingest": "180 images", "captions/llava": "180 captions", "shards": "140 samples"}[folder]
    assert f"{clean.folder / folder}: {samples}, no problems" in done.stdout


def test_a_folder_without_a_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json does not exist"):
        verify(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by ingest, a captioner or the shard stage"):
        verify(tmp_path)


DEFECTS: dict[str, tuple[str, Callable[[World], Any], str]] = {
    "a changed table": (
        "ingest",
        lambda world: world.edit("ingest/val/part-00000", set_column("short_caption", "Other.")),
        "val/part-00000: expected: a unit's files have the hash that the index says; found 1",
    ),
    "swapped images": (
        "ingest",
        lambda world: world.edit("ingest/train/part-00000", swap_places),
        "train/part-00000: expected: the images in a partition's tar match the hashes in its table",
    ),
    "a missing tar": (
        "ingest",
        lambda world: (world.ingest / "test/part-00000.tar").unlink(),
        "test/part-00000: expected: a partition has its tar and its table; found 1",
    ),
    "a duplicate key": (
        "ingest",
        lambda world: world.edit("ingest/val/part-00000", set_column("key", "train-000003")),
        "val/part-00000: the key of row 0 is that of train-000003 in train/part-00000",
    ),
    "an unknown file": (
        "ingest",
        lambda world: (world.ingest / "train/part-00000.tar.partial").touch(),
        "train/part-00000.tar.partial: this file is not in index.json",
    ),
    "a missing report": (
        "captions/llava",
        lambda world: (world.captions("llava") / "val/part-00000.json").unlink(),
        "val/part-00000: val/part-00000.json is missing or does not match the unit",
    ),
    "changed captions": (
        "captions/llava",
        lambda world: world.edit("captions/llava/val/part-00000", set_column("text", " ")),
        "val/part-00000: expected: a partition has no empty caption; found 1",
    ),
    "a missing table of captions": (
        "captions/llava",
        lambda world: (world.captions("llava") / "val/part-00000.parquet").unlink(),
        "val/part-00000: expected: a partition has its table; found 1",
    ),
    "a flipped bit": (
        "shards",
        lambda world: flip_bit(world.shards / "val-000000.tar"),
        "val-000000: expected: a shard's file has the hash that the index says; found 1",
    ),
    "a rewritten shard": (
        "shards",
        edit_sample("train-000001", json=lambda content: content | {"raw": "Other."}),
        "train-000001: train-000001.done.json is missing or does not match the shard",
    ),
    "a missing index of a shard": (
        "shards",
        lambda world: (world.shards / "train-000001.index.arrow").unlink(),
        "train-000001: expected: a shard's .index.arrow gives the positions of its samples; found 1",
    ),
    "token ids with a flipped bit": (
        "shards",
        lambda world: flip_bit(world.shards / "val-000000.token-ids.arrow"),
        "val-000000: expected: a shard's .token-ids.arrow, if it has one, matches its samples' texts; found 1",
    ),
    "a wrong number of samples": (
        "shards",
        lambda world: world.index("train-000001", samples=12),
        "index.json: its 140 samples or its hash do not match the units that it lists",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "plant", "line"), DEFECTS.values(), ids=DEFECTS)
def test_verify_reports(world: World, folder: str, plant: Callable[[World], Any], line: str) -> None:
    plant(world)
    assert any(line in problem for problem in reported_problems(world.folder / folder)), reported_problems(
        world.folder / folder
    )


@pytest.mark.slow
def test_every_image_is_decoded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from lotlip.data import images

    decode, opened = images.decode_rgb, []
    monkeypatch.setattr(images, "decode_rgb", lambda data: opened.append(1) or decode(data))
    assert reported_problems(world.ingest) == []
    assert len(opened) == 180


@pytest.mark.slow
def test_held_out_images_are_searched(world: World, tmp_path: Path) -> None:
    benchmark = tmp_path / "benchmark"
    benchmark.mkdir()
    row = read_table(world.ingest, "train/part-00001", ["offset", "size"]).iloc[5]
    data = (world.ingest / "train/part-00001.tar").read_bytes()[row["offset"] :][: row["size"]]
    (benchmark / "7.png").write_bytes(data)
    shutil.copy(world.ingest / "train/part-00000.json", benchmark)  # not an image
    for folder in (world.ingest, world.shards):
        done = CliRunner().invoke(app, ["verify", str(folder), "--held-out", str(benchmark), "--json"])
        assert done.exit_code == 1
        (problem,) = json.loads(done.stdout)["problems"]
        assert problem["what"] == "expected: no training image is used for evaluation; found 1"
    done = CliRunner().invoke(app, ["verify", str(world.shards), "--held-out", str(world.ingest)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("folder", "first", "second"),
    [
        ("ingest", "train/part-00000.parquet", "test/part-00000.json"),
        ("captions/llava", "train/part-00000.parquet", "val/part-00000.json"),
        ("shards", "train-000000.tar", "train-000001.done.json"),
    ],
)
def test_every_unreadable_file_is_reported(world: World, folder: str, first: str, second: str) -> None:
    for name in (first, second):
        path = world.folder / folder / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    problems = reported_problems(world.folder / folder)
    assert any(first.rpartition(".")[0] in line for line in problems), problems
    assert any(second in line for line in problems), problems


@pytest.mark.slow
def test_the_record_of_a_stage_is_not_reported(world: World) -> None:
    (world.ingest / RECORD).write_text("{}")
    assert reported_problems(world.ingest) == []
