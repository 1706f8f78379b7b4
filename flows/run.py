"""Runs any module as a program, `python -m flows.run MODULE …`, so that a warm process can take it over."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
