"""Drills of the team's servers, run natively in a new folder: `python -m benchmarks.team check|drill|sweep FOLDER`.

`check` takes two minutes: a tiny flow on a pool's worker, everything that has to be refused, a backup and its restore,
and a rotation of all keys.
`drill` runs reproductions through restarts and kills. `sweep` runs a sweep on two workers, one of which is killed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.team.check import check
from benchmarks.team.common import say
from benchmarks.team.drill import drill
from benchmarks.team.native import INSIDE, Team, enter
from benchmarks.team.sweep import SOURCE, sweep

SCENARIOS = {"check": check, "drill": drill, "sweep": sweep}


def main(what: str, state: Path) -> None:
    """Brings all services up and runs a scenario."""
    if INSIDE not in os.environ:
        if state.exists() and any(state.iterdir()):
            sys.exit(f"error: {state} is not empty, and a drill removes files of its own; name a new folder")
        state.mkdir(parents=True, exist_ok=True)
    enter(state)
    started = time.monotonic()
    # only the machines of a sweep have workers, and they have no folder in common
    options: dict[str, Any] = (
        {"without": ("worker-cpu",), "settings": {"TEAM_SOURCE": SOURCE}} if what == "sweep" else {}
    )
    with Team(state, **options) as team:
        say("all services are healthy", seconds=round(time.monotonic() - started, 1))
        try:
            SCENARIOS[what](team)
        except SystemExit:
            for name in team.running:
                print(team.tail(name), file=sys.stderr)
            raise
    say("done", seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SCENARIOS:
        sys.exit(f"usage: python -m benchmarks.team {'|'.join(SCENARIOS)} FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
