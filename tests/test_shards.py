"""Shards hold each sample once with its captions and feature, and are reproducible to the byte."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image

from flows.runtime.sent_unit import pack, unpack
from lotlip.data.index import ShardIndex, UnitIndex, read_index, write_index
from lotlip.data.partitions import finished, unit_names, write_captions
from lotlip.data.records import Caption, Failure, ImageRecord, Unit, UnitReport
from lotlip.data.tars import index_path, scan_tar
from lotlip.shard import shards
from lotlip.shard.sharding import Sharding, ShardUnit
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
    """Three training partitions and one for validation, with two captioners; one captioner lacks an image."""

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
            captions = [caption(key, "llava", [f"l {key}", "two"]) for key in keys]
            reports[llava].append(write_captions(unit.name, captions, 4, llava))
            missing = Failure("train-0-0", "gpt.csv", "no row", "missing")
            captions = [missing if key == "train-0-0" else caption(key, "gpt", [f"g {key}"]) for key in keys]
            reports[gpt].append(write_captions(unit.name, captions, 4, gpt))
    for folder, captioner_reports in reports.items():
        write_index(folder, captioner_reports, UnitIndex)
    return World(ingest, {"llava": llava, "gpt": gpt}, images)


def plans(world: World, split: str = "train", size: int = 5, seed: int = 0) -> list[ShardPlan]:
    return plan_shards(world.ingest, world.captions, split, size, seed)


def redness(images: list[Image.Image]) -> np.ndarray:
    """A feature that identifies its image."""
    return np.array([[image.getpixel((0, 0))[0], 1.0] for image in images], dtype=np.float32)


def write(world: World, folder: Path, plan: ShardPlan, features: Callable | None = redness, batch_size: int = 2):
    return write_shard(plan, group_reader(world.ingest, world.captions)(plan.partitions), folder, features, batch_size)


def samples(world: World, plan: ShardPlan) -> list[tuple[str, str]]:
    """Partition and key of each sample of a plan, in the order of the shard."""
    with TemporaryDirectory() as folder:
        write(world, Path(folder), plan, features=None)
        return [(partition_of(key), key) for key in read_shard(Path(folder, f"{plan.name}.tar"))]


def partition_of(key: str) -> str:
    split, index, _ = key.split("-")
    return f"{split}/part-{int(index):05d}"


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    return {sample["__key__"]: sample for sample in wds.WebDataset(str(path), shardshuffle=False)}


def test_plans_hold_every_sample_of_a_split_once(world):
    planned = plans(world)
    assert [plan.name for plan in planned] == ["train-000000", "train-000001", "train-000002"]
    assert list(map(len, planned)) == [5, 5, 2]
    planned_keys = [key for plan in planned for _, key in samples(world, plan)]
    assert sorted(planned_keys) == sorted(key for key in world.images if key.startswith("train"))


def test_plans_depend_on_the_seed_and_mix_partitions(world):
    assert plans(world) == plans(world)
    orders = [[key for _, key in samples(world, plans(world, seed=seed)[0])] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len({name for name, _ in samples(world, plans(world)[0])}) > 1


def test_a_shard_mixes_a_limited_number_of_partitions(world, monkeypatch):
    monkeypatch.setattr(shards, "MIXED_PARTITIONS", 1)
    planned = plans(world, size=PER_PARTITION)
    contents = [samples(world, plan) for plan in planned]
    assert [len({name for name, _ in shard}) for shard in contents] == [1, 1, 1]
    assert Counter(key for shard in contents for _, key in shard) == Counter(
        key for key in world.images if key.startswith("train")
    )


def test_a_shard_has_a_limited_size(world, tmp_path):
    max_bytes = 3 * (shards._OVERHEAD_BYTES + 100)  # images have fewer than 100 bytes
    planned = plan_shards(world.ingest, world.captions, "train", 5, 0, max_bytes=max_bytes)
    assert list(map(len, planned)) == [3, 3, 3, 3]
    assert all(write(world, tmp_path, plan).bytes < max_bytes for plan in planned)
    tiny = plan_shards(world.ingest, world.captions, "train", 5, 0, max_bytes=1)
    assert list(map(len, tiny)) == [1] * 12  # a large sample is never left out


def test_a_split_without_images_has_no_shards(world):
    assert plans(world, "test") == []


def test_an_unfinished_captioner_is_an_error(world):
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


def test_samples_lack_captions_of_a_failed_partition(world, tmp_path):
    for ending in (".json", ".parquet"):
        (world.captions["gpt"] / f"train/part-00001{ending}").unlink()
    for plan in plans(world):
        assert write(world, tmp_path, plan).written == len(plan)
        for key, sample in read_shard(tmp_path / f"{plan.name}.tar").items():
            captioners = set(json.loads(sample["json"])["captions"])
            assert captioners == ({"llava"} if key.startswith(("train-1", "train-0-0")) else {"llava", "gpt"})


def test_samples_hold_image_captions_and_feature(world, tmp_path):
    folder = tmp_path / "shards"
    for plan in plans(world):
        report = write(world, folder, plan)
        assert (report.name, report.read, report.written) == (plan.name, len(plan), len(plan))
        stored = read_shard(folder / f"{plan.name}.tar")
        assert list(stored) == [key for _, key in samples(world, plan)]
        for key, sample in stored.items():
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


def test_images_are_not_decoded_without_features(world, tmp_path, monkeypatch):
    monkeypatch.setattr("lotlip.data.images.decode_rgb", lambda _: pytest.fail("an image was opened"))
    plan = plans(world)[0]
    assert write(world, tmp_path, plan, features=None).written == 5
    assert all("npy" not in sample for sample in read_shard(tmp_path / f"{plan.name}.tar").values())


def test_bytes_depend_neither_on_the_folder_nor_on_batches(world, tmp_path):
    plan = plans(world)[0]
    reports = [write(world, tmp_path / str(size), plan, batch_size=size) for size in (1, 3, 100)]
    assert reports[0] == reports[1] == reports[2]
    assert len({(tmp_path / f"{size}/{plan.name}.tar").read_bytes() for size in (1, 3, 100)}) == 1
    with tarfile.open(tmp_path / f"1/{plan.name}.tar") as tar:
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}


def test_a_worker_that_has_only_the_images_of_a_shard_writes_the_same_bytes(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions = tuple((name, Path(name)) for name in world.captions)
    work = Sharding(
        ingest=Path("ingest"),
        captions=captions,
        out=Path("out"),
        image_tower=None,
        tokenizer="bert-base-uncased",
        sentence_ends="released",
        device="cpu",
        precision="fp32",
        batch_size=2,
        fingerprint="",
    )
    units = [ShardUnit(plan, "") for plan in plans(world)]
    assert len({unit.plan.partitions for unit in units}) < len(units)  # some share a group, which workers cache
    for number, unit in enumerate(units):
        unpack(pack(work.files(unit).reads), Path(str(number)))
        with chdir(str(number)):
            work.write(unit)
    for number, unit in enumerate(units):
        replace(work, fingerprint="here").write(unit)  # another one, so that nothing is cached
        for path in work.files(unit).writes:
            assert path.read_bytes() == Path(str(number), path).read_bytes()


def test_images_are_encoded_in_batches(world, tmp_path):
    sizes = []

    def features(images: list[Image.Image]) -> np.ndarray:
        sizes.append(len(images))
        return redness(images)

    write(world, tmp_path, plans(world)[0], features, batch_size=2)
    assert sizes == [2, 2, 1]


def break_image(world: World, key: str) -> None:
    """Overwrites an image inside its partition."""
    path = next(path for path in world.ingest.rglob("*.tar") if world.images[key] in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(world.images[key], b"x" * len(world.images[key])))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_broken_image_fails_alone(world, tmp_path, batch_size):
    plan = plans(world)[0]
    planned = [key for _, key in samples(world, plan)]
    key = planned[2]
    break_image(world, key)
    report = write(world, tmp_path, plan, batch_size=batch_size)
    (failure,) = report.failures
    assert (failure.key, failure.kind, failure.where) == (key, "unreadable", f"{partition_of(key)}.tar: {key}.png")
    stored = read_shard(tmp_path / f"{plan.name}.tar")
    assert list(stored) == [other for other in planned if other != key]
    for other, sample in stored.items():  # features still belong to their images
        assert np.load(io.BytesIO(sample["npy"]))[0] == list(world.images).index(other)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_feature_fails_alone(world, tmp_path, value):
    plan = plans(world)[0]
    shade = list(world.images).index(samples(world, plan)[1][1])

    def features(images: list[Image.Image]) -> np.ndarray:
        rows = redness(images)
        rows[rows[:, 0] == shade, 1] = value
        return rows

    report = write(world, tmp_path, plan, features)
    assert [(failure.key, failure.kind) for failure in report.failures] == [(samples(world, plan)[1][1], "not-finite")]
    assert report.written == 4


@pytest.mark.parametrize("shape", [(1, 2), (2,), (2, 2, 2)])
def test_features_of_the_wrong_shape_are_an_error(world, tmp_path, shape):
    with pytest.raises(ValueError, match=r"for 2 pictures, not \[n, D\]"):
        write(world, tmp_path, plans(world)[0], lambda _: np.zeros(shape))
    assert list(tmp_path.glob("*.tar*")) == []


def test_the_report_of_a_shard_is_written_last(world, tmp_path):
    plan = plans(world)[0]
    assert finished_shard(plan.name, tmp_path) is None
    report = write(world, tmp_path, plan)
    assert finished_shard(plan.name, tmp_path) == report
    with pytest.raises(RuntimeError):
        write(world, tmp_path, plan, features=lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert finished_shard(plan.name, tmp_path) is None


def test_an_index_locates_the_members_of_samples(world, tmp_path):
    plan = plans(world)[0]
    break_image(world, samples(world, plan)[2][1])
    write(world, tmp_path, plan)
    shard = tmp_path / f"{plan.name}.tar"
    with pa.ipc.open_file(index_path(shard)) as file:
        index = file.read_all().to_pylist()
    assert index == scan_tar(shard).to_pylist()
    data, stored = shard.read_bytes(), read_shard(shard)
    assert [row["key"] for row in index] == list(stored)
    for row in index:
        for member, ending in (("json", "json"), ("npy", "npy"), ("image", "png")):
            start = row[f"{member}_offset"]
            assert data[start : start + row[f"{member}_size"]] == stored[row["key"]][ending]


def test_concatenated_shards_are_scanned_to_the_end(world, tmp_path):
    shards = []
    for plan in plans(world)[:2]:
        write(world, tmp_path, plan)
        shards.append(tmp_path / f"{plan.name}.tar")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    index = scan_tar(joined)
    assert index.column("key").to_pylist() == [
        key for shard in shards for key in scan_tar(shard).column("key").to_pylist()
    ]
    last = index.to_pylist()[-1]
    start = last["json_offset"]
    json.loads(joined.read_bytes()[start : start + last["json_size"]])


@pytest.mark.parametrize(
    "change", [lambda data: data[:-10240], lambda data: data[:3000], lambda data: data + b"x" * 600]
)
def test_truncated_shards_and_trailing_garbage_are_errors(world, tmp_path, change):
    plan = plans(world)[0]
    write(world, tmp_path, plan)
    shard = tmp_path / f"{plan.name}.tar"
    data = shard.read_bytes()
    data = data.rstrip(b"\0")
    shard.write_bytes(change(data + bytes(-len(data) % 512 + 10240)))
    with pytest.raises(ValueError, match=shard.name):
        scan_tar(shard)


def test_a_shard_without_features_has_zero_feature_offsets(world, tmp_path):
    plan = plans(world)[0]
    write(world, tmp_path, plan, features=None)
    assert {row["npy_offset"] for row in scan_tar(tmp_path / f"{plan.name}.tar").to_pylist()} == {0}


def test_statistics_are_means_over_the_split(world):
    statistics = shard_statistics(world.ingest, world.captions, "train", lambda text: len(text.split()))
    assert list(statistics) == ["raw", "gpt", "llava"]
    assert statistics["raw"] == {"images": 12, "texts": 12, "sub_captions_per_text": 2.0, "tokens_per_text": 3.0}
    assert statistics["gpt"] == {"images": 11, "texts": 11, "sub_captions_per_text": 1.0, "tokens_per_text": 2.0}
    assert statistics["llava"] == {"images": 12, "texts": 12, "sub_captions_per_text": 2.0, "tokens_per_text": 3.0}


def test_statistics_of_an_empty_split_are_zero(world):
    statistics = shard_statistics(world.ingest, world.captions, "test", len)
    assert statistics["raw"] == {"images": 0, "texts": 0, "sub_captions_per_text": 0.0, "tokens_per_text": 0.0}


INDEX_FIELDS = {"features": True, "vocabulary": [7]}  # required fields of an index of shards


def test_the_index_lists_the_shards_of_each_split(world, tmp_path):
    break_image(world, "train-1-2")
    reports = {split: [write(world, tmp_path, plan) for plan in plans(world, split)] for split in PARTITIONS}
    returned = write_shard_index(tmp_path, reports, {"raw": {}}, **INDEX_FIELDS)
    assert returned == read_index(tmp_path, ShardIndex)
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
    assert write_shard_index(tmp_path, reports, {}, **INDEX_FIELDS).hash != index["hash"]


def test_an_empty_shard_is_counted_but_not_listed(world, tmp_path):
    complete = write(world, tmp_path, plans(world, "val")[0])
    lost = UnitReport("val-000001", 1, 0, "", 0, [Failure("k", "val-000001", "no memory", "unit")])
    index = write_shard_index(tmp_path, {"train": [], "val": [complete, lost]}, {}, **INDEX_FIELDS)
    assert [shard.name for shard in index.splits["val"].shards] == ["val-000000"]
    assert (index.read, index.failed) == (5, 1)
