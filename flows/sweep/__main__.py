"""Runs a sweep: `python -m flows.sweep SWEEP`."""

import sys

from flows.sweep.sweep import run

run(sys.argv[1:])
