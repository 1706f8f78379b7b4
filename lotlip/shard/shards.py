"""Combines images, short and long captions, and the frozen tower's features into WebDataset tars.

A sample consists of `key.json` (short caption, and long captions by captioner), `key.npy` (the image's feature,
float32, if features are stored) and the image as ingest stored it. Beside `train-000000.tar`,
`train-000000.index.arrow` gives the positions of its samples (`lotlip.data.tars`), `train-000000.token-ids.arrow` has
the token ids of its texts (`lotlip.data.token_ids`), and `train-000000.done.json` is its report, which is written after
the tar and its index.
"""

from __future__ import annotations

import io
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from lotlip.core.files import remove, write_json
from lotlip.data.index import CaptionIndex, ShardEntry, ShardIndex, SplitEntry, read_index, write_index
from lotlip.data.partitions import (
    MARKER,
    finished,
    is_marker,
    read_table,
    unit_names,
)
from lotlip.data.records import SPLITS, Failure, UnitReport
from lotlip.data.tars import write_samples
from lotlip.data.text import SentenceEnds, split_sub_captions

DONE = ".done.json"

# Partitions that are shuffled together and read at once; training shuffles across shards too (`lotlip.pretrain.order`).
MIXED_PARTITIONS = 16

# Approximate size of a sample in a tar besides its image: headers, texts, feature.
_OVERHEAD_BYTES = 8192

