"""Records which lines of the project a process runs.

SlipCover puts a probe before each line, which costs a few percent of the CPU time; the tracer of coverage.py adds 50 to
90 % to these tests. The lines are written as data of coverage.py, which combines and reports those of all processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from coverage import CoverageData
from slipcover import FileMatcher, ImportManager, Slipcover

DATA = "COVERAGE_FILE"
PACKAGES = ("flows", "lotlip")
# SlipCover removes a probe that was hit this often. It visits the variables of all threads then, and raises an error in
# the measured code if one of them changes meanwhile, so probes stay.
NEVER = 10**9


def record(project: Path) -> Callable[[], CoverageData]:
    """Records the lines of a project that run from now on, in modules that are not imported yet.

    Returns:
        A function that writes the lines of this process to a new file beside the one that COVERAGE_FILE names, and
        returns them.
    """
    probes = Slipcover(d_miss_threshold=NEVER)
    ImportManager(probes, FileMatcher(sources=[project / name for name in PACKAGES])).__enter__()

    def write() -> CoverageData:
        data = CoverageData(os.environ[DATA], suffix=True)
        files = probes.get_coverage()["files"]  # names are relative to the current folder
        data.add_lines({str(Path.cwd() / name): found["executed_lines"] for name, found in files.items()})
        data.write()
        return data

    return write
