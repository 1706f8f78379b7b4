"""Prefect flows, one for each DVC stage: they open paths, fan out, gate and publish. The work itself is in lotlip."""

import os
import sys
from pathlib import Path

import lotlip  # noqa: F401 - turns telemetry off before Prefect is imported
from lotlip.core.caches import cache_folder, private_folder
from lotlip.core.console import INTERRUPTED, escape_unprintable, exit_on_interrupt
from lotlip.core.lifetime import end_with_parent
from lotlip.core.stages import STAGES, section


def stage_module(stage: str) -> str:
    """The module that runs a stage as a program."""
    return f"flows.stages.{section(stage)}"


# The module that this process runs as a program, and its arguments; empty where it runs something else.
_program, *_arguments = sys.orig_argv[2:] if sys.orig_argv[1:2] == ["-m"] and len(sys.orig_argv) > 2 else [""]
if _program == "flows" and _arguments and _arguments[0] in STAGES:
    _program, _arguments = stage_module(_arguments[0]), _arguments[1:]
if _program.startswith("flows."):
    escape_unprintable()

# Runs, logs and profiles of this checkout stay in it, so that `make ui` shows them.
os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").resolve()))
# Freshness is DVC's business: Prefect neither stores results nor caches by them.
os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
# A line for each unit is written by the stage; Prefect's own two for each task would drown it.
os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL", "WARNING")
# A stage run by itself has a server of its own, on a database that another one may be using.
os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
# That server is that of flows.runtime.servers, which asks for a password. Prefect's own would run commands for any
# user of the machine.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

# A server that has ended is given up after half a minute, not two and a half.
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")

# Programs of flows/ that a warm process does not take over: itself, DVC, and who watches that others end.
_ALONE = ("flows.runtime.fork_server", "flows.runtime.supervisor", "flows.runtime.dvc", "flows.runtime.local_launch")

if _program.startswith("flows."):
    if "DVC_STAGE" in os.environ and _program not in _ALONE:  # DVC runs it, and cannot end it if it is killed itself
        end_with_parent()
    sys.excepthook = exit_on_interrupt
    if os.environ.get("LOTLIP_STOPPING") and _program != "flows.runtime.dvc":  # DVC is ending (flows.runtime.dvc)
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
# Under torchrun and DeepSpeed's launcher it does not: they reach the process that they started by signals. The launcher
# of this project starts ranks with LOTLIP_STORE set (flows.runtime.local_launch), and ends a fork with its client.
_foreign_launcher = "RANK" in os.environ and "LOTLIP_STORE" not in os.environ
if os.environ.get("LOTLIP_FORK_SERVER") and _program and _program not in _ALONE and not _foreign_launcher:
    from flows.runtime.fork_server import delegate

    delegate(_program, _arguments)