# Encodes pictures as features [n, D] float32.
Features = Callable[[list[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class ShardPlan:
    """The contents of a shard: a range of the shuffled samples of a group of partitions.

    Attributes:
        name: of the shard: "train-000000".
        partitions: of the group.
        seed: of the group's order.
        start, stop: range in the group's order.
    """

    name: str
    partitions: tuple[str, ...]
    seed: tuple[int, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(
    ingest: Path, captions: Mapping[str, Path], split: str, samples_per_shard: int, seed: int, max_bytes: int = 2**40
) -> list[ShardPlan]:
    """Shuffles the samples of a split and cuts them into shards.

    The partitions are shuffled, then the samples of each group of `MIXED_PARTITIONS` partitions; a shard belongs to one
    group. Memory is that of one group, however large the data set.

    Args:
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        split: of `lotlip.data.records.SPLITS`.
        samples_per_shard: maximum.
        seed: of the order.
        max_bytes: approximate maximum size of a shard, which has at least one sample.

    Raises:
        ValueError: a captioner has not processed all partitions. (A partition that failed as a whole is in its index;
            the caption stage's gate let it pass.)
    """
    partitions = unit_names(ingest, split)
    for captioner, folder in captions.items():
        missing = sorted(set(partitions) - {unit.name for unit in read_index(folder, CaptionIndex).units})
        if missing:
            raise ValueError(
                f"{folder}: {captioner} has not processed {len(missing)} partitions of {ingest} "
                f"({', '.join(missing[:5])}); rerun the caption stage"
            )
    split_seed = (seed, SPLITS.index(split))
    shuffled = [partitions[number] for number in np.random.default_rng(split_seed).permutation(len(partitions))]
    plans: list[ShardPlan] = []
    for first in range(0, len(shuffled), MIXED_PARTITIONS):
        group = tuple(shuffled[first : first + MIXED_PARTITIONS])
        sizes = np.concatenate([read_table(ingest, name, ["size"])["size"].to_numpy() for name in group])
        group_seed = (*split_seed, first)
        for start, stop in _cut(sizes[_order(group_seed, len(sizes))] + _OVERHEAD_BYTES, samples_per_shard, max_bytes):
            plans.append(ShardPlan(f"{split}-{len(plans):06d}", group, group_seed, start, stop))
    return plans


def _order(seed: Sequence[int], samples: int) -> np.ndarray:
    return np.random.default_rng([*seed, 1]).permutation(samples)


def _cut(sizes: np.ndarray, most: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `most` samples whose sizes add up to at most `max_bytes`; a range has at least one sample."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + max_bytes, side="right"))
        stop = min(max(stop, start + 1), start + most, len(sizes))
        yield start, stop
        start = stop


class PartitionGroup:
    """The samples of some partitions, without their images, which are read on demand.

    Args:
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        partitions: names.
    """

    def __init__(self, ingest: Path, captions: Mapping[str, Path], partitions: Sequence[str]) -> None:
        self._partitions = partitions
        self._tars = [os.open(ingest / f"{name}.tar", os.O_RDONLY) for name in partitions]
        weakref.finalize(self, _close, self._tars)
        self._captioners = sorted(captions)
        columns = ["key", "extension", "short_caption", "sha256", "offset", "size"]
        tables = []
        for number, name in enumerate(partitions):
            table = pq.read_table(ingest / f"{name}.parquet", columns=columns)
            for captioner in self._captioners:
                table = table.append_column(captioner, self._sub_captions(captions[captioner], name, table["key"]))
            tables.append(table.append_column("partition", pa.array([number] * len(table), pa.int32())))
        self._samples = pa.concat_tables(tables).combine_chunks()

    def _sub_captions(self, folder: Path, partition: str, keys: pa.ChunkedArray) -> pa.ChunkedArray:
        """A captioner's sub-captions for each key; null if it has none."""
        if finished(partition, folder) is None:  # it failed as a whole; other captioners may have it
            return pa.chunked_array([pa.nulls(len(keys), pa.list_(pa.string()))])
        table = pq.read_table(folder / f"{partition}.parquet", columns=["key", "sub_captions"])
        return table["sub_captions"].take(pc.index_in(keys, table["key"].combine_chunks()))

    def __len__(self) -> int:
        return len(self._samples)

    def samples(self, rows: np.ndarray) -> list[_Sample]:
        """The samples of some rows, without their images."""
        samples = []
        for row in self._samples.take(rows).to_pylist():
            long = {name: row[name] for name in self._captioners if row[name] is not None}
            place = (row["partition"], row["offset"], row["size"])
            samples.append(_Sample(row["key"], row["extension"], row["short_caption"], row["sha256"], long, *place))
        return samples

    def image(self, sample: _Sample) -> bytes:
        """A sample's encoded image."""
        return os.pread(self._tars[sample.partition], sample.size, sample.offset)

    def where(self, sample: _Sample) -> str:
        """The location of a sample's image, in a form that a person can look up."""
        return f"{self._partitions[sample.partition]}.tar: {sample.key}.{sample.extension}"


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def group_reader(ingest: Path, captions: Mapping[str, Path]) -> Callable[[tuple[str, ...]], PartitionGroup]:
    """Returns a function that reads a group of partitions; it caches the last one for the group's other shards."""
    cached = lru_cache(maxsize=1)(lambda partitions, _: PartitionGroup(ingest, captions, partitions))
    lock = threading.Lock()

    def read(partitions: tuple[str, ...]) -> PartitionGroup:
        # a worker that is sent a shard's images has other files for each shard
        files = tuple((ingest / f"{name}.tar").stat().st_ino for name in partitions)
        with lock:  # otherwise several threads would read the same group
            return cached(partitions, files)

    return read


def image_ranges(plan: ShardPlan, ingest: Path) -> dict[str, list[tuple[int, int]]]:
    """Partition of a shard's group → offset and size of each image in its tar that the shard has."""
    group = PartitionGroup(ingest, {}, plan.partitions)
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in plan.partitions}
    for sample in group.samples(np.sort(_rows(plan, group))):
        ranges[plan.partitions[sample.partition]].append((sample.offset, sample.size))
    return ranges


def _rows(plan: ShardPlan, group: PartitionGroup) -> np.ndarray:
    """The samples of a shard, in order, by their places in its group."""
    return _order(plan.seed, len(group))[plan.start : plan.stop]


@dataclass(frozen=True)
class _Sample:
    """A sample without its image's bytes; `partition`, `offset` and `size` give their position."""

    key: str
    extension: str
    short_caption: str
    sha256: str
    captions: dict[str, list[str]]
    partition: int
    offset: int
    size: int

    def json(self) -> bytes:
        content = {"raw": self.short_caption, "captions": self.captions, "sha256": self.sha256}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def write_shard(
    plan: ShardPlan, group: PartitionGroup, folder: Path, features: Features | None, batch_size: int
) -> UnitReport:
    """Writes a shard; `batch_size` images are in memory at a time.

    A sample keeps the long captions that it has. It becomes a `Failure` if its image cannot be decoded
    ("unreadable") or its feature has a NaN or an infinity ("not-finite").

    Args:
        plan: contents of the shard.
        group: its partitions, as `group_reader` reads them.
        folder: for the shard.
        features: encodes pictures as [n, D] float32; None: images are copied without decoding, without features.
        batch_size: pictures encoded at once.

    Raises:
        ValueError: `features` does not return one row per picture.
    """
    path, marker = folder / f"{plan.name}.tar", folder / f"{plan.name}{DONE}"
    remove(marker, ours=is_marker)
    rows = _rows(plan, group)
    failures: list[Failure] = []
    with write_samples(path) as tar:
        for start in range(0, len(rows), batch_size):
            for item in _encoded(group.samples(rows[start : start + batch_size]), group, features):
                if isinstance(item, Failure):
                    failures.append(item)
                    continue
                sample, image, feature = item
                npy = None if feature is None else _npy(feature)
                tar.add(sample.key, sample.json(), npy, image, sample.extension)
    written = len(rows) - len(failures)
    report = UnitReport(plan.name, len(rows), written, tar.sha256, path.stat().st_size, failures)
    write_json(marker, asdict(report))
    return report


def finished_shard(name: str, folder: Path) -> UnitReport | None:
    """The report of a complete shard; None if the shard is not complete."""
    return finished(name + DONE.removesuffix(MARKER), folder)


def _encoded(
    samples: Sequence[_Sample], group: PartitionGroup, features: Features | None
) -> Iterator[tuple[_Sample, bytes, np.ndarray | None] | Failure]:
    """Each sample with its image's bytes and feature [D], or its failure; failures may come first."""
    images = [group.image(sample) for sample in samples]
    if features is None:
        yield from ((sample, image, None) for sample, image in zip(samples, images, strict=True))
        return

    from lotlip.data.images import decode_rgb

    kept, pictures = [], []
    for sample, image in zip(samples, images, strict=True):
        try:
            pictures.append(decode_rgb(image))
        except ValueError as error:
            yield Failure(sample.key, group.where(sample), f"the image cannot be decoded: {error}", "unreadable")
        else:
            kept.append((sample, image))
    if not kept:
        return
    rows = np.asarray(features(pictures), dtype=np.float32)  # [n, D]
    if rows.ndim != 2 or len(rows) != len(pictures):
        raise ValueError(
            f"the image tower gave features of shape {rows.shape} for {len(pictures)} pictures, not [n, D]"
        )
    for (sample, image), row in zip(kept, rows, strict=True):
        if np.isfinite(row).all():
            yield sample, image, row
        else:
            reason = "the image tower's feature has a NaN or an infinity"
            yield Failure(sample.key, group.where(sample), reason, "not-finite")


def _npy(feature: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, feature)
    return buffer.getvalue()


# --- statistics and index -----------------------------------------------------------------------------------------


def shard_statistics(
    ingest: Path,
    captions: Mapping[str, Path],
    split: str,
    count_tokens: Callable[[str], int],
    sentence_ends: SentenceEnds = "released",
) -> dict[str, dict[str, float]]:
    """Statistics of a split's texts (paper, Table 1), for the short captions and for those of each captioner.

    Args:
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        split: of `lotlip.data.records.SPLITS`.
        count_tokens: counts a text's word pieces, without special tokens.
        sentence_ends: splits the short captions into sub-captions; the long ones are stored split.

    Returns:
        "raw" or captioner's name → images, texts (totals), sub_captions_per_text, tokens_per_text (means).
    """
    raw = np.zeros(3)
    for name in unit_names(ingest, split):
        texts = read_table(ingest, name, ["short_caption"])["short_caption"]
        parts = sum(len(split_sub_captions(text, sentence_ends)) for text in texts)
        raw += [len(texts), parts, sum(map(count_tokens, texts))]
    statistics = {"raw": _means(*raw)}
    for captioner in sorted(captions):
        long = np.zeros(3)
        for name in unit_names(captions[captioner], split):
            table = read_table(captions[captioner], name, ["sub_captions", "tokens"])
            long += [len(table), table["sub_captions"].map(len).sum(), table["tokens"].sum()]
        statistics[captioner] = _means(*long)
    return statistics


def _means(texts: float, sub_captions: float, tokens: float) -> dict[str, float]:
    """Means per text. Every image has one text: one short caption, or one long caption per captioner."""
    return {
        "images": int(texts),
        "texts": int(texts),
        "sub_captions_per_text": float(sub_captions / max(texts, 1)),
        "tokens_per_text": float(tokens / max(texts, 1)),
    }


def write_shard_index(
    folder: Path, reports: Mapping[str, Sequence[UnitReport]], statistics: Mapping[str, Any], **more: Any
) -> ShardIndex:
    """Writes `index.json`: the shards of every split, failures, statistics and one hash; `more` are other fields.

    A shard whose samples all failed is not listed, because it has no tar, but its failures count.
    """
    splits = {
        split: SplitEntry(
            samples=sum(report.written for report in shards),
            shards=[
                ShardEntry(name=report.name, samples=report.written, bytes=report.bytes, sha256=report.sha256)
                for report in shards
                if report.written
            ],
        )
        for split, shards in reports.items()
    }
    every = [report for shards in reports.values() for report in shards]
    return write_index(folder, every, ShardIndex, splits=splits, statistics=statistics, **more)
