"""Hashes all outputs of the pipeline, without times, which differ between two runs.

Files with times are normalized, not skipped: only the value of a key, column or pattern that holds a time is removed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lotlip.core.files import RECORD

# The outputs of stages, relative to the checkout.
OUTPUTS = (
    "data/ingest",
    "data/image-tower",
    "data/captions",
    "data/caption-store",
    "data/shards",
    "models",
    "metrics",
    "report",
)

# Keys of JSON and columns of CSV files that hold times or rates.
TIMES = frozenset(
    {
        "seconds",
        "work_seconds",
        "samples_per_second",
        "orchestration_seconds",
        "orchestration_share",
        "data_wait_share",
    }
)


def fingerprints(project: Path) -> dict[str, str]:
    """Returns the SHA-256 of the normalized content of every published file and link, by its name in the checkout.

    Great Expectations puts the time of a validation into the names of its pages. It is removed from the names too.
    """
    hashes: dict[str, str] = {}
    for output in OUTPUTS:
        for path in sorted((project / output).rglob("*")):
            if path.is_symlink() or path.is_file():
                name = _RUN_TIME.sub("TIME", path.relative_to(project).as_posix())
                while name in hashes:  # a second validation of the same table, which a single run does not have
                    name += " (again)"
                hashes[name] = hashlib.sha256(_content(path, name)).hexdigest()
    return hashes


def differences(expected: dict[str, str], project: Path) -> list[str]:
    """Returns a line for each file in which a checkout's outputs differ from the fingerprints of another one."""
    actual = fingerprints(project)
    return [
        *(f"missing: {name}" for name in sorted(expected.keys() - actual.keys())),
        *(f"unexpected: {name}" for name in sorted(actual.keys() - expected.keys())),
        *(f"different: {name}" for name in sorted(expected.keys() & actual.keys()) if expected[name] != actual[name]),
    ]


def _content(path: Path, name: str) -> bytes:
    if path.is_symlink():
        return b"link to " + str(path.readlink()).encode()
    data = path.read_bytes()
    normalize = _normalizer(name)
    if normalize is None:
        return data
    try:
        return normalize(data.decode("utf-8")).encode()
    except ValueError:  # a damaged file differs from any intact one
        return data


def _normalizer(name: str) -> Callable[[str], str] | None:
    """Returns the function that removes the times from a file's text, or None if the file has no times."""
    if name.endswith(f"/{RECORD}"):
        return _record
    if "/data-docs/" in name:
        return _pages if name.endswith(".html") else None
    if name.endswith("/history.json") or (name.startswith("metrics/stages/") and name.endswith(".json")):
        return _json
    if name.startswith("report/tables/") and name.endswith(".csv"):
        return _csv
    if name in ("report/index.html", "report/report.md"):
        return _report
    return None


def _record(text: str) -> str:
    """Keeps only the names in a folder's record. Files with times change the hashes, and are compared themselves."""
    data = json.loads(_RUN_TIME.sub("TIME", text))
    return json.dumps(data | {"files": sorted(data["files"])}, allow_nan=False)


def _json(text: str) -> str:
    return json.dumps(_without_times(json.loads(text)), sort_keys=True, allow_nan=False)


def _without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_times(value) for key, value in data.items() if key not in TIMES}
    return [_without_times(value) for value in data] if isinstance(data, list) else data


def _csv(text: str) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    kept = [number for number, column in enumerate(rows[0] if rows else []) if column not in TIMES]
    return json.dumps([[row[number] for number in kept if number < len(row)] for row in rows], allow_nan=False)


_RUN_TIME = re.compile(r"\d{8}T\d{6}\.\d+Z")
_DATE = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+00:00| UTC)?")
_SORT_KEY = re.compile(r"(?<='_run_time_sort': )[\d.]+")
_ID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")


def _pages(text: str) -> str:
    """Removes the run's time and random identifiers from Great Expectations' pages."""
    return _ID.sub("ID", _SORT_KEY.sub("TIME", _DATE.sub("TIME", _RUN_TIME.sub("TIME", text))))


# Headings of the report's columns that hold times or rates; "Share" is a share of time only in tables with "Time".
_TIME_HEADINGS = frozenset({"Time", "Samples/s", "Orchestration", "Data wait"})
_PARTS = re.compile(r"Orchestration: [^<]+<")  # a stage's orchestration by part, in seconds
_TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr\b.*?</tr>", re.DOTALL)
_CELL = re.compile(r"(<t[hd]\b[^>]*>)(.*?)(</t[hd]>)", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")


def _report(text: str) -> str:
    """Removes the cells of columns with times from the report's HTML or Markdown."""
    if "<table" in text:
        text = _PARTS.sub("Orchestration: TIME<", _RUN_TIME.sub("TIME", text))
        return _TABLE.sub(lambda table: _html_table(table[0]), text)
    lines: list[str] = []
    dropped: set[int] = set()
    for line in text.splitlines():
        cells = line.split("|")
        if not line.startswith("|"):
            dropped = set()
        elif not lines or not lines[-1].startswith("|"):
            dropped = _time_columns(cells)
        elif dropped:
            line = "|".join("" if number in dropped else cell for number, cell in enumerate(cells))
        lines.append(line)
    return "\n".join(lines)


def _html_table(table: str) -> str:
    first = _ROW.search(table)
    dropped = _time_columns([cell[2] for cell in _CELL.finditer(first[0])]) if first else set()

    def row(match: re.Match[str]) -> str:
        numbers = iter(range(match[0].count("<t")))
        return _CELL.sub(lambda cell: cell[1] + ("" if next(numbers) in dropped else cell[2]) + cell[3], match[0])

    return _ROW.sub(row, table) if dropped else table


def _time_columns(headings: list[str]) -> set[int]:
    names = [_TAG.sub("", heading).strip() for heading in headings]
    times = _TIME_HEADINGS | ({"Share"} if "Time" in names else set())
    return {number for number, name in enumerate(names) if name in times}
