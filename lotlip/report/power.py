"""Plans the number of seeds: what paired tests would detect, as a Markdown table.

`python -m lotlip.report.power --seeds 10 --tests 28` prints it, for spreads of paired differences from the report's
table "What could be detected".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lotlip.report.significance import ALPHA, POWER, power, smallest_detectable

SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # points
DIFFERENCES = (0.5, 1.0, 2.0, 4.0)  # points


def planning_table(
    seeds: int, tests: int, spreads: Sequence[float] = SPREADS, differences: Sequence[float] = DIFFERENCES
) -> str:
    """Returns what a paired t test would detect, a row per spread, at α and at the strictest level of Holm's method.

    Args:
        seeds: number of seeds, at least 2.
        tests: number of tests that Holm's method corrects for.
        spreads: standard deviations of the paired differences over seeds, in points.
        differences: true differences in points, for which the power is stated.
    """
    strict = ALPHA / tests
    heading = ["spread", f"detectable, α = {ALPHA}", f"α = {ALPHA}/{tests}"]
    heading += [f"power for {difference:g}, α = {ALPHA} ({ALPHA}/{tests})" for difference in differences]
    lines = [heading, ["---:"] * len(heading)]
    for spread in spreads:
        found = [smallest_detectable(spread, seeds, alpha) for alpha in (ALPHA, strict)]
        powers = [[power(difference, spread, seeds, alpha) for alpha in (ALPHA, strict)] for difference in differences]
        shown = [f"{100 * plain:.0f} % ({100 * corrected:.0f} %)" for plain, corrected in powers]
        lines.append([f"{spread:g}", *(f"{value:.2f}" for value in found), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table for the options on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lotlip.report.power", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument("--tests", type=int, default=1, help="number of tests that are corrected for")
    parser.add_argument("--spreads", type=float, nargs="+", default=SPREADS, help="spreads of differences, in points")
    parser.add_argument("--differences", type=float, nargs="+", default=DIFFERENCES, help="true differences, in points")
    given = parser.parse_args(arguments)
    if given.seeds < 2 or given.tests < 1 or min([*given.spreads, *given.differences]) <= 0:
        parser.error("--seeds must be at least 2, --tests at least 1, and spreads and differences above 0")
    print(f"{given.seeds} seeds; detectable: found with {100 * POWER:.0f} % probability; all differences in points\n")
    print(planning_table(given.seeds, given.tests, given.spreads, given.differences))


if __name__ == "__main__":
    main()
