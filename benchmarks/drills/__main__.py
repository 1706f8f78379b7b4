"""Runs drills for some minutes and prints what was tried, recovered and identical: `python -m benchmarks.drills`.

Each drill disturbs a small pipeline: it kills a process, fills a disk, flips a bit or starts a second run. The same
command is then run again, without help, until it ends. Every output is compared with that of an undisturbed run, and
whatever is left behind (processes, ports, temporary files, locks) counts as a failure. The status is 1 if a drill
failed; its checkout and log are kept. All happens in a folder of its own, on loopback, with one thread per process.
As root, two drills run side by side in namespaces of their own; others run one at a time and without a full disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.drills import isolation
from benchmarks.drills.drills import KINDS, Bench, Result, plan
from benchmarks.drills.world import Place, prepare

LEAST_LIMIT_SECONDS = 150.0
PREPARATION_LIMIT_SECONDS = 1200.0


def main(arguments: argparse.Namespace) -> int:
    """Runs the drills, prints the table and returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    deadline = time.monotonic() + arguments.minutes * 60
    folder = Path(tempfile.mkdtemp(prefix="lotlip-drills-")) if arguments.folder is None else arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty; name a new folder")
    isolated = isolation.can_isolate()
    parallel = arguments.parallel or (2 if isolated else 1)
    print(f"seed {seed}; {parallel} at a time in {folder}", flush=True)
    if not isolated:
        parallel = 1
        print("no namespaces here (they need root): one drill at a time, and none with a full disk", flush=True)
    settings = Settings(
        folder,
        isolated,
        seed,
        tuple(arguments.kinds),
        arguments.count,
        deadline,
        arguments.first,
        arguments.kills,
        arguments.prebuilt,
    )
    results, reference = _run(settings, parallel)
    rows = table_rows(results)
    print(f"\n{table(rows)}\n")
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(explain(result))
    kills = [hit for result in results if result.spec.kind == "kill" for hit in result.disturbances]
    print(
        f"{len(kills)} kills, {sum(hit.recovered for hit in kills)} recovered; {len(results)} drills, "
        f"{len(failed)} failed; seed {seed}"
    )
    if arguments.out:
        data = {"seed": seed, "minutes": arguments.minutes, "reference": reference, "rows": rows}
        data["drills"] = [{**asdict(result), "passed": result.passed} for result in results]
        arguments.out.write_text(json.dumps(data, indent=1, default=str, allow_nan=False) + "\n", encoding="utf-8")
    if not failed and arguments.folder is None:
        shutil.rmtree(folder)
    return int(bool(failed) or not results)


@dataclass(frozen=True)
class Settings:
    """What workers are told.

    Attributes:
        folder: for all that is written.
        isolated: whether a worker makes namespaces of its own.
        seed: of all drills.
        kinds: that are run.
        count: of drills; None: until the deadline.
        deadline: by the monotonic clock, after which no drill starts and no other kill comes.
        first: number of the first drill.
        kills: at most in one drill.
        prebuilt: folder of what is put into the place before the first run.
    """

    folder: Path
    isolated: bool
    seed: int
    kinds: tuple[str, ...]
    count: int | None
    deadline: float
    first: int
    kills: int
    prebuilt: Path | None


def _run(settings: Settings, parallel: int) -> tuple[list[Result], dict[str, Any]]:
    """Makes the reference run, then runs drills in some workers; gives their results as far as they came."""
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    results: list[Result] = []
    workers = [_in_worker(context, found, _prepare, settings, 0)]
    try:
        kind, reference = _next(found, workers)
        if kind != "reference":
            sys.exit(f"error: {reference or 'the undisturbed run ended without a word'}")
        workers.pop().join()
        print(
            f"an undisturbed run takes {reference.seconds:.0f} s and writes {len(reference.outputs)} files: "
            + ", ".join(f"{name} {reference.duration(number):.0f} s" for number, name in enumerate(reference.stages)),
            flush=True,
        )
        numbers = context.Value("i", settings.first)
        workers += [_in_worker(context, found, _drill, settings, n, reference, numbers) for n in range(parallel)]
        while (message := _next(found, workers))[0] == "result":
            results.append(message[1])
            _progress(message[1], results, settings)
        if message[0] == "error":
            sys.exit(f"error: {message[1]}")
    except KeyboardInterrupt:
        print("stopped; the table has what was done", file=sys.stderr)
        if not results:
            sys.exit(130)
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.join()
    seconds = {"seconds": reference.seconds, "stages": dict(zip(reference.stages, reference.starts, strict=True))}
    return sorted(results, key=lambda result: result.spec.number), seconds


def _in_worker(context: Any, found: Any, work: Any, settings: Settings, *arguments: Any) -> Any:
    """Starts a worker process, which sends what it finds."""
    process = context.Process(target=_worker, args=(found, work, settings, *arguments))
    process.start()
    return process


def _next(found: Any, workers: Sequence[Any]) -> tuple[str, Any]:
    """What a worker sends next; ("end", None) when all have ended."""
    while True:
        alive = any(worker.is_alive() for worker in workers)
        try:
            return found.get(timeout=1)
        except queue.Empty:
            if not alive:
                return "end", None


