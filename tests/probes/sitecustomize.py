"""Records the lines that a fork server and its forks run.

Python imports this module first if PYTHONPATH names its folder. The project is the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import CodeType
from typing import NoReturn

from slipcover.importer import SlipcoverLoader

from tests.lines import record

_write = record(Path.cwd())
_exit = os._exit


def _write_and_exit(status: int) -> NoReturn:
    try:
        _write()
    finally:
        _exit(status)


def _get_code(loader: SlipcoverLoader, name: str) -> CodeType:
    return loader.sci.instrument(loader.orig_loader.get_code(name))


os._exit = _write_and_exit  # forks end by it, those of multiprocessing too
SlipcoverLoader.get_code = _get_code  # for `runpy`, by which forks run their program
