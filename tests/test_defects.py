"""Planted defects: each stage's gate reports its defects, and clean data pass."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from lotlip.core.checks import GateFailed
from lotlip.data.partitions import read_table
from lotlip.data.records import Caption, Failure, UnitReport
from lotlip.data.tars import TarSamples, write_sidecar
from lotlip.data.token_ids import token_ids_path
from tests.defects import World

pytestmark = pytest.mark.usefixtures("without_pages")

TRAIN, OTHER, TEST = "ingest/train/part-00000", "ingest/train/part-00001", "ingest/test/part-00000"


@pytest.mark.slow
def test_clean_data_pass_every_gate(clean: World, tmp_path: Path) -> None:
    for stage in ("ingest", "caption", "shard"):
        checks = getattr(clean, f"gate_{stage}")(tmp_path / stage)
        assert checks and all(check.success for check in checks)


def set_column(column: str, value: Any, rows: slice = slice(0, 1)) -> Callable[[pd.DataFrame], None]:
    """Returns a change that sets a column of some rows."""

    def change(table: pd.DataFrame) -> None:
        table[column] = table[column].astype(object)
        table.iloc[rows, table.columns.get_loc(column)] = value

    return change


def copy_first_row(world: World, source: str, target: str, columns: list[str]) -> None:
    """Copies columns of the first row of a table to the first row of another."""
    row = read_table(world.folder, source, columns).iloc[0]
    world.edit(target, lambda table: [set_column(column, row[column])(table) for column in columns] and None)


def replace_images(world: World, unit: str, make_image: Callable[[int], bytes]) -> None:
    """Overwrites the images of a partition in its tar and table; new images must not be longer."""
    import hashlib

    tar = world.folder / f"{unit}.tar"
    data = bytearray(tar.read_bytes())

    def change(table: pd.DataFrame) -> None:
        for row, (offset, size) in enumerate(zip(table["offset"], table["size"], strict=True)):
            image = make_image(row)
            assert len(image) <= size
            data[offset : offset + len(image)] = image
            table.loc[row, ["size", "sha256"]] = [len(image), hashlib.sha256(image).hexdigest()]

    world.edit(unit, change)
    tar.write_bytes(data)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(file, "png")
    return file.getvalue()


def truncate(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def failures(kind: str, count: int) -> list[dict[str, str]]:
    return [vars(Failure(f"k{number}", f"0000{number}.tar", "it is broken", kind)) for number in range(count)]


def swap_places(table: pd.DataFrame) -> None:
    """Gives each image the offset of the next one, like an off-by-one error."""
    for column in ("offset", "size"):
        table[column] = np.roll(table[column], 1)


def leak(world: World) -> None:
    copy_first_row(world, TEST, TRAIN, ["sha256"])


INGEST: dict[str, tuple[Callable[[World], Any], str]] = {
    "null short captions": (
        lambda world: world.edit(TRAIN, set_column("short_caption", None)),
        "no empty short caption: found 1 of 5 do not: train/part-00000 (1)",
    ),
    "blank short captions": (
        lambda world: world.edit(TEST, set_column("short_caption", " \n", slice(0, 3))),
        "no empty short caption: found 1 of 5 do not: test/part-00000 (3)",
    ),
    "short captions all alike": (
        lambda world: [
            world.edit(f"ingest/{split}/part-0000{index}", set_column("short_caption", "an image", slice(None)))
            for split, index in (("train", 0), ("train", 1), ("train", 2), ("val", 0), ("test", 0))
        ],
        "short captions that equal another is at most 90 %: found 99.4 %",
    ),
    "a key in two partitions": (
        lambda world: copy_first_row(world, OTHER, TRAIN, ["key"]),
        "keys are unique: found 1",
    ),
    "an image in two partitions": (
        lambda world: copy_image(world, TRAIN, OTHER),
        "images are unique: found 1",
    ),
    "an evaluation image among the training images": (
        lambda world: copy_image(world, TRAIN, TEST),
        "no training image is used for evaluation: found 1 of 5 do not: train/part-00000 (1)",
    ),
    "an image of a benchmark among the training images": (
        lambda world: world.evaluation.update(read_table(world.folder, OTHER, ["sha256"])["sha256"][:2]),
        "no training image is used for evaluation: found 1 of 5 do not: train/part-00001 (2)",
    ),
    "wrong image sizes": (
        lambda world: world.edit(TRAIN, set_column("width", 31, slice(None))),
        "as wide and high as their partition's table says: found 1 of 5 do not: train/part-00000 (32)",
    ),
    "images without a width": (
        lambda world: world.edit(TRAIN, set_column("width", 0)),
        "at least 1 pixel wide and high: found 1 of 5 do not: train/part-00000 (0)",
    ),
    "images that are other images": (
        lambda world: world.edit(TRAIN, swap_places),
        "the images in a partition's tar match the hashes in its table: found 1 of 5",
    ),
    "constant images": (
        lambda world: replace_images(world, TRAIN, png),
        "sampled images that have a single colour is at most 5 %: found 2",
    ),
    "an image that cannot be decoded": (
        lambda world: replace_images(world, TRAIN, lambda row: b"not an image %d" % row),
        "the images in a partition's tar can be decoded: found 1 of 5 do not: train/part-00000 (32)",
    ),
    "a tar cut off": (
        lambda world: truncate(world.folder / f"{TRAIN}.tar"),
        "every image in full: found 1 of 5 do not: train/part-00000",
    ),
    "a tar that is gone": (
        lambda world: (world.folder / f"{TRAIN}.tar").unlink(),
        "a partition has its tar and its table: found 1 of 5 do not: train/part-00000 (1)",
    ),
    "rows that are gone": (
        lambda world: world.edit(OTHER, lambda table: table.iloc[3:]),
        "a row for every image written: found 1 of 5 do not: train/part-00001 (-3)",
    ),
    "many failures": (
        lambda world: world.report(TRAIN, read=44, failures=failures("unreadable", 4)),
        "share of items that failed is at most 1 %: found 2.17 % (4 unreadable)",
    ),
    "many tars cut off": (
        lambda world: world.report(TRAIN, read=41, failures=failures("truncated", 1)),
        "source files that are broken or truncated is at most 5 %: found 20 %",
    ),
    "a unit that failed completely": (
        lambda world: world.broken.append(
            UnitReport("part-00009", 1, 0, "", 0, [Failure("part-00009", "9.tar", "gone", "unit")])
        ),
        "source files that are broken or truncated is at most 5 %: found 16.7 %",
    ),
    "nothing to train on": (
        lambda world: [path.unlink() for path in (world.ingest / "train").glob("*.json")],
        "the train split has images: found 0",
    ),
}  # fmt: skip


def copy_image(world: World, target: str, source: str) -> None:
    """Overwrites the largest image of a partition with the smallest of another."""
    tables = {unit: read_table(world.folder, unit, ["offset", "size", "sha256"]) for unit in (source, target)}
    source_row = tables[source]["size"].idxmin()
    offset, size, sha256 = tables[source].loc[source_row]
    image = (world.folder / f"{source}.tar").read_bytes()[offset : offset + size]
    target_row = int(tables[target]["size"].idxmax())
    tar = world.folder / f"{target}.tar"
    data = bytearray(tar.read_bytes())
    start = tables[target].loc[target_row, "offset"]
    data[start : start + size] = image
    tar.write_bytes(data)

    def change(table: pd.DataFrame) -> None:
        table.loc[target_row, ["size", "sha256"]] = [size, sha256]

    world.edit(target, change)


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "line"), INGEST.values(), ids=INGEST)
def test_ingest_gate_finds(world: World, tmp_path: Path, plant: Callable[[World], Any], line: str) -> None:
    plant(world)
    assert line in gate_error(world.gate_ingest, tmp_path / "report")


def gate_error(gate: Callable[[Path], Any], report: Path) -> str:
    with pytest.raises(GateFailed) as raised:
        gate(report)
    assert "FAILED" in (report / "gate.md").read_text()
    return str(raised.value)


# --- caption ------------------------------------------------------------------------------------------------------

UNITS = ("train/part-00000", "train/part-00001", "train/part-00002", "val/part-00000", "test/part-00000")
LLAVA = "captions/llava/train/part-00000"


def change_captions(
    text: Callable[[str], str], units: Sequence[str] = UNITS[:1], every: int = 1
) -> Callable[[World], None]:
    """Plants new texts in every n-th caption of some partitions."""

    def change(captions: list[Caption]) -> list[Caption]:
        return [
            caption if number % every else replace(caption, text=text(caption.text))
            for number, caption in enumerate(captions)
        ]

    def plant(world: World) -> None:
        for unit in units:
            world.recaption(unit, change)

    return plant


def shift_captions(captions: list[Caption]) -> list[Caption]:
    texts = [caption.text for caption in captions]
    return [replace(caption, text=text) for caption, text in zip(captions, texts[1:] + texts[:1], strict=True)]


def fail_captioner(world: World) -> None:
    """Makes a captioner fail for a complete partition."""
    for ending in (".json", ".parquet"):
        (world.folder / f"{LLAVA}{ending}").unlink()
    lost = [Failure(f"{number}", "train/part-00000", "the server is gone", "unit") for number in range(40)]
    world.broken.append(UnitReport("train/part-00000", 40, 0, "", 0, lost))


CAPTIONS: dict[str, tuple[Callable[[World], Any], str]] = {
    "captions of the next images": (
        lambda world: world.recaption(UNITS[0], shift_captions),
        "captions are their own images': they share 1.5 times as many words",
    ),
    "a captioner missing in a partition": (
        fail_captioner,
        "share of partitions without any caption is at most 0 %: found 20 % (train/part-00000)",
    ),
    "null texts": (
        lambda world: world.edit(LLAVA, set_column("text", None)),
        "a partition has no empty caption: found 1 of 5 do not: train/part-00000 (1)",
    ),
    "one text for all": (
        change_captions(lambda _: "A picture of a thing in a place."),
        "captions that equal another is at most 20 %: found 21.7 %",
    ),
    "texts cut off": (
        change_captions(lambda text: text[: len(text) * 2 // 3].rstrip(" ."), UNITS[:3]),
        "captions that are cut off is at most 50 %: found 66.7 %",
    ),
    "mojibake": (
        change_captions(lambda text: text.replace(" ", "â€™ ", 1), UNITS, every=4),
        "captions that the quality rules drop is at most 10 %: found 25 % (45 mojibake)",
    ),
    "control characters": (
        change_captions(lambda text: text.replace(" ", "\x08 ", 1), UNITS, every=4),
        "captions that the quality rules drop is at most 10 %: found 25 % (45 control)",
    ),
    "refusals": (
        change_captions(lambda _: "I'm sorry, but I cannot see the image.", UNITS, every=4),
        "captions that the quality rules drop is at most 10 %: found 25 % (45 refusal)",
    ),
    "loops": (
        change_captions(lambda text: text + " And on the left there is a tree" * 30 + ".", UNITS, every=4),
        "captions that the quality rules drop is at most 10 %: found 25 % (45 repetition)",
    ),
    "texts of a word": (
        change_captions(lambda _: "Tree.", UNITS, every=4),
        "captions that the quality rules drop is at most 10 %: found 25 % (45 short)",
    ),
    "lengths that shift": (
        change_captions(lambda text: " ".join(text.split(". ")[:2]) + "."),
        "a partition's mean length is within 1.5 times the median partition's: found 1 of 5",
    ),
    "two captions for an image": (
        lambda world: world.edit(LLAVA, lambda table: set_column("key", table["key"][1])(table)),
        "no image has two captions: found 1",
    ),
    "captions without sub-captions": (
        lambda world: world.edit(LLAVA, lambda table: table.at.__setitem__((0, "sub_captions"), [])),
        "every caption of a partition has at least 1 sub-caption: found 1 of 5 do not: train/part-00000 (1)",
    ),
    "rows that are gone": (
        lambda world: world.edit(LLAVA, lambda table: table.iloc[1:]),
        "a row for every caption written: found 1 of 5 do not: train/part-00000 (-1)",
    ),
    "a table that is gone": (
        lambda world: (world.folder / f"{LLAVA}.parquet").unlink(),
        "a partition has its table: found 1 of 5 do not: train/part-00000 (1)",
    ),
    "many failures": (
        lambda world: world.report(LLAVA, read=50, failures=failures("unreadable", 10)),
        "share of items that failed is at most 2 %: found 5.26 % (10 unreadable)",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "line"), CAPTIONS.values(), ids=CAPTIONS)
def test_caption_gate_finds(world: World, tmp_path: Path, plant: Callable[[World], Any], line: str) -> None:
    plant(world)
    assert line in gate_error(world.gate_caption, tmp_path / "report")


# --- shard --------------------------------------------------------------------------------------------------------

FIRST, SECOND = "train-000000", "train-000001"


def edit_sample(name: str, sample: int = 0, **values: Any) -> Callable[[World], None]:
    """Changes parts of a sample of a shard; a function gets the current part."""

    def change(samples: list[dict[str, Any]]) -> None:
        for part, value in values.items():
            samples[sample][part] = value(samples[sample][part]) if callable(value) else value

    return lambda world: world.reshard(name, change)


def shift_images(samples: list[dict[str, Any]]) -> None:
    images = [sample["image"] for sample in samples]
    for sample, image in zip(samples, images[1:] + images[:1], strict=True):
        sample["image"] = image


def duplicate_sample(world: World) -> None:
    moved: list[dict[str, Any]] = []
    world.reshard(FIRST, lambda samples: moved.append(samples[0]))
    world.reshard(SECOND, lambda samples: [*samples[1:], moved[0]])


def remove_captions(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        sample["json"]["captions"] = {}


def add_sample(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*samples, {**samples[0], "key": "train-999999"}]


def drop_sub_caption(content: dict[str, Any]) -> dict[str, Any]:
    captions = {name: parts[:-1] for name, parts in content["captions"].items()}
    return content | {"captions": captions}


def change_keeping_token_ids(world: World, change: Callable[[World], Any]) -> None:
    """Changes the first shard, and makes its token ids claim to belong to the changed one."""
    tar = world.shards / f"{FIRST}.tar"
    path = token_ids_path(tar)
    with pa.ipc.open_file(path.read_bytes()) as file:
        batch = file.get_batch(0)
    change(world)
    metadata = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    write_sidecar(path, tar, batch, **(metadata | {"layout": TarSamples(tar).layout()}))


SHARDS: dict[str, tuple[Callable[[World], Any], str]] = {
    "a shard that is gone": (
        lambda world: (world.shards / f"{SECOND}.tar").unlink(),
        "size that the index says: found 1 of 5 do not: train-000001 (-",
    ),
    "a shard cut off": (
        lambda world: truncate(world.shards / f"{SECOND}.tar"),
        "size that the index says: found 1 of 5 do not: train-000001 (-",
    ),
    "a flipped bit": (
        lambda world: flip_bit(world.shards / f"{FIRST}.tar"),
        "hash that the index says: found 1 of 5 do not: train-000000 (1)",
    ),
    "a stale index.json": (
        lambda world: world.index(FIRST, samples=29),
        "the samples that the index says: found 1 of 5 do not: train-000000 (1)",
    ),
    "a stale index of places": (
        lambda world: (world.shards / f"{SECOND}.index.arrow").rename(world.shards / f"{FIRST}.index.arrow"),
        ".index.arrow gives the positions of its samples: found 2 of 5 do not: train-000000 (1), train-000001 (1)",
    ),
    "token ids of another shard": (
        lambda world: (world.shards / f"{SECOND}.token-ids.arrow").rename(world.shards / f"{FIRST}.token-ids.arrow"),
        "matches its samples' texts: found 1 of 5 do not: train-000000 (1)",
    ),
    "token ids with a flipped bit": (
        lambda world: flip_bit(world.shards / f"{SECOND}.token-ids.arrow"),
        "matches its samples' texts: found 1 of 5 do not: train-000001 (1)",
    ),
    "token ids of texts that were changed": (
        lambda world: change_keeping_token_ids(world, edit_sample(FIRST, 2, json=drop_sub_caption)),
        "matches its samples' texts: found 1 of 5 do not: train-000000 (1)",
    ),
    "a sample without its feature": (edit_sample(FIRST, npy=None), "all its parts: found 1 of 5 do not: train-000000"),
    "features with NaN": (
        edit_sample(FIRST, 3, npy=lambda values: values * np.nan),
        "no NaN or infinity: found 1 of 5 do not: train-000000 (1)",
    ),
    "features of another tower": (
        edit_sample(FIRST, npy=lambda values: values[:5]),
        "all features have the same dimension (number of dimensions): found 2",
    ),
    "a sample without its image": (edit_sample(FIRST, image=b""), "all its parts: found 1 of 5 do not: train-000000"),
    "images that are other images": (
        lambda world: world.reshard(SECOND, shift_images),
        "match the hashes of its samples: found 1 of 5 do not: train-000001 (30)",
    ),
    "a sample in two shards": (duplicate_sample, "keys are unique: found 1"),
    "an evaluation image among the training samples": (
        lambda world: leak(world) or edit_sample(FIRST, json=lambda content: leak_into(world, content))(world),
        "no training image is used for evaluation: found 1 of 5 do not: train-000000 (1)",
    ),
    "a sample without a short caption": (
        edit_sample(FIRST, json=lambda content: content | {"raw": " "}),
        "every sample of a shard has a short caption: found 1 of 5 do not: train-000000 (1)",
    ),
    "samples that no captioner described": (
        lambda world: world.reshard(FIRST, remove_captions),
        "samples without a long caption is at most 5 %: found 21.4 %",
    ),
    "a shard that is too large": (
        lambda world: world.reshard(FIRST, add_sample),
        "a shard has from 1 to 30 samples: found 1 of 5 do not: train-000000 (31)",
    ),
}  # fmt: skip


def leak_into(world: World, content: dict[str, Any]) -> dict[str, Any]:
    return content | {"sha256": read_table(world.folder, TEST, ["sha256"])["sha256"][0]}


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "line"), SHARDS.values(), ids=SHARDS)
def test_shard_gate_finds(world: World, tmp_path: Path, plant: Callable[[World], Any], line: str) -> None:
    plant(world)
    assert line in gate_error(world.gate_shard, tmp_path / "report")
