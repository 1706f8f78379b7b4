"""Measures speed and memory of writing shards: `python -m benchmarks.shard`.

It creates small JPEGs with a short and three long captions each, as files and as partitions like those of ingest and
captioners. It writes tars of 1,000 samples from them with three writers: ours (from partitions: shuffled, hashed,
indexed), webdataset's `ShardWriter` and GNU tar (both from the files, in order). A round runs each writer once. Rates
are medians over rounds, and ratios are medians of the rounds' ratios. Then ours runs with a quarter, half and all of
the samples. Memory is the peak of a process that does the stages' work on existing partitions: duplicate search, both
gates, shards and statistics. It is measured for two numbers of partitions, of which the second is ten times the first.
`--json` prints one object.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from benchmarks.data import CAPTIONERS, sentence
from lotlip.core.files import SCRATCH, remove
from lotlip.data.duplicates import unique_partitions
from lotlip.data.index import CaptionIndex, ShardIndex, UnitIndex, read_index, write_index
from lotlip.data.inspection import held_out_images
from lotlip.data.partitions import finished, unit_names, write_captions, write_partitions
from lotlip.data.records import Caption, ImageRecord, Unit, UnitReport
from lotlip.ingest.config import IngestConfig
from lotlip.shard.config import ShardConfig
from lotlip.shard.shards import group_reader, plan_shards, shard_statistics, write_shard, write_shard_index

PER_SHARD = 1000
MEMORY_PARTITION = 250  # samples per partition when memory is measured


def records(samples: int) -> list[ImageRecord]:
    """Returns small JPEGs, all different, with short captions."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    image_records = []
    for number in range(samples):
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        image = file.getvalue()
        sha256 = hashlib.sha256(image).hexdigest()
        image_records.append(ImageRecord(f"s{number:08d}", image, "jpg", sentence(rng), 96, 96, sha256))
    return image_records


def write_data(folder: Path, samples: int, partition: int) -> None:
    """Writes `folder/ingest` and `folder/captions/<captioner>` with `partition` samples per partition."""
    rng = random.Random(1)
    all_records = records(samples)
    reports: dict[str, list[UnitReport]] = {name: [] for name in ("ingest", *CAPTIONERS)}
    for index, start in enumerate(range(0, samples, partition)):
        part = all_records[start : start + partition]
        split = "test" if index == 0 and samples > partition else "train"
        unit = Unit(split, index, tuple(record.key for record in part))
        reports["ingest"] += write_partitions(unit, part, folder / "ingest", split_of=str)
        for name in CAPTIONERS:
            texts = [[sentence(rng) for _ in range(8)] for _ in part]
            captions = [
                Caption(record.key, name, ". ".join(text), text, 90, "stop", "r", "")
                for record, text in zip(part, texts, strict=True)
            ]
            reports[name].append(write_captions(unit.name, captions, len(part), folder / "captions" / name))
    write_index(folder / "ingest", reports["ingest"], UnitIndex)
    for name in CAPTIONERS:
        write_index(folder / "captions" / name, reports[name], CaptionIndex)


# --- three writers ------------------------------------------------------------------------------------------------


def ours(data: Path, out: Path) -> list[UnitReport]:
    """Writes all shards of the training split with this project's writer."""
    captions = {name: data / "captions" / name for name in CAPTIONERS}
    group = group_reader(data / "ingest", captions)
    plans = plan_shards(data / "ingest", captions, "train", PER_SHARD, 0)
    return [write_shard(plan, group(plan.partitions), out, None, 250) for plan in plans]


def with_webdataset(files: list[str], folder: Path, out: Path) -> None:
    """Writes the same samples with webdataset's writer."""
    out.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(out / "train-%06d.tar"), maxcount=PER_SHARD, verbose=0) as sink:
        for key in files:
            content = json.loads((folder / f"{key}.json").read_bytes())
            sink.write({"__key__": key, "json": content, "jpg": (folder / f"{key}.jpg").read_bytes()})


def with_gnu_tar(files: list[str], folder: Path, out: Path) -> None:
    """Writes the same files with GNU tar."""
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(files), PER_SHARD)):
        names = "\n".join(f"{key}.{end}" for key in files[start : start + PER_SHARD] for end in ("json", "jpg"))
        command = ["tar", "--create", f"--file={out / f'train-{number:06d}.tar'}", f"--directory={folder}"]
        subprocess.run([*command, "--files-from=-"], input=names, text=True, check=True)


