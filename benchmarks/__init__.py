"""Benchmarks. docs/performance.md has their commands and results."""

import sys

from lotlip.core.console import exit_on_interrupt

if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2:3] and sys.orig_argv[2].startswith("benchmarks."):
    sys.excepthook = exit_on_interrupt
