"""A plugin of pytest that records which lines of the project the tests run: `pytest -p tests.measured`."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lines import DATA, PACKAGES, record

ROOT = Path(__file__).parents[1]

os.environ.setdefault(DATA, str(ROOT / ".coverage"))
_write = record(ROOT)


def pytest_sessionfinish() -> None:
    """Writes the lines that ran in this process, and names the files of which none ran."""
    data = _write()
    data.touch_files(str(path) for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    data.write()
