"""Measures how time and memory of the pipeline's bookkeeping grow with the data: `python -m benchmarks.scale`.

It writes what ingest and a captioner leave for synthetic images: tables, reports, and a tar of a few kilobytes for each
partition. A twentieth of the images are copies of earlier ones. The project's own functions then process it, each part
in its own process: the planning of ingest and shard, deduplication, both gates, DVC, and Prefect with a unit per
partition that only reads its report. A hundredth, a tenth and all of the rows are measured, in partitions of the same
size. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lotlip.config.params import load_params
from lotlip.core.code import ROOT
from lotlip.core.files import sha256_files, write_json
from lotlip.data.duplicates import unique_partitions
from lotlip.data.index import CaptionIndex, UnitIndex, write_index
from lotlip.data.partitions import CAPTIONS, MARKER, RECORDS, finished, unit_names
from lotlip.data.records import Unit, UnitReport

SPLITS = ("test", "val")  # of the first partitions; all others are in the train split
COPIES = 20  # one image in so many is a copy; every second copy has its original's key, too
ORIGINALS = 10  # images of a partition that later ones may be copies of

# --- bookkeeping --------------------------------------------------------------------------------------------------


def write_bookkeeping(data: Path, rows: int, partitions: int) -> dict[str, int]:
    """Writes `data/units`, as ingest leaves it before it removes copies, and `data/captions`."""
    rng = random.Random(0)
    originals: list[tuple[str, str]] = []
    captions = []
    for number in range(partitions):
        unit = Unit(SPLITS[number] if number < len(SPLITS) else "train", number)
        images = _images(data / "units" / f"{unit.name}.tar", number, rows // partitions)
        keys = [f"url-{sha256[:32]}" for sha256 in images["sha256"]]
        texts = [f"picture {number}-{row}" for row in range(len(keys))]
        captions.append(_write_unit(data / "captions", unit.name, CAPTIONS, _captions(keys, texts)))
        for row in range(COPIES - 1, len(keys), COPIES) if originals else ():
            key, images["sha256"][row] = rng.choice(originals)
            if row // COPIES % 2:
                keys[row] = key
        if unit.split == "train":
            originals += zip(keys[:ORIGINALS], images["sha256"][:ORIGINALS], strict=True)
        table = {"key": keys, "short_caption": texts, "extension": "png", **images}
        _write_unit(data / "units", unit.name, RECORDS, table)
    write_index(data / "captions", captions, CaptionIndex)
    return {"rows": sum(report.written for report in captions), "partitions": len(captions)}


def _images(tar: Path, seed: int, count: int) -> dict[str, Any]:
    """Writes one picture and gives it `count` different hashes, because any number of bytes may follow a PNG's end."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "png")
    picture = file.getvalue()
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(picture + bytes(count))
    digest, hashes = hashlib.sha256(picture), []
    for _ in range(count):
        hashes.append(digest.hexdigest())
        digest.update(b"\0")
    sizes = list(range(len(picture), len(picture) + count))
    return {"sha256": hashes, "size": sizes, "offset": 0, "width": 8, "height": 8}


def _captions(keys: list[str], texts: list[str]) -> dict[str, Any]:
    """Captions that pass the gate, with the measures that it reads."""
    long = pa.array([f"A longer caption of {text}." for text in texts])
    same = {"captioner": "synthetic", "finish_reason": "stop", "tokens": 30, "words": 12, "truncated": False}
    same |= {"reasoning": "", "agreement": 1.0, "own_agreement": 1.0, "next_agreement": 0.0}
    sub_captions = pa.ListArray.from_arrays(np.arange(len(keys) + 1, dtype=np.int32), long)
    return {**same, "key": keys, "text": long, "sub_captions": sub_captions}


def _write_unit(folder: Path, name: str, schema: pa.Schema, columns: dict[str, Any]) -> UnitReport:
    """Writes a unit's table and report, as `write_partitions` and `write_captions` do for one image at a time.

    Args:
        folder: of the stage.
        name: of the unit.
        schema: of the table.
        columns: values of a column, or the one that all rows have; others are null.
    """
    path, tar = folder / f"{name}.parquet", folder / f"{name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(columns["key"])

    def column(field: pa.Field) -> pa.Array:
        values = columns.get(field.name)
        if isinstance(values, list | pa.Array):
            return pa.array(values, field.type)
        return pa.repeat(pa.scalar(values, field.type), rows)

    pq.write_table(pa.table([column(field) for field in schema], schema), path)
    files = [file for file in (tar, path) if file.exists()]
    report = UnitReport(name, rows, rows, sha256_files(files), sum(file.stat().st_size for file in files))
    write_json(folder / f"{name}{MARKER}", asdict(report))
    return report


