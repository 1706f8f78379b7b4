"""Compares stored results of ablations with those of another one, seed by seed, as a Markdown table.

`python -m lotlip.report.pairs results/demo.csv lotlip lotlip-debias lotlip-himo` tests how the second and third
ablation differ from the first, by the paired t test of the report's findings. Holm's method corrects for all tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lotlip.figures.intervals import estimate
from lotlip.report.inputs import BenchmarkResult
from lotlip.report.measures import MEASURES
from lotlip.report.significance import ALPHA, holm, p_value
from lotlip.report.stored import StoredRow, read_rows
from lotlip.report.verdicts import signed

_COLUMNS = ("ablation", "measure", "seeds", "points, 95 % interval", "p", "p, Holm", "verdict")


def pairs_table(rows: Sequence[StoredRow], base: str, others: Sequence[str]) -> str:
    """Returns a row for each of the other ablations and each measure that both have, with the verdict after correction.

    A measure is averaged over the benchmarks that have it. Only seeds that both ablations have are compared.

    Args:
        rows: stored results.
        base: the ablation that the others are compared with.
        others: the other ablations.

    Raises:
        ValueError: an ablation has no rows, rows of several settings or data, or no two seeds that the first one has.
    """
    if base in others:
        raise ValueError(f"{base} cannot be compared with itself; name other ablations")
    tested: list[tuple[str, str, list[float], float]] = []
    for name in dict.fromkeys(others):  # a repeated name would count twice in the correction
        known = len(tested)
        first, second = _results(rows, base), _results(rows, name)
        if first.keys() != second.keys():
            raise ValueError(
                f"{name} and {base} were scored on different benchmarks or data, so they cannot be compared"
            )
        for measure in MEASURES:
            having = [key for key in first if measure.has(first[key]) and measure.has(second[key])]
            one, two = (measure.means([results[key] for key in having]) for results in (first, second))
            differences = [two[seed] - one[seed] for seed in sorted(one.keys() & two.keys())]
            if len(differences) >= 2:
                tested.append((name, measure.label, differences, p_value(differences)))
        if len(tested) == known:
            raise ValueError(f"no two seeds of {base} and {name} have the same measure")
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for (name, label, differences, p), corrected in zip(tested, holm([p for *_, p in tested]), strict=True):
        mean = estimate(differences)
        interval = f"{signed(mean.value)} [{signed(mean.low or 0)}, {signed(mean.high or 0)}]"
        verdict = "undecided" if corrected >= ALPHA else "better" if mean.value > 0 else "worse"
        lines.append((name, label, str(len(differences)), interval, f"{p:.2g}", f"{corrected:.2g}", verdict))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _results(rows: Sequence[StoredRow], ablation: str) -> dict[tuple[str, str], BenchmarkResult]:
    """Returns (benchmark, data) → results of an ablation."""
    own = [row for row in rows if row.ablation == ablation]
    if not own:
        raise ValueError(
            f"there are no rows of {ablation}; there are {', '.join(sorted({row.ablation for row in rows}))}"
        )
    kinds = {(row.benchmark, row.settings, row.data) for row in own}
    if len(kinds) > len({row.benchmark for row in own}):
        raise ValueError(f"the rows of {ablation} have several settings or data; remove the outdated ones")
    found: dict[tuple[str, str], BenchmarkResult] = {}
    for row in own:
        found.setdefault((row.benchmark, row.data), BenchmarkResult()).seeds[row.seed] = row.scores
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table for the ablations on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lotlip.report.pairs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("table", type=Path, help="table of stored results")
    parser.add_argument("base", help="the ablation that others are compared with")
    parser.add_argument("others", nargs="+", help="the other ablations")
    parser.add_argument(
        "--benchmark", action="append", help="benchmark to compare them on; may be repeated; default: the mean of all"
    )
    given = parser.parse_args(arguments)
    try:
        rows = read_rows(given.table)
        known = sorted({row.benchmark for row in rows})
        if not known:
            raise ValueError(f"{given.table} has no rows; python -m flows.store_results adds this run's scores")
        if unknown := sorted(set(given.benchmark or ()) - set(known)):
            raise ValueError(f"there are no rows of the benchmark {', '.join(unknown)}; there are {', '.join(known)}")
        chosen = [row for row in rows if row.benchmark in (given.benchmark or known)]
        for name in (given.base, *given.others):
            if name in {row.ablation for row in rows} - {row.ablation for row in chosen}:
                raise ValueError(f"{name} has no scores on {', '.join(given.benchmark)}")
        print(pairs_table(chosen, given.base, given.others))
    except OSError as error:
        sys.exit(f"error: {given.table} cannot be read ({error.strerror}); name a table of stored results")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
