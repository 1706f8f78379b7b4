"""A small data set that passed ingest, caption and shard, and methods that plant a defect in it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lotlip.caption.config import CaptionConfig
from lotlip.caption.gate import gate_caption
from lotlip.caption.partition import Captioning
from lotlip.caption.quality import assess, measured
from lotlip.caption.store import Partition
from lotlip.core.checks import Check
from lotlip.core.files import read_json, write_json
from lotlip.data.duplicates import unique_partitions
from lotlip.data.index import CaptionIndex, ShardIndex, UnitIndex, read_index, write_index
from lotlip.data.inspection import held_out_images
from lotlip.data.partitions import (
    finished,
    read_captions,
    read_table,
    unit_names,
    write_captions,
)
from lotlip.data.partitions import write_partitions as write_unit
from lotlip.data.records import Caption, UnitReport
from lotlip.data.tars import scan_tar, write_samples
from lotlip.data.text import split_sub_captions
from lotlip.data.token_ids import write_token_ids
from lotlip.ingest.config import IngestConfig
from lotlip.ingest.gate import gate_ingest
from lotlip.ingest.sources import open_source
from lotlip.shard.config import ShardConfig
from lotlip.shard.gate import gate_shard
from lotlip.shard.shards import group_reader, plan_shards, write_shard, write_shard_index

SPLITS = ("train", "val", "test")
INGEST = IngestConfig(
    source={
        "kind": "scenes", "path": "lotlip/demo/world.py", "image_size": 32, "train": 120, "val": 20, "test": 40
    },
    partition_size=40,
)  # fmt: skip
STYLES = ("instructblip", "llava")
CAPTION = CaptionConfig(
    captioners={
        name: {"kind": "scenes", "path": "lotlip/demo/captioner.py", "style": name} for name in STYLES
    }
)  # fmt: skip
SHARD = ShardConfig(samples_per_shard=30)
Sample = dict[str, Any]  # "key", "json" (a dict), "npy" (an array or None), "image" (bytes)


def features(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture.resize((2, 2)), dtype=np.float32).ravel() for picture in images])


@dataclass
class World:
    """The folders of a run, and the other inputs of its gates.

    Attributes:
        folder: contains ingest, captions/<captioner> and shards.
        evaluation: hashes of the images of an evaluation set.
        broken: reports of units that failed completely.
    """

    folder: Path
    evaluation: set[str] = field(default_factory=set)
    broken: list[UnitReport] = field(default_factory=list)

    @property
    def ingest(self) -> Path:
        return self.folder / "ingest"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def captions(self, captioner: str) -> Path:
        return self.folder / "captions" / captioner

    def copy(self, folder: Path) -> World:
        shutil.copytree(self.folder, folder)
        return World(folder)

    # --- the gates ---

    def gate_ingest(self, report: Path) -> list[Check]:
        reports = [*_reports(self.ingest), *self.broken]
        return gate_ingest(INGEST, self.ingest, reports, len(reports), self.evaluation, report)

    def gate_caption(self, report: Path, captioner: str = "llava") -> list[Check]:
        folder = self.captions(captioner)
        return gate_caption(CAPTION, folder, [*_reports(folder), *self.broken], report)

    def gate_shard(self, report: Path) -> list[Check]:
        held_out = held_out_images(self.ingest, unit_names(self.ingest)) | self.evaluation
        return gate_shard(SHARD, self.shards, read_index(self.shards, ShardIndex), 140, held_out, None, report)

    # --- planting defects ---

    def recaption(self, unit: str, change: Callable[[list[Caption]], list[Caption]]) -> None:
        """Replaces a partition's captions of `llava`, then measures and filters them."""
        folder = self.captions("llava")
        names = [field.name for field in fields(Caption)]
        written = [Caption(**row) for row in read_captions(folder, unit, names).to_dict("records")]
        images = read_table(self.ingest, unit, ["key", "short_caption"])
        captions = [replace(caption, sub_captions=split_sub_captions(caption.text)) for caption in change(written)]
        kept = assess(
            measured(captions, dict(zip(images["key"], images["short_caption"], strict=True))), CAPTION.quality
        )
        write_captions(unit, kept, len(captions), folder)

    def edit(self, path: str, change: Callable[[pd.DataFrame], Any]) -> None:
        """Changes a partition's table in place, or replaces it by what `change` returns."""
        file = self.folder / f"{path}.parquet"
        schema = pq.read_schema(file)
        table = pq.read_table(file).to_pandas()
        changed = change(table)
        table = table if changed is None else changed
        pq.write_table(pa.Table.from_pandas(table, schema, preserve_index=False), file)

    def report(self, path: str, **changes: Any) -> None:
        """Changes fields of a partition's report."""
        marker = self.folder / f"{path}.json"
        write_json(marker, json.loads(marker.read_text()) | changes)

    def reshard(self, name: str, change: Callable[[list[Sample]], Any]) -> None:
        """Rewrites a shard and its entry in index.json with changed samples, like a faulty program."""
        path = self.shards / f"{name}.tar"
        data = path.read_bytes()
        samples = []
        for row in scan_tar(path).to_pylist():
            part = {kind: data[row[f"{kind}_offset"] :][: row[f"{kind}_size"]] for kind in ("json", "npy", "image")}
            npy = np.load(io.BytesIO(part["npy"]))
            samples.append({"key": row["key"], "json": json.loads(part["json"]), "npy": npy, "image": part["image"]})
        changed = change(samples)
        samples = samples if changed is None else changed
        with write_samples(path) as tar:
            for sample in samples:
                npy = None if sample["npy"] is None else _npy(sample["npy"])
                tar.add(sample["key"], json.dumps(sample["json"]).encode(), npy, sample["image"], "png")
        self.index(name, bytes=path.stat().st_size, sha256=tar.sha256, samples=len(samples))

    def index(self, name: str, **changes: Any) -> None:
        """Changes a shard's entry in index.json."""
        index = read_json(self.shards / "index.json")
        for shard in index["splits"][name.partition("-")[0]]["shards"]:
            if shard["name"] == name:
                shard.update(changes)
        write_json(self.shards / "index.json", index)


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _reports(folder: Path) -> list[UnitReport]:
    return [report for name in unit_names(folder) if (report := finished(name, folder))]


