"""Images, raw and long captions and the frozen tower's features, brought together as WebDataset tars.

A sample is `key.json` (raw caption, long captions by captioner), `key.npy` (the image's feature, float32, where
features are stored) and the image as it was ingested. Beside `train-000000.tar`, `train-000000.index.arrow` says where
its samples lie (`lotlip.data.tars`), and `train-000000.done.json` is its report; it is written last.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lotlip.data.tars import write_index
from lotlip.files import remove, sha256_files, whole, write_json
from lotlip.partitions import (
    MARKER,
    TarWriter,
    finished,
    read_captions,
    read_image,
    read_index,
    read_table,
    totals,
    unit_names,
)
from lotlip.records import Failure, UnitReport
from lotlip.text import split_sub_captions

DONE = ".done.json"

# Partitions that are shuffled together. More would mix no better, and a shard would have to open all of them.
MIXED_PARTITIONS = 64

# Encodes pictures as features [n, D] float32.
Features = Callable[[list[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class ShardPlan:
    """What goes into a shard.

    Attributes:
        name: of the shard: "train-000000".
        samples: the partition and the key of each sample, in the shard's order.
    """

    name: str
    samples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Sample:
    """A sample without its image's bytes; `partition`, `offset` and `size` say where they lie."""

    key: str
    partition: str
    extension: str
    raw_caption: str
    sha256: str
    offset: int
    size: int
    captions: dict[str, list[str]]

    def json(self) -> bytes:
        content = {"raw": self.raw_caption, "captions": self.captions, "sha256": self.sha256}
        return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def plan_shards(
    ingest: Path, captions: Mapping[str, Path], split: str, samples_per_shard: int, seed: int
) -> list[ShardPlan]:
    """Shuffles the keys of a split and cuts them into shards.

    The partitions are shuffled, then the keys of every `MIXED_PARTITIONS` of them together: a shard draws from that
    many (or, where it spans two such groups, twice as many), however large the data set. Memory grows with the keys.

    Args:
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        split: of `lotlip.records.SPLITS`.
        samples_per_shard: in every shard but the last.
        seed: of the order.

    Raises:
        ValueError: a captioner has not gone through all partitions. (One that it went through and that failed as a
            whole is in its index; the caption stage's gate let it pass.)
    """
    partitions = unit_names(ingest, split)
    for captioner, folder in captions.items():
        missing = sorted(set(partitions) - {unit["name"] for unit in read_index(folder)["units"]})
        if missing:
            raise ValueError(
                f"{folder}: {captioner} has not gone through {len(missing)} partitions of {ingest} "
                f"({', '.join(missing[:5])}); run the caption stage again"
            )
    rng = random.Random(f"{seed}:{split}")
    rng.shuffle(partitions)
    samples: list[tuple[str, str]] = []
    for start in range(0, len(partitions), MIXED_PARTITIONS):
        group = partitions[start : start + MIXED_PARTITIONS]
        mixed = [(name, key) for name in group for key in read_table(ingest, name, ["key"])["key"]]
        rng.shuffle(mixed)
        samples += mixed
    starts = range(0, len(samples), samples_per_shard)
    return [
        ShardPlan(f"{split}-{index:06d}", tuple(samples[start : start + samples_per_shard]))
        for index, start in enumerate(starts)
    ]


def write_shard(
    plan: ShardPlan,
    ingest: Path,
    captions: Mapping[str, Path],
    folder: Path,
    features: Features | None,
    batch_size: int,
) -> UnitReport:
    """Writes a shard; `batch_size` images are in memory at a time.

    A sample keeps the long captions that it has. It becomes a `Failure` when its image cannot be decoded
    ("unreadable") or its feature has a NaN or an infinity ("not-finite").

    Args:
        plan: what goes in.
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        folder: where the shard goes.
        features: encodes pictures as [n, D] float32; None: images are passed on unopened, without features.
        batch_size: pictures encoded at once.

    Raises:
        ValueError: `features` gives something else than a row per picture.
    """
    path, marker = folder / f"{plan.name}.tar", folder / f"{plan.name}{DONE}"
    remove(marker)
    samples = _collect(plan, ingest, captions)
    failures: list[Failure] = []
    with whole(path) as partial, partial.open("wb") as file, TarWriter(file) as tar:
        for start in range(0, len(samples), batch_size):
            for item in _encoded(samples[start : start + batch_size], ingest, features):
                if isinstance(item, Failure):
                    failures.append(item)
                    continue
                sample, image, feature = item
                tar.add(f"{sample.key}.json", sample.json())
                if feature is not None:
                    tar.add(f"{sample.key}.npy", _npy(feature))
                tar.add(f"{sample.key}.{sample.extension}", image)
    write_index(path)
    written = len(samples) - len(failures)
    report = UnitReport(plan.name, len(plan.samples), written, sha256_files([path]), path.stat().st_size, failures)
    write_json(marker, report.to_json())
    return report


def finished_shard(name: str, folder: Path) -> UnitReport | None:
    """The report of a shard that was written whole; None where it was not."""
    return finished(name + DONE.removesuffix(MARKER), folder)


