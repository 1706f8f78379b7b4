"""Statistics of a stage's files, one row per unit, and the invariants that gates and `lotlip verify` check.

An `inspect_…` function turns one unit of work into a row of numbers. One list of invariants limits these numbers, for
both the gate and the command.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lotlip.core.files import sha256_files
from lotlip.data.index import ShardEntry
from lotlip.data.partitions import read_captions, read_image, read_table
from lotlip.data.tars import MEMBERS, TarSamples, index_path, read_index, scan_tar
from lotlip.data.text import split_sub_captions

# How many images of a partition or shard a gate opens; `lotlip verify` opens all of them.
SAMPLED_IMAGES = 32


class Invariant(NamedTuple):
    """The allowed range of a number in a row.

    Attributes:
        column: of the number.
        what: the invariant in words for a person.
        low, high: inclusive limits; None: no limit.
    """

    column: str
    what: str
    low: float | None = None
    high: float | None = None

    def holds(self, value: float | None) -> bool:
        """Whether a number is in range; a missing number counts as in range."""
        if value is None or np.isnan(value):
            return True
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


# --- partitions of images -----------------------------------------------------------------------------------------

PARTITION = (
    Invariant("missing_files", "a partition has its tar and its table", high=0),
    Invariant("rows_off", "a partition's table has a row for every image written", 0, 0),
    Invariant("empty_captions", "a partition has no empty short caption", high=0),
    Invariant("smallest_side", "images are at least 1 pixel wide and high", low=1),
    Invariant("cut_images", "a partition's tar has every image in full", high=0),
    Invariant("other_images", "the images in a partition's tar match the hashes in its table", high=0),
    Invariant("unreadable_images", "the images in a partition's tar can be decoded", high=0),
    Invariant("wrong_sizes", "images are as wide and high as their partition's table says", high=0),
    Invariant("held_out_images", "no training image is used for evaluation", high=0),
)
HASH = Invariant("hash_off", "a unit's files have the hash that the index says", high=0)


def inspect_partition(
    folder: Path, name: str, written: int, held_out: Collection[str], sample_size: int | None = SAMPLED_IMAGES
) -> dict[str, Any]:
    """Statistics of a partition that ingest wrote, with the columns of `PARTITION` and those below.

    Args:
        folder: of the ingest stage.
        name: of the partition.
        written: rows that it should have.
        held_out: hashes of images that must not be trained on.
        sample_size: how many of its images are opened; None: all.

    Returns:
        Also "opened", the number of opened images, and "constant", how many of these have a single colour.
    """
    row: dict[str, Any] = {"unit": name, **dict.fromkeys((invariant.column for invariant in PARTITION), None)}
    tar = folder / f"{name}.tar"
    row["missing_files"] = sum(not path.is_file() for path in (tar, folder / f"{name}.parquet"))
    row |= {"opened": 0, "constant": 0}
    if row["missing_files"]:
        return row
    columns = ["key", "short_caption", "width", "height", "sha256", "offset", "size"]
    table = read_table(folder, name, columns)
    complete = table["offset"] + table["size"] <= tar.stat().st_size
    row |= {
        "rows_off": len(table) - written,
        "empty_captions": blank(table["short_caption"]),
        "smallest_side": table[["width", "height"]].min(axis=None) if len(table) else None,
        "cut_images": int((~complete).sum()),
        "held_out_images": sum(name.startswith("train/") and sha256 in held_out for sha256 in table["sha256"]),
    }
    return row | _inspect_images(folder, name, spread(table[complete], sample_size))


def _inspect_images(folder: Path, name: str, table: pd.DataFrame) -> dict[str, int]:
    """Statistics of the images of some rows."""
    from lotlip.data.images import decode_rgb

    counts = dict.fromkeys(("opened", "constant", "other_images", "unreadable_images", "wrong_sizes"), 0)
    for row in table.to_dict("records"):
        counts["opened"] += 1
        data = read_image(folder, name, row["offset"], row["size"])
        counts["other_images"] += hashlib.sha256(data).hexdigest() != row["sha256"]
        try:
            image = decode_rgb(data)
        except ValueError:
            counts["unreadable_images"] += 1
            continue
        counts["wrong_sizes"] += image.size != (row["width"], row["height"])
        counts["constant"] += bool(np.ptp(np.asarray(image), axis=(0, 1)).max() == 0)
    return counts


def spread(table: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """At most `most` rows of a table, evenly spaced; None: all."""
    if most is None or len(table) <= most:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, most).astype(int)]


def blank(texts: pd.Series) -> int:
    """How many texts are null or blank."""
    return int((texts.fillna("").str.strip() == "").sum())


def held_out_images(ingest: Path, names: Sequence[str]) -> set[str]:
    """Hashes of the images in ingest's partitions `names` that are not in the train split."""
    held_out = (name for name in names if not name.startswith("train/"))
    return {sha256 for name in held_out for sha256 in read_table(ingest, name, ["sha256"])["sha256"]}


# --- partitions of captions ---------------------------------------------------------------------------------------

CAPTIONS = (
    Invariant("missing_files", "a partition has its table", high=0),
    Invariant("rows_off", "a partition's table has a row for every caption written", 0, 0),
    Invariant("empty_texts", "a partition has no empty caption", high=0),
    Invariant("unsplit", "every caption of a partition has at least 1 sub-caption", high=0),
)


