"""Runs all benchmarks in one go and records the machine: python -m benchmarks.

The benchmarks run one after another, so the machine should be idle otherwise. Each result is written as soon as it is
there, and `--continue` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lotlip.core.files import read_json, write_json

# Name → module and arguments, the shortest first.
COMMANDS = {
    "loss, blockwise": ["loss", "--batch", "4096", "--at-once", "1000000"],
    "loss, whole": ["loss", "--batch", "4096", "--at-once", "1000000000"],
    "retrieval": ["retrieval"],
    "loader": ["loader", "--no-images", "--samples", "8192"],
    "units": ["units"],
    "caption": ["caption"],
    "shard": ["shard"],
    "step": ["step"],
    "packing": ["packing"],
    "scale": ["scale", "--rows", "1000000", "--partitions", "300"],
    "tables": ["tables", "--rows", "1000000", "3000000"],
    "objectives": ["objectives", "--skip", "flair", "filip"],
    "objectives, token by token": ["objectives", "--batch", "512"],
    "train step": ["train_step", "--rounds", "3"],
    "train step, long texts": ["train_step", "--rounds", "3", "--long", "128"],
    "resume": ["resume"],
    "search": ["retrieval", "--items", "1000000", "--width", "768", "--kinds", "hnsw", "ivf-pq"],
}


def machine() -> dict[str, Any]:
    """Returns what describes the machine and the measured code."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor(),
    )
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(logical=False),
        "threads": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "transformers", "deepspeed")},
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def run(command: list[str]) -> dict[str, Any]:
    """Runs a benchmark and returns its result, its duration and the load of the machine before it."""
    busy = psutil.cpu_percent(interval=1)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:], "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.{' '.join(command)}",
        "seconds": round(time.monotonic() - start, 1),
        "cpu_percent_before": busy,
    }
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {**result, "error": (done.stderr or done.stdout)[-2000:], "status": done.returncode}
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {**result, "result": found[0] if len(found) == 1 else found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(COMMANDS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="file of the results")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the results that the file has")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - COMMANDS.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(COMMANDS)}")
    if options.out.exists() and not options.go_on:
        parser.error(f"{options.out} exists; add --continue to keep its results, or choose another file with --out")
    stored = read_json(options.out) if options.out.exists() else {"machine": machine(), "results": {}}
    chosen = [name for name in COMMANDS if name in (options.names or COMMANDS)]
    waiting = [name for name in chosen if "result" not in stored["results"].get(name, {})]
    failed, start = [], time.monotonic()
    for number, name in enumerate(waiting):
        left = (time.monotonic() - start) / number * (len(waiting) - number) / 60 if number else None
        print(
            f"{name}: {number + 1} of {len(waiting)}" + (f", about {left:.0f} minutes left" if left else ""), flush=True
        )
        stored["results"][name] = found = run(COMMANDS[name])
        write_json(options.out, stored)
        if "error" in found:
            failed.append(name)
            print(found["error"].strip().splitlines()[-1], file=sys.stderr)
    print(f"results: {options.out}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(waiting)} benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
