"""Prefect flows, one for each DVC stage: they open paths, fan out, gate and publish. The work itself is in lotlip."""

import os
import sys
from pathlib import Path

import lotlip  # noqa: F401 - turns telemetry off before Prefect is imported
from lotlip.caches import cache_folder, private_folder
from lotlip.console import INTERRUPTED, print_anything, say_stopped
from lotlip.lifetime import end_with_parent

if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2:3] and sys.orig_argv[2].startswith("flows."):
    print_anything()

# Runs, logs and profiles of this checkout stay in it, so that `make ui` shows them.
os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").resolve()))
# Freshness is DVC's business: Prefect neither stores results nor caches by them.
os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
# A line for each unit is written by the stage; Prefect's own two for each task would drown it.
os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL", "WARNING")
# A stage run by itself has a server of its own, on a database that another one may be using.
os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
# That server is flows.servers' and asks for a password. Prefect's own would run commands for anybody on the machine.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

# A server that has ended is given up after half a minute, not two and a half.
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")

# Programs of flows/ that a warm process does not take over: itself, DVC, and who watches that others end.
_ALONE = ("flows.warm", "flows.guard", "flows.dvc", "flows.together")
_program = sys.orig_argv[2] if sys.orig_argv[1:2] == ["-m"] and len(sys.orig_argv) > 2 else ""

if _program.startswith("flows."):
    if "DVC_STAGE" in os.environ and _program not in _ALONE:  # DVC runs it, and cannot end it if it is killed itself
        end_with_parent()
    sys.excepthook = say_stopped
    if os.environ.get("LOTLIP_STOPPING") and _program != "flows.dvc":  # DVC is ending (flows.dvc)
        sys.exit(INTERRUPTED)

# The defaults of DVC (/var/tmp/dvc) and of torch's compiler (a predictable name in TMPDIR) are folders that another
# user of the machine can write to or make first. Both load code from there: pickles and compiled modules.
for _variable, _name in {"DVC_SITE_CACHE_DIR": "dvc", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}.items():
    if _variable not in os.environ:
        try:
            os.environ[_variable] = str(private_folder(cache_folder() / _name))
        except OSError as error:
            if not _program.startswith("flows."):
                raise
            sys.exit(f"error: {error}")

# `python -m flows.STAGE`, where a warm process waits, needs none of the stage's imports: it hands over here and ends.
# Not under a launcher, which watches the process that it started.
if os.environ.get("LOTLIP_WARM") and _program and _program not in _ALONE and "RANK" not in os.environ:
    from flows.warm import hand_over

    hand_over(_program, sys.orig_argv[3:])
