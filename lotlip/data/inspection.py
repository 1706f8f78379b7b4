"""What a stage's files are like, in numbers: what the gates expect of them, and what `lotlip verify` tells.

A function takes one unit of work and gives a row of numbers. What each number may be is a `Fact`, in one list for the
gate and for the command.
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

# Images of a partition or shard that a gate opens; `lotlip verify` opens all.
LOOKED_AT = 32


class Fact(NamedTuple):
    """What a number of a row may be.

    Attributes:
        column: its name.
        what: what should hold, in words for a person.
        low, high: both count; None: no limit.
    """

    column: str
    what: str
    low: float | None = None
    high: float | None = None

    def holds(self, value: float | None) -> bool:
        """Whether a number is as it should be; one that could not be found out is."""
        if value is None or np.isnan(value):
            return True
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


# --- partitions of images -----------------------------------------------------------------------------------------

PARTITION = (
    Fact("missing_files", "a partition's tar and table are there", high=0),
    Fact("rows_off", "a partition's table has a row for every image written", 0, 0),
    Fact("empty_captions", "a partition has no empty short caption", high=0),
    Fact("smallest_side", "images are at least 1 pixel wide and high", low=1),
    Fact("cut_images", "a partition's tar has every image whole", high=0),
    Fact("other_images", "the images in a partition's tar are those that its table has hashes of", high=0),
    Fact("unreadable_images", "the images in a partition's tar can be decoded", high=0),
    Fact("wrong_sizes", "images are as wide and high as their partition's table says", high=0),
    Fact("held_out_images", "no training image is one that is evaluated on", high=0),
)
HASH = Fact("hash_off", "a unit's files have the hash that the index says", high=0)


def inspect_partition(
    folder: Path, name: str, written: int, held_out: Collection[str], looked_at: int | None = LOOKED_AT
) -> dict[str, Any]:
    """A partition that ingest wrote, with the columns of `PARTITION` and of what follows.

    Args:
        folder: of the ingest stage.
        name: of the partition.
        written: rows that it should have.
        held_out: hashes of the images that must not be trained on.
        looked_at: how many of its images are opened; None: all.

    Returns:
        Besides: "opened", how many were opened, and "constant", those of them that are one colour all over.
    """
    row: dict[str, Any] = {"unit": name, **dict.fromkeys((fact.column for fact in PARTITION), None)}
    tar = folder / f"{name}.tar"
    row["missing_files"] = sum(not path.is_file() for path in (tar, folder / f"{name}.parquet"))
    row |= {"opened": 0, "constant": 0}
    if row["missing_files"]:
        return row
    columns = ["key", "short_caption", "width", "height", "sha256", "offset", "size"]
    table = read_table(folder, name, columns)
    whole = table["offset"] + table["size"] <= tar.stat().st_size
    row |= {
        "rows_off": len(table) - written,
        "empty_captions": blank(table["short_caption"]),
        "smallest_side": table[["width", "height"]].min(axis=None) if len(table) else None,
        "cut_images": int((~whole).sum()),
        "held_out_images": sum(name.startswith("train/") and sha256 in held_out for sha256 in table["sha256"]),
    }
    return row | _opened(folder, name, spread(table[whole], looked_at))


def _opened(folder: Path, name: str, table: pd.DataFrame) -> dict[str, int]:
    """What the images of some rows are like."""
    from lotlip.data.images import decode_rgb

    found = dict.fromkeys(("opened", "constant", "other_images", "unreadable_images", "wrong_sizes"), 0)
    for row in table.to_dict("records"):
        found["opened"] += 1
        data = read_image(folder, name, row["offset"], row["size"])
        found["other_images"] += hashlib.sha256(data).hexdigest() != row["sha256"]
        try:
            image = decode_rgb(data)
        except ValueError:
            found["unreadable_images"] += 1
            continue
        found["wrong_sizes"] += image.size != (row["width"], row["height"])
        found["constant"] += bool(np.ptp(np.asarray(image), axis=(0, 1)).max() == 0)
    return found


def spread(table: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """Rows of a table at equal distances, at most so many; None: all."""
    if most is None or len(table) <= most:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, most).astype(int)]


def blank(texts: pd.Series) -> int:
    """How many texts are null or have nothing but spaces."""
    return int((texts.fillna("").str.strip() == "").sum())


def held_out_images(ingest: Path, names: Sequence[str]) -> set[str]:
    """Hashes of the images that ingest has in other splits than train, of the partitions `names`."""
    held_out = (name for name in names if not name.startswith("train/"))
    return {sha256 for name in held_out for sha256 in read_table(ingest, name, ["sha256"])["sha256"]}


# --- partitions of captions ---------------------------------------------------------------------------------------

CAPTIONS = (
    Fact("missing_files", "a partition's table is there", high=0),
    Fact("rows_off", "a partition's table has a row for every caption written", 0, 0),
    Fact("empty_texts", "a partition has no empty caption", high=0),
    Fact("unsplit", "every caption of a partition has at least 1 sub-caption", high=0),
)


def inspect_captions(folder: Path, name: str, written: int) -> dict[str, Any]:
    """A partition that a captioner wrote, with the columns of `CAPTIONS`; arguments as of `inspect_partition`."""
    missing = int(not (folder / f"{name}.parquet").is_file())
    row: dict[str, Any] = {"unit": name, **dict.fromkeys((fact.column for fact in CAPTIONS), None)}
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
    Fact("bytes_off", "a shard's file has the size that the index says", 0, 0),
    Fact("hash_off", "a shard's file has the hash that the index says", high=0),
    Fact("samples_off", "a shard has the samples that the index says", 0, 0),
    Fact("places_off", "a shard's .index.arrow says where its samples lie", high=0),
    Fact("token_ids_off", "a shard's .token-ids.arrow, if it has one, is whole and of its samples' texts", high=0),
    Fact("incomplete", "every sample of a shard has all its parts", high=0),
    Fact("wordless", "every sample of a shard has a short caption", high=0),
    Fact("other_images", "a shard's images are those that its samples have hashes of", high=0),
    Fact("held_out_images", "no training image is one that is evaluated on", high=0),
    Fact("not_finite", "a shard's features have no NaN or infinity", high=0),
)


def inspect_shard(
    folder: Path,
    shard: ShardEntry,
    features: bool,
    held_out: Collection[str],
    looked_at: int | None = LOOKED_AT,
) -> dict[str, Any]:
    """A shard beside its line of index.json, with the columns of `SHARD` and of what follows.

    Args:
        folder: of the shards.
        shard: its line.
        features: whether its samples have features.
        held_out: hashes of the images that must not be trained on.
        looked_at: how many of its images are compared with their hashes; None: all.

    Returns:
        Besides: "samples", as its line says; "uncaptioned", samples without a long caption; "widths", how long its
        features are.
    """
    path = folder / f"{shard.name}.tar"
    size = path.stat().st_size if path.is_file() else 0
    same = size == shard.bytes and sha256_files([path]) == shard.sha256
    row: dict[str, Any] = {"shard": shard.name, **dict.fromkeys((fact.column for fact in SHARD), None)}
    row |= {"samples": shard.samples, "uncaptioned": 0, "widths": []}
    row |= {"bytes_off": size - shard.bytes, "hash_off": int(not same)}
    if not same:  # a file that is not the index's is not worth opening
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
    opened = set(spread(table, looked_at).index)
    counts = dict.fromkeys(("wordless", "other_images", "held_out_images", "not_finite", "uncaptioned"), 0)
    train, widths = shard.name.startswith("train-"), set()
    contents = []
    for number, (texts, feature, image) in enumerate(_members(path, table)):
        content = json.loads(texts)
        contents.append(content)
        counts["wordless"] += not content["raw"].strip()
        counts["uncaptioned"] += not any(content["captions"].values())
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
    """The keys of a shard whose `.index.arrow` is in order."""
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
    """Texts, feature and image of each sample; empty where it has none."""
    if table.empty:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for row in table.to_dict("records"):
            yield [data[row[f"{name}_offset"] : row[f"{name}_offset"] + row[f"{name}_size"]] for name in MEMBERS]
