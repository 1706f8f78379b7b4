"""Measures time and memory of the search for duplicates among many hashes: `python -m benchmarks.tables`.

Partitions are written as by ingest, but with only the column of hashes; about one value in ten is a duplicate. Each
number of rows is measured in a separate process. `--before COMMIT` also measures the code of that commit, in a
temporary checkout. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
PARTITION = 10_000  # rows


def write_tables(folder: Path, rows: int) -> list[str]:
    """Writes partitions whose column `sha256` has `rows` rows in total, and returns their names."""
    names = []
    for first in range(0, rows, PARTITION):
        numbers = np.arange(first, min(first + PARTITION, rows))
        numbers[9::10] //= 2  # makes nine in ten of these duplicates
        digests = np.random.default_rng(0).bytes(32).hex()[:44]
        names.append(f"part-{first // PARTITION:05d}")
        column = pa.array([f"{number * 2654435761 % 2**64:020d}{digests}" for number in numbers.tolist()])
        pq.write_table(pa.table({"sha256": column}), folder / f"{names[-1]}.parquet")
    return names


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Measures the search with the `lotlip` that is first on the path, which may be that of an older commit."""
    from lotlip.data import duplicates
    from lotlip.data.partitions import read_table

    find = getattr(duplicates, "find_duplicates", None) or getattr(duplicates, "repeats")  # noqa: B009 (its older name)
    hashes = duplicates.hashes
    names = sorted(path.stem for path in folder.glob("*.parquet"))
    hashes(read_table(folder, names[0], ["sha256"])["sha256"])  # warm-up: imports
    before, started, cpu_started = _peak(), time.monotonic(), time.process_time()

    def read(part: int) -> np.ndarray:
        return hashes(read_table(folder, names[part], ["sha256"])["sha256"])

    if "at_once" in inspect.signature(find).parameters:  # before DuckDB
        batches = find(len(names), read, rows)
    else:
        batches = find(map(read, range(len(names))))
    count = sum(map(len, batches))
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    return {"rows": rows, "found": count, "seconds": seconds, "cpu_seconds": cpu_seconds, "more_mb": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measured(code: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Measures the `lotlip` of a checkout in a separate process."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import importlib.util as util, json; from pathlib import Path; "
        "spec = util.spec_from_file_location('tables', sys.argv[2]); tables = util.module_from_spec(spec); "
        "spec.loader.exec_module(tables); print(json.dumps(tables.measure(Path(sys.argv[3]), int(sys.argv[4]))))"
    )
    command = [sys.executable, "-c", program, str(code), __file__, str(folder), str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Returns, by code version, the measurements for each number of rows."""
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        versions = {"now": ROOT}
        if arguments.before:
            versions["before"] = Path(scratch, "before")
            versions["before"].mkdir()
            archive = subprocess.run(
                ["git", "archive", arguments.before, "lotlip"], cwd=ROOT, check=True, capture_output=True
            )
            subprocess.run(["tar", "-x"], cwd=versions["before"], input=archive.stdout, check=True)
        for rows in arguments.rows:
            folder = Path(scratch, str(rows))
            folder.mkdir()
            write_tables(folder, rows)
            for name, code in versions.items():
                results.setdefault(name, []).append(_measured(code, folder, rows))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--before", metavar="COMMIT", help="also measure the code of this commit")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = main(options)
    if options.json:
        print(json.dumps(results, allow_nan=False))
    for name, rows in [] if options.json else results.items():
        for row in rows:
            print(
                f"{name}: {row['rows']:,} rows, {row['found']:,} duplicates: {row['seconds']:.1f} s, "
                f"{row['cpu_seconds']:.1f} s of CPU time, peak memory {row['more_mb']:.0f} MB in addition"
            )
