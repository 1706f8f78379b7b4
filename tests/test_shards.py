"""Shards: every sample once, with all that is known of it, and the same bytes at every run."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image

from lotlip.data.index import ShardIndex, UnitIndex, read_index, write_index
from lotlip.data.partitions import finished, unit_names, write_captions
from lotlip.data.records import Caption, Failure, ImageRecord, Unit, UnitReport
from lotlip.data.tars import index_path, scan_tar
from lotlip.shard import shards
from lotlip.shard.shards import (
    ShardPlan,
    finished_shard,
    group_reader,
    plan_shards,
    shard_statistics,
    write_shard,
    write_shard_index,
)
from tests.partitions import write_partition

PARTITIONS = {"train": 3, "val": 1}
PER_PARTITION = 4


@dataclass
class World:
    """Three partitions to train on and one to validate, with two captioners, one of which misses an image."""

    ingest: Path
    captions: dict[str, Path]
    images: dict[str, bytes]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def caption(key: str, captioner: str, sub_captions: list[str]) -> Caption:
    text = ". ".join(sub_captions)
    return Caption(key, captioner, text, sub_captions, len(text.split()), "stop", "r", "")


@pytest.fixture
def world(tmp_path) -> World:
    ingest, llava, gpt = (tmp_path / name for name in ("ingest", "llava", "gpt"))
    images: dict[str, bytes] = {}
    reports: dict[Path, list[UnitReport]] = {llava: [], gpt: []}
    for split, count in PARTITIONS.items():
        for index in range(count):
            keys = [f"{split}-{index}-{number}" for number in range(PER_PARTITION)]
            records = []
            for key in keys:
                images[key] = png(len(images))
                sha256 = hashlib.sha256(images[key]).hexdigest()
                records.append(ImageRecord(key, images[key], "png", f"Raw {key}. Ä.", 4, 4, sha256))
            unit = Unit(split, index, tuple(keys))
            write_partition(unit, records, ingest)
            found = [caption(key, "llava", [f"l {key}", "two"]) for key in keys]
            reports[llava].append(write_captions(unit.name, found, 4, llava))
            missing = Failure("train-0-0", "gpt.csv", "no row", "missing")
            found = [missing if key == "train-0-0" else caption(key, "gpt", [f"g {key}"]) for key in keys]
            reports[gpt].append(write_captions(unit.name, found, 4, gpt))
    for folder, own in reports.items():
        write_index(folder, own, UnitIndex)
    return World(ingest, {"llava": llava, "gpt": gpt}, images)


def plans(world: World, split: str = "train", size: int = 5, seed: int = 0) -> list[ShardPlan]:
    return plan_shards(world.ingest, world.captions, split, size, seed)


def redness(pictures: list[Image.Image]) -> np.ndarray:
    """A feature that tells which picture it is of."""
    return np.array([[picture.getpixel((0, 0))[0], 1.0] for picture in pictures], dtype=np.float32)


def write(world: World, folder: Path, plan: ShardPlan, features: Callable | None = redness, batch_size: int = 2):
    return write_shard(plan, group_reader(world.ingest, world.captions)(plan.partitions), folder, features, batch_size)


def samples(world: World, plan: ShardPlan) -> list[tuple[str, str]]:
    """The partition and key of each sample of a plan, in the shard's order."""
    with TemporaryDirectory() as folder:
        write(world, Path(folder), plan, features=None)
        return [(partition_of(key), key) for key in read(Path(folder, f"{plan.name}.tar"))]


def partition_of(key: str) -> str:
    split, index, _ = key.split("-")
    return f"{split}/part-{int(index):05d}"


def read(path: Path) -> dict[str, dict[str, bytes]]:
    return {sample["__key__"]: sample for sample in wds.WebDataset(str(path), shardshuffle=False)}


def test_a_plan_has_every_sample_of_its_split_once(world):
    planned = plans(world)
    assert [plan.name for plan in planned] == ["train-000000", "train-000001", "train-000002"]
    assert list(map(len, planned)) == [5, 5, 2]
    found = [key for plan in planned for _, key in samples(world, plan)]
    assert sorted(found) == sorted(key for key in world.images if key.startswith("train"))


