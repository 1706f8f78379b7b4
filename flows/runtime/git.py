"""Runs git, which a pipeline can do without, but sweeps cannot."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any


def run_git(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs git and captures its output; a failure is a status other than 0.

    Args:
        arguments: of git.
        options: options of subprocess.run.

    Raises:
        FileNotFoundError: there is no program git.
    """
    program = shutil.which("git")
    if program is None:
        raise FileNotFoundError("sweeps and work pools need the program git, which is not in PATH; install it")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, **options)