def build(folder: Path) -> World:
    """A world without defects, written by the code of the stages."""
    world, source = World(folder), open_source(INGEST.source)
    units = source.units(INGEST.partition_size)
    written = [
        report
        for unit in units
        for report in write_unit(unit, source.read(unit), folder / "units", source.split)
    ]  # fmt: skip
    reports = unique_partitions(folder / "units", written, world.ingest, {})
    shutil.rmtree(folder / "units")
    write_index(world.ingest, reports, UnitIndex)
    for name in STYLES:
        out = world.captions(name)
        work = Captioning(name, CAPTION, world.ingest, folder / "store", out)
        write_index(out, [done for report in reports for done in work(_partition(report))], CaptionIndex)
    captions = {name: world.captions(name) for name in STYLES}
    group = group_reader(world.ingest, captions)
    shards = {
        split: [
            write_shard(plan, group(plan.partitions), world.shards, features, 16)
            for plan in plan_shards(world.ingest, captions, split, SHARD.samples_per_shard, 0)
        ]
        for split in SPLITS[:2]
    }
    for report in (report for reports in shards.values() for report in reports):
        write_token_ids(world.shards / f"{report.name}.tar", "bert-base-uncased")
    write_shard_index(world.shards, shards, {"raw": {}, **{name: {} for name in STYLES}}, features=True, vocabulary=[])
    return world


def _partition(report: UnitReport) -> Partition:
    return Partition(report.name, report.written, report.sha256)