def unpack(shards: Path, folder: Path) -> list[str]:
    """Writes the shards' samples as files; returns their keys."""
    keys = []
    folder.mkdir()
    for sample in wds.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False):
        keys.append(sample["__key__"])
        for end in ("json", "jpg"):
            (folder / f"{keys[-1]}.{end}").write_bytes(sample[end])
    return sorted(keys)


def seconds(write: Callable[[Path], Any], folder: Path) -> float:
    """Measures the seconds that a writer takes, and removes its output."""
    out = folder / SCRATCH / "out"
    out.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    write(out)
    duration = time.perf_counter() - start
    remove(out)
    return duration


# --- memory -------------------------------------------------------------------------------------------------------


def all_stages(data: Path) -> None:
    """Does the work of ingest, shard and their gates on existing partitions."""
    from lotlip.ingest.gate import gate_ingest
    from lotlip.shard.gate import gate_shard

    ingest, shards = data / "unique", data / "shards"
    reports = [report for name in unit_names(data / "ingest") if (report := finished(name, data / "ingest"))]
    unique = unique_partitions(data / "ingest", reports, ingest, {})
    write_index(ingest, unique, UnitIndex)
    settings = IngestConfig(source={"kind": "folder", "path": data})
    gate_ingest(settings, ingest, unique, len(unique), (), data / "gate")
    captions = {name: data / "captions" / name for name in CAPTIONERS}
    group = group_reader(ingest, captions)
    plans = plan_shards(ingest, captions, "train", PER_SHARD, 0)
    written = [write_shard(plan, group(plan.partitions), shards, None, 250) for plan in plans]
    statistics = shard_statistics(ingest, captions, "train", len)
    write_shard_index(shards, {"train": written}, statistics, features=False, vocabulary=[])
    held_out = held_out_images(ingest, unit_names(ingest))
    sizes = ShardConfig(samples_per_shard=PER_SHARD, store_features=False)
    gate_shard(sizes, shards, read_index(shards, ShardIndex), sum(map(len, plans)), held_out, None, data / "gate")


def peak_memory(partitions: int) -> float:
    """Measures the peak memory of a separate process that runs `all_stages`, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), partitions * MEMORY_PARTITION, MEMORY_PARTITION)
        command = [sys.executable, "-m", "benchmarks.shard", "--stages", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout) / 1000


def measure(samples: int, rounds: int, partitions: int) -> dict[str, Any]:
    """Measures all quantities.

    Returns:
        Samples per second and ratios by writer, seconds per 1,000 samples by number of samples, and peak memory in MB
        by number of partitions.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data", samples, 1000)
        ours(folder / "data", folder / SCRATCH / "shards")
        files = unpack(folder / SCRATCH / "shards", folder / "files")
        remove(folder / SCRATCH / "shards")
        writers: dict[str, Callable[[Path], Any]] = {
            "ours": lambda out: ours(folder / "data", out),
            "webdataset": lambda out: with_webdataset(files, folder / "files", out),
            "GNU tar": lambda out: with_gnu_tar(files, folder / "files", out),
        }
        durations: dict[str, list[float]] = {name: [] for name in writers}
        for _ in range(rounds):
            for name, write in writers.items():
                durations[name].append(seconds(write, folder))
        growth = {}
        for part in (samples // 4, samples // 2, samples):
            write_data(folder / str(part), part, 1000)
            times = [seconds(partial(ours, folder / str(part)), folder) for _ in range(rounds)]
            growth[part] = 1000 * median(times) / part
    return {
        "samples": samples,
        "samples_per_second": {name: len(files) / median(times) for name, times in durations.items()},
        "ours_to": {
            name: median(other / own for other, own in zip(durations[name], durations["ours"], strict=True))
            for name in ("webdataset", "GNU tar")
        },
        "seconds_per_1000": growth,
        "peak_megabytes": {count: peak_memory(count) for count in (partitions, 10 * partitions)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--partitions", type=int, default=20, help="memory is measured with this number of partitions, and ten times it"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages:
        all_stages(options.stages)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    result = measure(options.samples, options.rounds, options.partitions)
    if options.json:
        print(json.dumps(result, allow_nan=False))
        return
    for name, rate in result["samples_per_second"].items():
        ratio = f"   ours: {result['ours_to'][name]:.2f} times as fast" if name in result["ours_to"] else ""
        print(f"{name:12} {rate:8,.0f} samples/s{ratio}")
    for count, duration in result["seconds_per_1000"].items():
        print(f"ours, {count:7,} samples: {duration:.3f} s per 1,000")
    for count, peak in result["peak_megabytes"].items():
        print(f"peak memory with {count:5,} partitions: {peak:,.0f} MB")


if __name__ == "__main__":
    main()