def _reports(folder: Path) -> list[UnitReport]:
    return [report for name in unit_names(folder) if (report := finished(name, folder))]


# --- parts --------------------------------------------------------------------------------------------------------


def plan_ingest(data: Path) -> dict[str, int]:
    """Lists the source's tars as units, with the state that decides whether a unit must be read again."""
    from lotlip.ingest.config import WebDatasetSourceConfig
    from lotlip.ingest.sources import open_source

    source = open_source(WebDatasetSourceConfig(kind="webdataset", path=data / "units"))
    units = source.units(1)
    return {"partitions": len({source.state(unit) for unit in units})}


def deduplicate(data: Path) -> dict[str, int]:
    """Writes `data/ingest`: the units without copies."""
    reports = unique_partitions(data / "units", _reports(data / "units"), data / "ingest", {})
    index = write_index(data / "ingest", reports, UnitIndex)
    return {"rows": index.read, "partitions": len(index.units), "copies": index.failed}


def plan_shards(data: Path) -> dict[str, int]:
    """Shuffles the samples of the train split and cuts them into shards."""
    from lotlip.shard import shards
    from lotlip.shard.config import ShardConfig

    settings = ShardConfig(samples_per_shard=10_000)
    plans = shards.plan_shards(
        data / "ingest",
        {"synthetic": data / "captions"},
        "train",
        settings.samples_per_shard,
        settings.seed,
        settings.max_bytes,
    )
    return {"rows": sum(map(len, plans)), "shards": len(plans)}


def gate_ingest(data: Path) -> dict[str, int]:
    """Runs the gate of ingest, which opens 32 images of a partition."""
    from lotlip.ingest import gate
    from lotlip.ingest.config import IngestConfig

    source = {"kind": "webdataset", "path": data / "units"}
    reports = _reports(data / "ingest")
    settings = IngestConfig.model_validate({"source": source, "max_failure_share": 0.05})  # as in the profile
    checks = gate.gate_ingest(settings, data / "ingest", reports, len(reports), (), data / "gates" / "ingest")
    return {"rows": sum(report.written for report in reports), "partitions": len(reports), "checks": len(checks)}


def gate_caption(data: Path) -> dict[str, int]:
    """Runs the gate of a captioner."""
    from lotlip.caption import gate
    from lotlip.caption.config import CaptionConfig

    reports = _reports(data / "captions")
    checks = gate.gate_caption(CaptionConfig(), data / "captions", reports, data / "gates" / "caption")
    return {"rows": sum(report.written for report in reports), "partitions": len(reports), "checks": len(checks)}


def dvc_commit(data: Path) -> dict[str, int]:
    """Hashes the output of ingest into the cache of a new DVC project, which links files instead of copying them."""
    (data / "dvc.yaml").write_text("stages:\n  ingest:\n    cmd: 'true'\n    outs:\n      - ingest: {persist: true}\n")
    for command in ("init --no-scm --quiet", "config cache.type hardlink"):
        dvc(data, command)
    return dvc(data, "commit --force --quiet")


def dvc(data: Path, command: str) -> dict[str, int]:
    """Runs a command of DVC. `status --quiet` fails if a stage is stale."""
    from flows.runtime.dvc import main

    if status := main(command.split()):
        raise RuntimeError(f"dvc {command} ended with status {status}")
    return {"files": sum(file.is_file() for file in (data / "ingest").rglob("*"))}


def run_units(data: Path) -> dict[str, int]:
    """Runs a unit per partition as a stage does; each is finished, so its work is to read its report."""
    from prefect import flow

    from flows.runtime.servers import prefect_for_program
    from flows.runtime.stage import Stage

    @flow(name="scale")
    def units() -> list[UnitReport]:
        stage = Stage("ingest", load_params(ROOT / "params.yaml"), {})
        return stage.fan_out(unit_names(data / "units"), partial(_finished, data / "units"), name=str, size=len)

    with prefect_for_program():
        reports = units()
    return {"rows": sum(report.written for report in reports), "partitions": len(reports)}


def _finished(folder: Path, name: str) -> list[UnitReport]:
    report = finished(name, folder)
    assert report is not None
    return [report]


