"""Runs any module as a program: `python -m flows.runtime.run MODULE …`.

The fork server runs it if there is one. The program ends with the process that started it.
"""

import runpy
import sys

from lotlip.core.lifetime import end_with_parent

if __name__ == "__main__":
    end_with_parent()  # before the module's imports, which may take seconds
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
