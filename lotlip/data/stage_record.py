"""What a stage writes about its last run, `metrics/stages/<stage>.json`."""

from __future__ import annotations

from typing import Any

from lotlip.core.checks import Check
from lotlip.core.record import Record


class StageRecord(Record):
    """Time, throughput and counts of a stage's last run, and what its gate checked.

    Attributes:
        stage: the stage that it is of: "ingest", "caption", "pretrain", …
        name: the captioner or ablation of a stage that has one.
        seconds: from start to end, orchestration included.
        work_seconds: of the stage's work alone.
        samples: that it worked through.
        samples_per_second: as the stage measured it, over its work alone.
        orchestration_seconds: what was not work: imports, prefect, gate, mlflow, …
        counts: "read", "written", "failed"; empty where a stage has no items.
        failure_kinds: kind → number of failures.
        gate: what was expected, and what was found.
        notes: other figures by name.
    """

    stage: str
    name: str | None
    seconds: float
    work_seconds: float
    samples: int
    samples_per_second: float
    orchestration_seconds: dict[str, float]
    counts: dict[str, int]
    failure_kinds: dict[str, int]
    gate: list[Check]
    notes: dict[str, Any]
