"""Gates: they pass or fail, and write a report and pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from lotlip.core.checks import Check, GateFailed, run_gate


def gate_error(gate: Callable[[Path], list[Check]], report: Path) -> str:
    """Returns the message of the only failed check of a gate."""
    with pytest.raises(GateFailed) as raised:
        gate(report)
    message = str(raised.value)
    assert str(report / "gate.md") in message
    lines = [line.removeprefix("  - ") for line in message.splitlines() if line.startswith("  - ")]
    assert len(lines) == 1, message
    return lines[0]


def size_gate(table: dict[str, list], report: Path) -> list[Check]:
    from great_expectations import expectations as gxe

    suite = [gxe.ExpectColumnValuesToBeBetween(column="size", max_value=5, meta={"what": "size | is at most 5"})]
    return run_gate("demo", {"units": pd.DataFrame(table)}, {"units": suite}, report)


@pytest.mark.slow
def test_a_passing_gate_writes_a_report(tmp_path):
    assert size_gate({"unit": ["a", "b"], "size": [1, 5]}, tmp_path) == [Check("size | is at most 5", "all do", True)]
    report = (tmp_path / "gate.md").read_text()
    assert report.startswith("# Gate after demo: passed")
    assert "| ok | size \\| is at most 5 | all do |" in report
    assert (tmp_path / "data_docs/index.html").is_file()
    assert list((tmp_path / "data_docs/validations").rglob("*.html"))


@pytest.mark.slow
def test_the_report_may_be_in_a_folder_with_any_name(tmp_path):
    tmp_path = tmp_path / 'it\'s $HOME ${HOME}, "é"'
    tmp_path.mkdir()
    size_gate({"unit": ["a"], "size": [1]}, tmp_path)
    assert (tmp_path / "data_docs/index.html").is_file()
    assert list((tmp_path / "data_docs/validations").rglob("*.html"))


@pytest.mark.slow
def test_a_failing_gate_names_the_rows(tmp_path):
    table = {"unit": list("abcdef"), "size": [6, 1, 7, 8, 9, 5]}
    line = gate_error(lambda report: size_gate(table, report), tmp_path)
    assert line == "size | is at most 5: found 4 of 6 do not: a (6), c (7), d (8), …"
    assert "# Gate after demo: FAILED" in (tmp_path / "gate.md").read_text()
    assert "| **no** |" in (tmp_path / "gate.md").read_text()


@pytest.mark.slow
def test_a_missing_column_fails(tmp_path):
    assert "could not be evaluated" in gate_error(lambda report: size_gate({"unit": ["a"]}, report), tmp_path)


@pytest.mark.slow
def test_a_second_run_replaces_the_report(tmp_path):
    with pytest.raises(GateFailed):
        size_gate({"unit": ["a"], "size": [6]}, tmp_path)
    size_gate({"unit": ["a"], "size": [5]}, tmp_path)
    assert "passed" in (tmp_path / "gate.md").read_text()
    pages = list((tmp_path / "data_docs/validations").rglob("*"))
    assert [page.suffix for page in pages if not page.is_dir()] == [".html"]
    assert all(any(folder.iterdir()) for folder in pages if folder.is_dir())


@pytest.mark.slow
def test_gates_run_in_parallel_threads(tmp_path):
    def one(number: int) -> list[str]:
        checks = size_gate({"unit": ["a"] * number, "size": [1] * number}, tmp_path / str(number))
        return [check.observed for check in checks]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(1, 5))) == [["all do"]] * 4
    assert all((tmp_path / f"{number}/data_docs/index.html").is_file() for number in range(1, 5))


@pytest.mark.slow
def test_a_gate_is_fast_and_prints_nothing(tmp_path, capfd):
    import great_expectations  # noqa: F401  (the import is not what is timed)

    size_gate({"unit": ["a"], "size": [1]}, tmp_path)
    start = time.process_time()  # excludes other programs
    size_gate({"unit": ["a"] * 1000, "size": [1] * 1000}, tmp_path)
    assert time.process_time() - start < 3
    assert capfd.readouterr() == ("", "")
