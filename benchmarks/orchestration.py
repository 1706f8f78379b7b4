"""Measures the share of orchestration in the last `make reproduce`: `python -m benchmarks.orchestration`.

Work is the time that stages compute. The rest of the run of `flows.reproduce` is orchestration: servers, DVC, Prefect,
imports, gates and MLflow. With `compute.parallel_stages` above 1, time counts for each stage that can run at once,
and the rest includes waiting for other stages. For a run of all stages, run `make clean` before. `--json` prints one
object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flows.reproduce import REPRODUCTION, Reproduction
from lotlip.config.params import load_params
from lotlip.data.stage_record import StageRecord

PARTS = ("imports", "prefect", "gate", "mlflow")


def measure() -> dict[str, dict[str, float]]:
    """Returns seconds by stage and part, for the stages of the last run. The items of a stage are added up.

    The row "all" has the whole run, and the number of stages that were up to date.

    Raises:
        ValueError: there is no record of a run.
    """
    params = load_params()
    if not REPRODUCTION.is_file():
        raise ValueError(f"{REPRODUCTION} does not exist; run `make reproduce` first")
    run = Reproduction.load(REPRODUCTION)
    stages: dict[str, dict[str, float]] = {}
    records = sorted(Path(params.paths.stages).glob("*.json"), key=lambda path: path.stat().st_mtime)
    ran = [path for path in records if path.stat().st_mtime >= run.started]
    for path in ran:
        record = StageRecord.load(path)
        row = stages.setdefault(record.stage, dict.fromkeys(("runs", "work", *PARTS), 0.0))
        row["runs"] += 1
        row["work"] += record.work_seconds
        for part, seconds in record.orchestration_seconds.items():
            row[part] += seconds
    total = {part: sum(row[part] for row in stages.values()) for part in ("runs", "work", *PARTS)}
    available = run.seconds * run.parallel_stages
    total["servers, DVC, rest"] = available - total["work"] - sum(total[part] for part in PARTS)
    total["up to date"] = len(records) - len(ran)
    total["seconds"] = run.seconds
    total["orchestration share"] = 1 - total["work"] / available
    return {**stages, "all": total}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Returns the measurement as a Markdown table, in seconds."""
    columns = ("runs", "work", *PARTS)
    lines = ["| stage | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for stage, row in rows.items():
        lines.append(f"| {stage} | {row['runs']:.0f} | " + " | ".join(f"{row[c]:.1f}" for c in columns[1:]) + " |")
    total = rows["all"]
    lines.append(
        f"\n{total['seconds']:.0f} s in total; servers, DVC and the rest: {total['servers, DVC, rest']:.1f} s; "
        f"orchestration: {total['orchestration share']:.1%}. {total['up to date']:.0f} stages were up to date."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    measured = measure()
    print(json.dumps(measured, allow_nan=False) if "--json" in sys.argv[1:] else table(measured))
