"""Runs drills and prints the numbers of disturbances, recoveries and identical outputs: `python -m benchmarks.drills`.

Each drill disturbs a small pipeline: it kills a process, fills a disk, flips a bit or starts a second run. The same
command then runs again, without any repair, until it ends. Every output is compared with that of an undisturbed run.
Processes, ports, temporary files and locks that are left behind count as failures. The exit status is 1 if a drill
failed; its checkout and log are kept. Drills run in a folder of their own, on loopback, with one thread per process.
As root, two drills run in parallel in namespaces of their own. Other users run one at a time, without a full disk.
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
from benchmarks.drills.drills import KINDS, DrillRunner, Result, plan
from benchmarks.drills.world import Sandbox, prepare

MIN_LIMIT_SECONDS = 150.0
PREPARATION_LIMIT_SECONDS = 1200.0


def main(arguments: argparse.Namespace) -> int:
    """Runs the drills, prints the table and returns the exit status."""
    # a shell's background jobs ignore SIGINT, and the programs of the drills would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    deadline = time.monotonic() + arguments.minutes * 60
    folder = Path(tempfile.mkdtemp(prefix="lotlip-drills-")) if arguments.folder is None else arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty; choose a new folder")
    isolated = isolation.can_isolate()
    parallel = arguments.parallel or (2 if isolated else 1)
    print(f"seed {seed}; {parallel} at a time in {folder}", flush=True)
    if not isolated:
        parallel = 1
        print("no namespaces (they need root): one drill at a time, and none with a full disk", flush=True)
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
        arguments.limit,
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
    """The settings of all workers.

    Attributes:
        folder: folder for all files.
        isolated: whether each worker creates its own namespaces.
        seed: seed of all drills.
        kinds: the kinds of drills to run.
        count: number of drills; None: until the deadline.
        deadline: time by the monotonic clock after which no drill starts and no process is killed.
        first: number of the first drill.
        kills: maximum number of kills in a drill.
        prebuilt: folder that is copied into the sandbox before the first run.
        limit: seconds after which a run counts as hanging; None: three times those of the undisturbed run.
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
    limit: float | None


def _run(settings: Settings, parallel: int) -> tuple[list[Result], dict[str, Any]]:
    """Makes the reference run, then runs drills in parallel workers.

    Returns:
        The results, also of an interrupted session, and the times of the reference run in seconds.
    """
    context = multiprocessing.get_context("fork")
    messages: Any = context.Queue()
    results: list[Result] = []
    workers = [_start_worker(context, messages, _prepare, settings, 0)]
    try:
        kind, reference = _next_message(messages, workers)
        if kind != "reference":
            sys.exit(f"error: {reference or 'the undisturbed run ended without a message'}")
        workers.pop().join()
        print(
            f"an undisturbed run takes {reference.seconds:.0f} s and writes {len(reference.outputs)} files: "
            + ", ".join(f"{name} {reference.duration(number):.0f} s" for number, name in enumerate(reference.stages)),
            flush=True,
        )
        numbers = context.Value("i", settings.first)
        workers += [_start_worker(context, messages, _drill, settings, n, reference, numbers) for n in range(parallel)]
        while (message := _next_message(messages, workers))[0] == "result":
            results.append(message[1])
            _progress(message[1], results, settings)
        if message[0] == "error":
            sys.exit(f"error: {message[1]}")
    except KeyboardInterrupt:
        print("stopped; the table has the completed drills", file=sys.stderr)
        if not results:
            sys.exit(130)
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.join()
    seconds = {"seconds": reference.seconds, "stages": dict(zip(reference.stages, reference.starts, strict=True))}
    return sorted(results, key=lambda result: result.spec.number), seconds


def _start_worker(context: Any, messages: Any, work: Any, settings: Settings, *arguments: Any) -> Any:
    """Starts a worker process, which puts its results into the queue."""
    process = context.Process(target=_worker, args=(messages, work, settings, *arguments))
    process.start()
    return process