def inspect_captions(folder: Path, name: str, written: int) -> dict[str, Any]:
    """Statistics of a partition that a captioner wrote, with the columns of `CAPTIONS`; arguments as above."""
    missing = int(not (folder / f"{name}.parquet").is_file())
    row: dict[str, Any] = {"unit": name, **dict.fromkeys((invariant.column for invariant in CAPTIONS), None)}
    row["missing_files"] = missing
    if missing:
        return row
    table = read_captions(folder, name, ["text", "sub_captions"])
    return row | {
        "rows_off": len(table) - written,
        "empty_texts": blank(table["text"]),
        "unsplit": int((table["sub_captions"].map(len) == 0).sum()),
    }


# --- shards -------------------------------------------------------------------------------------------------------

SHARD = (
    Invariant("bytes_off", "a shard's file has the size that the index says", 0, 0),
    Invariant("hash_off", "a shard's file has the hash that the index says", high=0),
    Invariant("samples_off", "a shard has the samples that the index says", 0, 0),
    Invariant("places_off", "a shard's .index.arrow gives the positions of its samples", high=0),
    Invariant("token_ids_off", "a shard's .token-ids.arrow, if it has one, matches its samples' texts", high=0),
    Invariant("incomplete", "every sample of a shard has all its parts", high=0),
    Invariant("wordless", "every sample of a shard has a short caption", high=0),
    Invariant("other_images", "a shard's images match the hashes of its samples", high=0),
    Invariant("held_out_images", "no training image is used for evaluation", high=0),
    Invariant("not_finite", "a shard's features have no NaN or infinity", high=0),
)


def inspect_shard(
    folder: Path,
    shard: ShardEntry,
    features: bool,
    held_out: Collection[str],
    sample_size: int | None = SAMPLED_IMAGES,
    rewriters: Collection[str] = (),
) -> dict[str, Any]:
    """Statistics of a shard, compared with its entry in index.json, with the columns of `SHARD` and those below.

    Args:
        folder: of the shards.
        shard: its entry.
        features: whether its samples have features.
        held_out: hashes of images that must not be trained on.
        sample_size: how many of its images are compared with their hashes; None: all.
        rewriters: captioners whose texts are no long captions.

    Returns:
        Also "samples", as in its entry; "uncaptioned", samples without a long caption; "widths", the dimensions of its
        features.
    """
    path = folder / f"{shard.name}.tar"
    size = path.stat().st_size if path.is_file() else 0
    same = size == shard.bytes and sha256_files([path]) == shard.sha256
    row: dict[str, Any] = {"shard": shard.name, **dict.fromkeys((invariant.column for invariant in SHARD), None)}
    row |= {"samples": shard.samples, "uncaptioned": 0, "widths": []}
    row |= {"bytes_off": size - shard.bytes, "hash_off": int(not same)}
    if not same:  # a file that the index does not describe is not opened
        return row
    try:
        samples = scan_tar(path)
    except ValueError:  # a sample twice, or without its texts
        return row | {"incomplete": 1}
    table = samples.to_pandas()
    parts = (table[["json_size", "npy_size", "image_size"]] > 0).sum(axis=1)
    row |= {
        "samples_off": len(table) - shard.samples,
        "places_off": int(not _indexed(path, samples)),
        "incomplete": int((parts != (3 if features else 2)).sum()),
    }
    opened = set(spread(table, sample_size).index)
    counts = dict.fromkeys(("wordless", "other_images", "held_out_images", "not_finite", "uncaptioned"), 0)
    train, widths = shard.name.startswith("train-"), set()
    contents = []
    for number, (texts, feature, image) in enumerate(_members(path, table)):
        content = json.loads(texts)
        contents.append(content)
        counts["wordless"] += not content["raw"].strip()
        counts["uncaptioned"] += not any(text for name, text in content["captions"].items() if name not in rewriters)
        counts["held_out_images"] += train and content["sha256"] in held_out
        if number in opened:
            counts["other_images"] += hashlib.sha256(image).hexdigest() != content["sha256"]
        if len(feature):
            values = np.load(io.BytesIO(feature), allow_pickle=False)
            counts["not_finite"] += not np.isfinite(values).all()
            widths.add(values.shape[-1])
    if row["places_off"] == 0:  # else training does not open it
        row["token_ids_off"] = _token_ids_off(path, contents)
    return row | counts | {"widths": sorted(widths)}


def read_keys(path: Path) -> pd.Series:
    """The keys of a shard that has a valid `.index.arrow`."""
    return read_index(path, path.stat().st_size)["key"].to_pandas()


def _indexed(path: Path, samples: Any) -> bool:
    if not index_path(path).is_file():
        return False
    try:
        return bool(read_index(path, path.stat().st_size).equals(samples))
    except ValueError:
        return False


def _token_ids_off(path: Path, contents: Sequence[Mapping[str, Any]]) -> int | None:
    """Whether token ids beside a shard differ from what was written, or from its samples in numbers of sub-captions."""
    from lotlip.data.token_ids import read_token_ids

    try:
        stored = read_token_ids(TarSamples(path))
        if stored is None:
            return None
        for row, content in enumerate(contents):
            short, long = stored.captions(row)
            written = {name: len(parts) for name, parts in content["captions"].items() if parts}
            if written != {name: len(parts) for name, parts in long.items() if parts} or len(short) != len(
                split_sub_captions(content["raw"], stored.sentence_ends)
            ):
                return 1
        return int(not stored.intact())
    except ValueError:
        return 1


def _members(path: Path, table: pd.DataFrame) -> Iterator[list[bytes]]:
    """Texts, feature and image of each sample; empty bytes for a missing one."""
    if table.empty:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for row in table.to_dict("records"):
            yield [data[row[f"{name}_offset"] : row[f"{name}_offset"] + row[f"{name}_size"]] for name in MEMBERS]
