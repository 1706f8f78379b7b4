"""Runs one stage: `python -m flows STAGE [CAPTIONER or ABLATION]`."""

import runpy
import sys

from flows import stage_module
from lotlip.core.stages import STAGES

if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
    sys.exit(f"usage: python -m flows STAGE [CAPTIONER or ABLATION]; stages: {', '.join(STAGES)}")
sys.argv = sys.argv[1:]
runpy.run_module(stage_module(sys.argv[0]), run_name="__main__", alter_sys=False)
