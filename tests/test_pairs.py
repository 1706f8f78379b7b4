"""Ablations are compared over the seeds that both have, and verdicts are corrected for the number of tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lotlip.report.pairs import main, pairs_table
from lotlip.report.significance import holm, p_value
from lotlip.report.stored import StoredRow, add_rows

LONG = ("long.image_to_text.r1", "long.text_to_image.r1")


def rows(ablation: str, values: dict[int, float], benchmark: str = "scenes", **changes: str) -> list[StoredRow]:
    """Rows whose two long-text recalls are a value minus and plus 0.05."""
    return [
        replace(
            StoredRow(
                ablation, benchmark, ablation, "data", seed, {LONG[0]: value - 0.05, LONG[1]: value + 0.05}, "c", "m"
            ),
            **changes,
        )
        for seed, value in values.items()
    ]


BASE = rows("base", {0: 0.50, 1: 0.60, 2: 0.55, 3: 0.40})
OTHER = rows("other", {0: 0.60, 1: 0.71, 2: 0.64, 9: 0.10})
SAME = rows("same", {0: 0.51, 1: 0.59, 2: 0.55})


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_differences_are_paired_by_seed_and_corrected():
    other, same = cells(pairs_table([*BASE, *OTHER, *SAME], "base", ["other", "same"]))
    p_values = [p_value([10, 11, 9]), p_value([1, -1, 0])]
    assert other[:3] == ["other", "long text", "3"] and other[3].startswith("+10.0 [+7.5, +12.5]")
    assert other[4:] == [f"{p_values[0]:.2g}", f"{holm(p_values)[0]:.2g}", "better"]
    assert same[3].startswith("0.0 [") and same[6] == "undecided"
    ((*_, verdict),) = cells(pairs_table([*BASE, *OTHER], "other", ["base"]))
    assert verdict == "worse"


def test_a_measure_is_averaged_over_benchmarks():
    more = [*rows("base", {0: 0.2, 1: 0.2, 2: 0.2}, "more"), *rows("other", {0: 0.2, 1: 0.2, 2: 0.2}, "more")]
    ((_, _, seeds, points, *_),) = cells(pairs_table([*BASE, *OTHER, *more], "base", ["other"]))
    assert seeds == "3" and points.startswith("+5.0 [")


def test_a_measure_is_averaged_only_over_benchmarks_that_have_it():
    def with_top1(found: list[StoredRow], top1: float) -> list[StoredRow]:
        return [replace(row, scores={**row.scores, "classification.top1": top1 + row.seed / 100}) for row in found]

    more = [*rows("base", {0: 0.2, 1: 0.2, 2: 0.2}, "more"), *rows("other", {0: 0.2, 1: 0.2, 2: 0.2}, "more")]
    long, top1 = cells(pairs_table([*with_top1(BASE, 0.5), *with_top1(OTHER, 0.4), *more], "base", ["other"]))
    assert (long[1], top1[1]) == ("long text", "classification") and long[3].startswith("+5.0 [")
    assert top1[3].startswith("−10.0 [")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (BASE, "there are no rows of other; there are base"),
        ([*BASE, *OTHER, *rows("other", {5: 0.1}, settings="old")], "the rows of other have several settings or data"),
        ([*BASE, *rows("other", {0: 0.6, 1: 0.7}, data="new")], "different benchmarks or data"),
        ([*BASE, *rows("other", {3: 0.6, 4: 0.7})], "no two seeds of base and other"),
    ],
)
def test_what_cannot_be_compared_is_an_error(found, message):
    with pytest.raises(ValueError, match=message):
        pairs_table(found, "base", ["other"])


def test_an_ablation_that_cannot_be_compared_is_not_left_out():
    found = [*BASE, *OTHER, *rows("single", {0: 0.6})]
    with pytest.raises(ValueError, match="no two seeds of base and single"):
        pairs_table(found, "base", ["other", "single"])


def test_an_ablation_counts_once_and_never_against_itself():
    once, twice = (pairs_table([*BASE, *SAME], "base", others) for others in (["same"], ["same", "same"]))
    assert once == twice
    with pytest.raises(ValueError, match="base cannot be compared with itself"):
        pairs_table([*BASE, *SAME], "base", ["same", "base"])


def test_the_command_reads_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    add_rows(tmp_path / "table.csv", [*BASE, *OTHER])
    main([str(tmp_path / "table.csv"), "base", "other"])
    assert cells(capsys.readouterr().out)[0][6] == "better"
    with pytest.raises(SystemExit, match="error: there are no rows of missing"):
        main([str(tmp_path / "table.csv"), "base", "missing"])
    with pytest.raises(SystemExit, match=r"none\.csv cannot be read \(No such file or directory\); name a table"):
        main([str(tmp_path / "none.csv"), "base", "other"])
    add_rows(tmp_path / "empty.csv", [])
    with pytest.raises(SystemExit, match=r"empty\.csv has no rows; python -m flows\.store_results adds"):
        main([str(tmp_path / "empty.csv"), "base", "other"])


def test_the_command_can_compare_on_one_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = [*rows("base", {0: 0.2, 1: 0.2, 2: 0.2}, "more"), *rows("other", {0: 0.2, 1: 0.3, 2: 0.2}, "more")]
    table = str(tmp_path / "table.csv")
    add_rows(tmp_path / "table.csv", [*BASE, *OTHER, *more])
    main([table, "base", "other", "--benchmark", "more"])
    assert cells(capsys.readouterr().out)[0][6] == "undecided"
    main([table, "base", "other", "--benchmark", "scenes"])
    assert cells(capsys.readouterr().out)[0][6] == "better"
    with pytest.raises(SystemExit, match="no rows of the benchmark none; there are more, scenes"):
        main([table, "base", "other", "--benchmark", "none"])
    add_rows(tmp_path / "table.csv", SAME)
    with pytest.raises(SystemExit, match="same has no scores on more"):
        main([table, "base", "same", "--benchmark", "more"])