def test_a_plan_depends_on_the_seed_alone_and_mixes_partitions(world):
    assert plans(world) == plans(world)
    orders = [[key for _, key in samples(world, plans(world, seed=seed)[0])] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len({name for name, _ in samples(world, plans(world)[0])}) > 1


def test_a_shard_draws_from_a_bounded_number_of_partitions(world, monkeypatch):
    monkeypatch.setattr(shards, "MIXED_PARTITIONS", 1)
    planned = plans(world, size=PER_PARTITION)
    drawn = [samples(world, plan) for plan in planned]
    assert [len({name for name, _ in shard}) for shard in drawn] == [1, 1, 1]
    assert Counter(key for shard in drawn for _, key in shard) == Counter(
        key for key in world.images if key.startswith("train")
    )


def test_a_shard_is_of_a_bounded_size(world, tmp_path):
    most = 3 * (shards._OVERHEAD_BYTES + 100)  # an image has fewer than 100 bytes
    planned = plan_shards(world.ingest, world.captions, "train", 5, 0, max_bytes=most)
    assert list(map(len, planned)) == [3, 3, 3, 3]
    assert all(write(world, tmp_path, plan).bytes < most for plan in planned)
    tiny = plan_shards(world.ingest, world.captions, "train", 5, 0, max_bytes=1)
    assert list(map(len, tiny)) == [1] * 12  # a sample is never left out for its size


def test_a_split_without_images_has_no_shards(world):
    assert plans(world, "test") == []


def test_a_captioner_that_did_not_finish_is_named(world):
    finished_reports = [report for report in reports_of(world, "gpt") if "part-00001" not in report.name]
    write_index(world.captions["gpt"], finished_reports, UnitIndex)
    with pytest.raises(
        ValueError, match=r"gpt has not processed 1 partitions .*\(train/part-00001\); rerun the caption"
    ):
        plans(world)
    (world.captions["gpt"] / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json does not exist"):
        plans(world)


def reports_of(world: World, captioner: str) -> list[UnitReport]:
    folder = world.captions[captioner]
    return [report for name in unit_names(folder) if (report := finished(name, folder))]


def test_captions_of_a_partition_that_failed_as_a_whole_are_missing_from_its_samples(world, tmp_path):
    for ending in (".json", ".parquet"):
        (world.captions["gpt"] / f"train/part-00001{ending}").unlink()
    for plan in plans(world):
        assert write(world, tmp_path, plan).written == len(plan)
        for key, sample in read(tmp_path / f"{plan.name}.tar").items():
            written = set(json.loads(sample["json"])["captions"])
            assert written == ({"llava"} if key.startswith(("train-1", "train-0-0")) else {"llava", "gpt"})


def test_samples_have_all_that_is_known_of_them(world, tmp_path):
    folder = tmp_path / "shards"
    for plan in plans(world):
        report = write(world, folder, plan)
        assert (report.name, report.read, report.written) == (plan.name, len(plan), len(plan))
        found = read(folder / f"{plan.name}.tar")
        assert list(found) == [key for _, key in samples(world, plan)]
        for key, sample in found.items():
            long = {"llava": [f"l {key}", "two"], "gpt": [f"g {key}"]}
            if key == "train-0-0":
                del long["gpt"]
            assert sample["png"] == world.images[key]
            assert json.loads(sample["json"]) == {
                "raw": f"Raw {key}. Ä.",
                "captions": long,
                "sha256": hashlib.sha256(world.images[key]).hexdigest(),
            }
            feature = np.load(io.BytesIO(sample["npy"]))
            assert feature.dtype == np.float32
            assert feature.tolist() == [list(world.images).index(key), 1.0]


def test_without_features_images_are_not_opened(world, tmp_path, monkeypatch):
    monkeypatch.setattr("lotlip.data.images.decode_rgb", lambda _: pytest.fail("an image was opened"))
    plan = plans(world)[0]
    assert write(world, tmp_path, plan, features=None).written == 5
    assert all("npy" not in sample for sample in read(tmp_path / f"{plan.name}.tar").values())


def test_bytes_depend_neither_on_place_nor_on_batches(world, tmp_path):
    plan = plans(world)[0]
    reports = [write(world, tmp_path / str(size), plan, batch_size=size) for size in (1, 3, 100)]
    assert reports[0] == reports[1] == reports[2]
    assert len({(tmp_path / f"{size}/{plan.name}.tar").read_bytes() for size in (1, 3, 100)}) == 1
    with tarfile.open(tmp_path / f"1/{plan.name}.tar") as tar:
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}


def test_pictures_are_encoded_a_batch_at_a_time(world, tmp_path):
    sizes = []

    def features(pictures: list[Image.Image]) -> np.ndarray:
        sizes.append(len(pictures))
        return redness(pictures)

    write(world, tmp_path, plans(world)[0], features, batch_size=2)
    assert sizes == [2, 2, 1]


def spoil(world: World, key: str) -> None:
    """Overwrites an image where it lies in its partition."""
    path = next(path for path in world.ingest.rglob("*.tar") if world.images[key] in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(world.images[key], b"x" * len(world.images[key])))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_broken_image_fails_alone(world, tmp_path, batch_size):
    plan = plans(world)[0]
    planned = [key for _, key in samples(world, plan)]
    key = planned[2]
    spoil(world, key)
    report = write(world, tmp_path, plan, batch_size=batch_size)
    (failure,) = report.failures
    assert (failure.key, failure.kind, failure.where) == (key, "unreadable", f"{partition_of(key)}.tar: {key}.png")
    found = read(tmp_path / f"{plan.name}.tar")
    assert list(found) == [other for other in planned if other != key]
    for other, sample in found.items():  # features still belong to their pictures
        assert np.load(io.BytesIO(sample["npy"]))[0] == list(world.images).index(other)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_no_number_fails_alone(world, tmp_path, value):
    plan = plans(world)[0]
    shade = list(world.images).index(samples(world, plan)[1][1])

    def features(pictures: list[Image.Image]) -> np.ndarray:
        rows = redness(pictures)
        rows[rows[:, 0] == shade, 1] = value
        return rows

    report = write(world, tmp_path, plan, features)
    assert [(failure.key, failure.kind) for failure in report.failures] == [(samples(world, plan)[1][1], "not-finite")]
    assert report.written == 4


@pytest.mark.parametrize("shape", [(1, 2), (2,), (2, 2, 2)])
def test_a_tower_that_gives_another_number_of_features_is_an_error(world, tmp_path, shape):
    with pytest.raises(ValueError, match=r"for 2 pictures, not \[n, D\]"):
        write(world, tmp_path, plans(world)[0], lambda _: np.zeros(shape))
    assert list(tmp_path.glob("*.tar*")) == []


def test_the_marker_is_written_last(world, tmp_path):
    plan = plans(world)[0]
    assert finished_shard(plan.name, tmp_path) is None
    report = write(world, tmp_path, plan)
    assert finished_shard(plan.name, tmp_path) == report
    with pytest.raises(RuntimeError):
        write(world, tmp_path, plan, features=lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert finished_shard(plan.name, tmp_path) is None


def test_an_index_says_where_the_samples_lie(world, tmp_path):
    plan = plans(world)[0]
    spoil(world, samples(world, plan)[2][1])
    write(world, tmp_path, plan)
    shard = tmp_path / f"{plan.name}.tar"
    with pa.ipc.open_file(index_path(shard)) as file:
        index = file.read_all().to_pylist()
    assert index == scan_tar(shard).to_pylist()
    data, found = shard.read_bytes(), read(shard)
    assert [row["key"] for row in index] == list(found)
    for row in index:
        for member, ending in (("json", "json"), ("npy", "npy"), ("image", "png")):
            start = row[f"{member}_offset"]
            assert data[start : start + row[f"{member}_size"]] == found[row["key"]][ending]


def test_joined_shards_are_scanned_to_the_end_of_the_last(world, tmp_path):
    shards = []
    for plan in plans(world)[:2]:
        write(world, tmp_path, plan)
        shards.append(tmp_path / f"{plan.name}.tar")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    found = scan_tar(joined)
    assert found.column("key").to_pylist() == [
        key for shard in shards for key in scan_tar(shard).column("key").to_pylist()
    ]
    last = found.to_pylist()[-1]
    start = last["json_offset"]
    json.loads(joined.read_bytes()[start : start + last["json_size"]])


@pytest.mark.parametrize(
    "change", [lambda data: data[:-10240], lambda data: data[:3000], lambda data: data + b"x" * 600]
)
def test_a_shard_that_is_cut_off_or_followed_by_something_else_is_an_error(world, tmp_path, change):
    plan = plans(world)[0]
    write(world, tmp_path, plan)
    shard = tmp_path / f"{plan.name}.tar"
    data = shard.read_bytes()
    data = data.rstrip(b"\0")
    shard.write_bytes(change(data + bytes(-len(data) % 512 + 10240)))
    with pytest.raises(ValueError, match=shard.name):
        scan_tar(shard)


def test_the_index_of_a_shard_without_features_has_no_place_for_them(world, tmp_path):
    plan = plans(world)[0]
    write(world, tmp_path, plan, features=None)
    assert {row["npy_offset"] for row in scan_tar(tmp_path / f"{plan.name}.tar").to_pylist()} == {0}


def test_statistics_are_means_over_the_split(world):
    found = shard_statistics(world.ingest, world.captions, "train", lambda text: len(text.split()))
    assert list(found) == ["raw", "gpt", "llava"]
    assert found["raw"] == {"images": 12, "texts": 12, "sub_captions_per_text": 2.0, "tokens_per_text": 3.0}
    assert found["gpt"] == {"images": 11, "texts": 11, "sub_captions_per_text": 1.0, "tokens_per_text": 2.0}
    assert found["llava"] == {"images": 12, "texts": 12, "sub_captions_per_text": 2.0, "tokens_per_text": 3.0}


def test_statistics_of_nothing_are_zero(world):
    found = shard_statistics(world.ingest, world.captions, "test", len)
    assert found["raw"] == {"images": 0, "texts": 0, "sub_captions_per_text": 0.0, "tokens_per_text": 0.0}


MORE = {"features": True, "vocabulary": [7]}  # that an index of shards has


def test_the_index_has_every_shard_by_split(world, tmp_path):
    spoil(world, "train-1-2")
    reports = {split: [write(world, tmp_path, plan) for plan in plans(world, split)] for split in PARTITIONS}
    written = write_shard_index(tmp_path, reports, {"raw": {}}, **MORE)
    assert written == read_index(tmp_path, ShardIndex)
    index = json.loads((tmp_path / "index.json").read_text())
    assert {split: entry["samples"] for split, entry in index["splits"].items()} == {"train": 11, "val": 4}
    first = index["splits"]["train"]["shards"][0]
    path = tmp_path / "train-000000.tar"
    assert first == {
        "name": "train-000000",
        "samples": reports["train"][0].written,
        "bytes": path.stat().st_size,
        "sha256": reports["train"][0].sha256,
    }
    assert (index["read"], index["written"], index["failed"]) == (16, 15, 1)
    assert index["failure_kinds"] == {"unreadable": 1}
    assert index["failures"][0]["key"] == "train-1-2"
    assert index["statistics"] == {"raw": {}}
    assert (index["features"], index["vocabulary"], index["sentence_ends"]) == (True, [7], "released")
    reports["val"] = []
    assert write_shard_index(tmp_path, reports, {}, **MORE).hash != index["hash"]


def test_a_shard_in_which_all_failed_is_counted_but_not_listed(world, tmp_path):
    whole = write(world, tmp_path, plans(world, "val")[0])
    lost = UnitReport("val-000001", 1, 0, "", 0, [Failure("k", "val-000001", "no memory", "unit")])
    index = write_shard_index(tmp_path, {"train": [], "val": [whole, lost]}, {}, **MORE)
    assert [shard.name for shard in index.splits["val"].shards] == ["val-000000"]
    assert (index.read, index.failed) == (5, 1)