PARTS: dict[str, Callable[[Path], dict[str, int]]] = {
    "ingest: plan": plan_ingest,
    "ingest: deduplication": deduplicate,
    "ingest: gate": gate_ingest,
    "caption: gate": gate_caption,
    "shard: plan": plan_shards,
    "dvc commit": dvc_commit,
    "dvc status": partial(dvc, command="status --quiet"),
    "dvc repro --dry": partial(dvc, command="repro --dry"),
    "Prefect: units": run_units,
}

# --- measurement --------------------------------------------------------------------------------------------------


def measure_here(work: Callable[[], dict[str, int]]) -> dict[str, float]:
    """Measures a part in this process. CPU time includes its servers; peak memory is that of the largest process."""
    started, (used, _) = time.monotonic(), _usage()
    processed = work()
    seconds, (cpu_seconds, peak) = time.monotonic() - started, _usage()
    return {**processed, "seconds": seconds, "cpu_seconds": cpu_seconds - used, "peak_mb": peak}


def _usage() -> tuple[float, float]:
    """CPU time and peak memory in MB of this process and the ended ones that it started."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return seconds, max(usage.ru_maxrss for usage in usages) / 1024


def measure_size(folder: Path | None, rows: int, partitions: int) -> dict[str, Any]:
    """Measures all parts with one number of rows, each in a separate process."""
    with tempfile.TemporaryDirectory(dir=folder) as data:

        def run(part: str) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.scale", "--rows", str(rows), "--partitions", str(partitions)]
            done = subprocess.run(
                [*command, "--part", part],
                check=False,
                capture_output=True,
                text=True,
                cwd=data,  # DVC's project, and the place of Prefect's files
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            if done.returncode:
                raise RuntimeError(f"{part} failed with {rows:,} rows:\n{done.stderr}")
            found = dict(json.loads(done.stdout.splitlines()[-1]))
            print(f"{rows:,} rows: {part}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
            return found

        written = run(WRITING)
        return {
            "rows": written["rows"],
            "partitions": written["partitions"],
            "parts": {part: run(part) for part in PARTS},
        }


def growth(sizes: Sequence[dict[str, Any]], part: str) -> float:
    """The exponent by which a part's CPU time grows with the rows, between the two largest sizes; 1 is linear."""
    less, more = sizes[-2:]
    seconds = [size["parts"][part]["cpu_seconds"] for size in (less, more)]
    return math.log(seconds[1] / seconds[0]) / math.log(more["rows"] / less["rows"])


def table(sizes: Sequence[dict[str, Any]]) -> str:
    """The measurements as two Markdown tables."""
    heads = [f"{size['rows'] / 1e6:g} M" for size in sizes]
    lines = [
        f"| CPU time (wall time), s | {' | '.join(heads)} | CPU s per million rows | growth |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    for part in PARTS:
        found = [size["parts"][part] for size in sizes]
        times = [f"{one['cpu_seconds']:.1f} ({one['seconds']:.1f})" for one in found]
        each = [f"{one['cpu_seconds'] / size['rows'] * 1e6:.2f}" for one, size in zip(found, sizes, strict=True)]
        lines.append(f"| {part} | {' | '.join(times)} | {', '.join(each)} | {growth(sizes, part):.2f} |")
    lines += ["", f"| peak memory, MB | {' | '.join(heads)} |", "|---" * (len(sizes) + 1) + "|"]
    for part in PARTS:
        peaks = [f"{size['parts'][part]['peak_mb']:,.0f}" for size in sizes]
        lines.append(f"| {part} | {' | '.join(peaks)} |")
    return "\n".join(lines)


WRITING = "write"
SHARES = (100, 10, 1)  # of the rows: one in so many


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--partitions", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="of the bookkeeping, 250 bytes a row; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        work = PARTS.get(options.part, partial(write_bookkeeping, rows=options.rows, partitions=options.partitions))
        print(json.dumps(measure_here(partial(work, Path.cwd())), allow_nan=False))
        return
    least = SHARES[0] * (len(SPLITS) + 1)
    if options.partitions < least or options.rows < options.partitions:
        parser.error(f"--partitions must be at least {least}, and --rows as large")
    sizes = [measure_size(options.folder, options.rows // share, options.partitions // share) for share in SHARES]
    if options.json:
        print(json.dumps({"sizes": sizes, "growth": {part: growth(sizes, part) for part in PARTS}}, allow_nan=False))
    else:
        print(table(sizes))


if __name__ == "__main__":
    main()