def _collect(plan: ShardPlan, ingest: Path, captions: Mapping[str, Path]) -> list[_Sample]:
    """The plan's samples in its order; tables are read a partition at a time, and only the rows needed are kept."""
    keys: dict[str, set[str]] = {}
    for partition, key in plan.samples:
        keys.setdefault(partition, set()).add(key)
    found: dict[tuple[str, str], _Sample] = {}
    for partition, wanted in keys.items():
        long: dict[str, dict[str, list[str]]] = {key: {} for key in wanted}
        for captioner in sorted(captions):
            if finished(partition, captions[captioner]) is None:  # it failed as a whole; others may have it
                continue
            table = read_captions(captions[captioner], partition, ["key", "sub_captions"])
            table = table[table["key"].isin(wanted)]
            for key, sub_captions in zip(table["key"], table["sub_captions"], strict=True):
                long[key][captioner] = sub_captions
        columns = ["key", "extension", "raw_caption", "sha256", "offset", "size"]
        table = read_table(ingest, partition, columns)
        for row in table[table["key"].isin(wanted)].to_dict("records"):
            fields = {str(name): value for name, value in row.items()}
            found[partition, row["key"]] = _Sample(partition=partition, captions=long[row["key"]], **fields)
    return [found[sample] for sample in plan.samples]


def _encoded(
    samples: Sequence[_Sample], ingest: Path, features: Features | None
) -> Iterator[tuple[_Sample, bytes, np.ndarray | None] | Failure]:
    """Each sample with its image's bytes and feature [D], or why it has none; failures may come first."""
    images = [read_image(ingest, sample.partition, sample.offset, sample.size) for sample in samples]
    if features is None:
        yield from ((sample, image, None) for sample, image in zip(samples, images, strict=True))
        return

    from lotlip.data.images import decode_rgb

    kept, pictures = [], []
    for sample, image in zip(samples, images, strict=True):
        try:
            pictures.append(decode_rgb(image))
        except ValueError as error:
            yield _failure(sample, f"the image cannot be decoded: {error}", "unreadable")
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
            yield _failure(sample, "the image tower's feature has a NaN or an infinity", "not-finite")


def _failure(sample: _Sample, reason: str, kind: str) -> Failure:
    return Failure(sample.key, f"{sample.partition}.tar: {sample.key}.{sample.extension}", reason, kind)


def _npy(feature: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, feature)
    return buffer.getvalue()


# --- what the shards have -----------------------------------------------------------------------------------------


def shard_statistics(
    ingest: Path, captions: Mapping[str, Path], split: str, count_tokens: Callable[[str], int]
) -> dict[str, dict[str, float]]:
    """How long the texts of a split are (paper, Table 1), for the raw captions and for each captioner's.

    Args:
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        split: of `lotlip.records.SPLITS`.
        count_tokens: counts a text's word pieces, special tokens not among them.

    Returns:
        "raw" or captioner's name → images, texts (totals), sub_captions_per_text, tokens_per_text (means).
    """
    raw = np.zeros(3)
    for name in unit_names(ingest, split):
        texts = read_table(ingest, name, ["raw_caption"])["raw_caption"]
        raw += [len(texts), sum(len(split_sub_captions(text)) for text in texts), sum(map(count_tokens, texts))]
    statistics = {"raw": _means(*raw)}
    for captioner in sorted(captions):
        long = np.zeros(3)
        for name in unit_names(captions[captioner], split):
            table = read_table(captions[captioner], name, ["sub_captions", "tokens"])
            long += [len(table), table["sub_captions"].map(len).sum(), table["tokens"].sum()]
        statistics[captioner] = _means(*long)
    return statistics


def _means(texts: float, sub_captions: float, tokens: float) -> dict[str, float]:
    """One text an image: a source has one raw caption for each, a captioner writes one."""
    return {
        "images": int(texts),
        "texts": int(texts),
        "sub_captions_per_text": float(sub_captions / max(texts, 1)),
        "tokens_per_text": float(tokens / max(texts, 1)),
    }


def write_shard_index(
    folder: Path, reports: Mapping[str, Sequence[UnitReport]], statistics: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Writes `index.json`: every split's shards, what failed, the statistics, one hash; `more` is added as it is.

    A shard in which all failed is not listed, so that nobody looks for it; its failures count.
    """
    splits = {
        split: {
            "samples": sum(report.written for report in shards),
            "shards": [
                {"name": report.name, "samples": report.written, "bytes": report.bytes, "sha256": report.sha256}
                for report in shards
                if report.written
            ],
        }
        for split, shards in reports.items()
    }
    every = [report for shards in reports.values() for report in shards]
    index = {"splits": splits, **totals(every), "statistics": dict(statistics), **more}
    write_json(folder / "index.json", index)
    return index


def training_vocabulary(ingest: Path, captions: Mapping[str, Path], split: str, tokenizer: str) -> list[int]:
    """Ids of the word pieces that the texts of a split use, sorted: what evaluation texts may be made of.

    Args:
        ingest: folder of the ingest stage.
        captions: captioner's name → folder of its captions.
        split: of `lotlip.records.SPLITS`.
        tokenizer: name of the word pieces.
    """
    from lotlip.data.tokenizer import used_tokens

    used: set[int] = set()
    for name in unit_names(ingest, split):
        used |= used_tokens(tokenizer, read_table(ingest, name, ["raw_caption"])["raw_caption"])
    for folder in captions.values():
        for name in unit_names(folder, split):
            used |= used_tokens(tokenizer, read_captions(folder, name, ["text"])["text"])
    return sorted(used)