def _next_message(messages: Any, workers: Sequence[Any]) -> tuple[str, Any]:
    """Returns the next message of a worker, or ("end", None) when all workers have ended."""
    while True:
        alive = any(worker.is_alive() for worker in workers)
        try:
            return messages.get(timeout=1)
        except queue.Empty:
            if not alive:
                return "end", None


def _worker(messages: Any, work: Any, settings: Settings, number: int, *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit that ends the drill's processes
    # The main process ends the workers on Ctrl-C. Unlike SIG_IGN, the programs under test do not inherit a handler.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        sandbox = settings.folder / "sandbox"
        sandbox.mkdir(exist_ok=True)
        if settings.isolated:
            folder = settings.folder / f"worker-{number}"
            folder.mkdir(exist_ok=True)
            isolation.isolate()
            isolation.bind(folder, sandbox)
        work(messages, settings, Sandbox(sandbox), *arguments)
    except Exception:
        messages.put(("error", traceback.format_exc()))
    messages.close()
    messages.join_thread()


def _prepare(messages: Any, settings: Settings, sandbox: Sandbox) -> None:
    sandbox.clear()
    messages.put(("reference", prepare(sandbox, settings.folder, PREPARATION_LIMIT_SECONDS, settings.prebuilt)))


def _drill(messages: Any, settings: Settings, sandbox: Sandbox, reference: Any, numbers: Any) -> None:
    limit = settings.limit or max(MIN_LIMIT_SECONDS, 3 * reference.seconds)
    runner = DrillRunner(
        sandbox, settings.folder, reference, settings.isolated, limit, kills=settings.kills, deadline=settings.deadline
    )
    parent = multiprocessing.parent_process()
    while time.monotonic() < settings.deadline and parent is not None and parent.is_alive():
        with numbers.get_lock():
            number = numbers.value
            numbers.value += 1
        if settings.count is not None and number >= settings.first + settings.count:
            break
        messages.put(("result", runner.run(plan(number, settings.seed, settings.kinds))))


def _progress(result: Result, results: Sequence[Result], settings: Settings) -> None:
    outcome = f"skipped: {result.skipped}" if result.skipped else "ok" if result.passed else "FAILED"
    left = max(settings.deadline - time.monotonic(), 0) / 60
    hits = sum(len(each.disturbances) for each in results)
    spec = result.spec
    print(
        f"{spec.number:4d} {spec.kind} {spec.target} {spec.how} ({result.state}): {len(result.disturbances)} tried, "
        f"{outcome}, {result.seconds:.0f} s; {hits} in total, {left:.1f} min left",
        flush=True,
    )
    if not result.passed:
        print(explain(result), flush=True)


def table_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Returns a row for each kind, target and signal, with the numbers of disturbances and of their outcomes."""
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
    """Returns the rows as a Markdown table."""
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
    """Returns lines that say why a drill failed."""
    lines = [f"FAILED {result.spec.name} ({result.state}); logs: {result.kept}/run-*.log"]
    lines += [f"  {hit.moment}{'' if hit.recovered else ': NOT RECOVERED'}" for hit in result.disturbances]
    for name, faults in (("problem", result.problems), ("output", result.different), ("left", result.left)):
        lines += [f"  {name}: {line}" for line in faults[:8]]
        if len(faults) > 8:
            lines.append(f"  {name}: and {len(faults) - 8} more")
    lines += [f"  warning: {line}" for line in result.warnings]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time after which no drill starts and no process is killed"
    )
    parser.add_argument("--count", type=int, help="maximum number of drills")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, help="seed of all random choices (default: random; it is printed)")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first drill; with --count 1, repeats a drill"
    )
    parser.add_argument("--kills", type=int, default=24, help="maximum number of kills in a drill")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds after which a run counts as hanging (default: 3 times the undisturbed run, at least "
        f"{MIN_LIMIT_SECONDS:.0f}); raise it on a busy machine",
    )
    parser.add_argument("--prebuilt", type=Path, help="folder with cache/ and project/ that the checkout starts from")
    parser.add_argument("--parallel", type=int, help="number of drills at a time (default: 2 as root, else 1)")
    parser.add_argument("--folder", type=Path, help="new folder for all files (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse()))