def _worker(found: Any, work: Any, settings: Settings, number: int, *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an ordinary end, which ends what a drill has started
    # the main process says when to end; a handler, unlike SIG_IGN, is not inherited by the programs under test
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        place = settings.folder / "place"
        place.mkdir(exist_ok=True)
        if settings.isolated:
            own = settings.folder / f"worker-{number}"
            own.mkdir(exist_ok=True)
            isolation.isolate()
            isolation.bind(own, place)
        work(found, settings, Place(place), *arguments)
    except Exception:
        found.put(("error", traceback.format_exc()))
    found.close()
    found.join_thread()


def _prepare(found: Any, settings: Settings, place: Place) -> None:
    place.clear()
    found.put(("reference", prepare(place, settings.folder, PREPARATION_LIMIT_SECONDS, settings.prebuilt)))


def _drill(found: Any, settings: Settings, place: Place, reference: Any, numbers: Any) -> None:
    limit = max(LEAST_LIMIT_SECONDS, 3 * reference.seconds)
    bench = Bench(
        place, settings.folder, reference, settings.isolated, limit, kills=settings.kills, deadline=settings.deadline
    )
    parent = multiprocessing.parent_process()
    while time.monotonic() < settings.deadline and parent is not None and parent.is_alive():
        with numbers.get_lock():
            number = numbers.value
            numbers.value += 1
        if settings.count is not None and number >= settings.first + settings.count:
            break
        found.put(("result", bench.run(plan(number, settings.seed, settings.kinds))))


def _progress(result: Result, results: Sequence[Result], settings: Settings) -> None:
    word = f"skipped: {result.skipped}" if result.skipped else "ok" if result.passed else "FAILED"
    left = max(settings.deadline - time.monotonic(), 0) / 60
    hits = sum(len(each.disturbances) for each in results)
    spec = result.spec
    print(
        f"{spec.number:4d} {spec.kind} {spec.target} {spec.how} ({result.state}): {len(result.disturbances)} tried, "
        f"{word}, {result.seconds:.0f} s; {hits} in all, {left:.1f} min left",
        flush=True,
    )
    if not result.passed:
        print(explain(result), flush=True)


def table_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each kind, target and signal: what was tried and what came of it."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in results:
        spec = result.spec
        row = rows.setdefault(
            (spec.kind, spec.target, spec.how),
            {
                "kind": spec.kind,
                "target": spec.target,
                "how": spec.how,
                "drills": 0,
                "tried": 0,
                "recovered": 0,
                "identical": 0,
                "left_behind": 0,
                "failed": 0,
                "skipped": 0,
                "slowest_stop": 0.0,
                "seconds": 0.0,
            },
        )
        row["drills"] += 1
        row["tried"] += len(result.disturbances)
        row["recovered"] += sum(hit.recovered for hit in result.disturbances)
        row["identical"] += len(result.disturbances) if result.identical else 0
        row["left_behind"] += len(result.left)
        row["failed"] += not result.passed
        row["skipped"] += bool(result.skipped)
        row["slowest_stop"] = max([row["slowest_stop"], *(hit.stopped_seconds for hit in result.disturbances)])
        row["seconds"] += result.seconds
    return [rows[key] for key in sorted(rows)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = ["drill", "target", "signal", "tried", "recovered", "identical", "left behind", "failed drills"]
    keys = [
        "kind",
        "target",
        "how",
        "tried",
        "recovered",
        "identical",
        "left_behind",
        "failed",
        "slowest_stop",
        "seconds",
    ]
    total = {key: sum(row[key] for row in rows) for key in keys[3:]} | {"kind": "all", "target": "", "how": ""}
    total["slowest_stop"] = max((row["slowest_stop"] for row in rows), default=0.0)
    names += ["slowest stop (s)", "seconds"]
    keys += ["slowest_stop", "seconds"]
    lines = [names, ["---"] * len(names)]
    for row in [*rows, total]:
        cells = [f"{row[key]:.0f}" if key in keys[-2:] else str(row[key]) for key in keys]
        if row.get("skipped"):
            cells[2] += " (skipped)"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def explain(result: Result) -> str:
    """Why a drill failed, in some lines."""
    lines = [f"FAILED {result.spec.name} ({result.state}); logs: {result.kept}/run-*.log"]
    lines += [f"  {hit.moment}{'' if hit.recovered else ': NOT RECOVERED'}" for hit in result.disturbances]
    for name, found in (("problem", result.problems), ("output", result.different), ("left", result.left)):
        lines += [f"  {name}: {line}" for line in found[:8]]
        if len(found) > 8:
            lines.append(f"  {name}: and {len(found) - 8} more")
    lines += [f"  warning: {line}" for line in result.warnings]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="after which no drill starts and no other kill comes"
    )
    parser.add_argument("--count", type=int, help="of drills at most")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, help="of all that is random; drawn and printed without it")
    parser.add_argument("--first", type=int, default=0, help="number of the first drill: repeats one with --count 1")
    parser.add_argument("--kills", type=int, default=24, help="in one drill at most")
    parser.add_argument("--prebuilt", type=Path, help="folder with cache/ and project/ to start from: what takes long")
    parser.add_argument("--parallel", type=int, help="drills at a time (default: 2 as root, else 1)")
    parser.add_argument("--folder", type=Path, help="new folder for all that is written (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse()))
