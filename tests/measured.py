"""A plugin of pytest that records which lines of the project the tests run: `pytest -p tests.measured`.

SlipCover puts a probe before each line and removes it after the line has run, which costs a few percent of the CPU
time; the tracer of coverage.py adds 50 to 90 % to these tests. The lines are written as data of coverage.py, which
combines those of all processes and reports them.
"""

from __future__ import annotations

import os
from pathlib import Path

from coverage import CoverageData
from slipcover import FileMatcher, ImportManager, Slipcover

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "flows", ROOT / "lotlip")
DATA = os.environ.get("COVERAGE_FILE", str(ROOT / ".coverage"))

_probes = Slipcover()
ImportManager(_probes, FileMatcher(sources=PACKAGES)).__enter__()  # to the end of the process


def pytest_sessionfinish() -> None:
    """Writes the lines that ran in this process, and names the files of which none ran."""
    data = CoverageData(DATA, suffix=True)
    files = _probes.get_coverage()["files"]  # names are relative to the current folder
    data.add_lines({str(Path.cwd() / name): found["executed_lines"] for name, found in files.items()})
    data.touch_files(str(path) for package in PACKAGES for path in package.rglob("*.py"))
    data.write()
