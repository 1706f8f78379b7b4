"""Prefect flows, one per DVC stage. They open paths, fan out, run gates and publish outputs. lotlip does the work."""

import os
import sys
from pathlib import Path

import lotlip  # noqa: F401 - turns telemetry off before Prefect is imported
from lotlip.core.caches import cache_folder, private_folder
from lotlip.core.console import INTERRUPTED, escape_unprintable, exit_on_interrupt
from lotlip.core.lifetime import end_with_parent
from lotlip.core.stages import STAGES, section


def stage_module(stage: str) -> str:
    """Returns the module that runs a stage as a program."""
    return f"flows.stages.{section(stage)}"


# The module that this process runs with `python -m`, and its arguments; empty for other programs.
_program, *_arguments = sys.orig_argv[2:] if sys.orig_argv[1:2] == ["-m"] and len(sys.orig_argv) > 2 else [""]
if _program == "flows" and _arguments and _arguments[0] in STAGES:
    _program, _arguments = stage_module(_arguments[0]), _arguments[1:]
if _program.startswith("flows."):
    escape_unprintable()

# Runs, logs and profiles are stored in the checkout, where `make ui` shows them.
os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").resolve()))
# DVC decides what is up to date, so Prefect does not store or cache results.
os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
# Stages log one line per unit; Prefect would add two per task.
os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL", "WARNING")
# A stage that runs on its own starts a server, whose database may be in use by another server.
os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
# That server (flows.runtime.servers) requires a password. Prefect's ephemeral server would run commands for any user
# of the machine.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

# Gives up on a dead server after 30 s instead of 150 s.
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")

# Programs of flows/ that never run in the fork server: the fork server itself, DVC, and the supervisors.
_NOT_DELEGATED = (
    "flows.runtime.fork_server",
    "flows.runtime.supervisor",
    "flows.runtime.dvc",
    "flows.runtime.lanes",
    "flows.runtime.local_launch",
)

if _program.startswith("flows."):
    if "DVC_STAGE" in os.environ and _program not in _NOT_DELEGATED:  # a killed DVC cannot end its stage
        end_with_parent()
    sys.excepthook = exit_on_interrupt
    if os.environ.get("LOTLIP_STOPPING") and _program not in ("flows.runtime.dvc", "flows.runtime.lanes"):  # DVC ends
        sys.exit(INTERRUPTED)

# The default caches of DVC (/var/tmp/dvc) and torch's compiler (a predictable name in TMPDIR) can be written to or
# created by other users of the machine. Both load code from there: pickles and compiled modules.
for _variable, _name in {"DVC_SITE_CACHE_DIR": "dvc", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}.items():
    if _variable not in os.environ:
        try:
            os.environ[_variable] = str(private_folder(cache_folder() / _name))
        except OSError as error:
            if not _program.startswith("flows."):
                raise
            sys.exit(f"error: {error}")

# With a fork server, `python -m flows STAGE` delegates to it here, before the stage's imports, and exits. Ranks of
# torchrun and DeepSpeed's launcher do not delegate, because those launchers signal the processes that they started.
# Ranks of this project's launcher (flows.runtime.local_launch) have LOTLIP_STORE set. They may delegate, because a fork
# ends with its client.
_foreign_launcher = "RANK" in os.environ and "LOTLIP_STORE" not in os.environ
if os.environ.get("LOTLIP_FORK_SERVER") and _program and _program not in _NOT_DELEGATED and not _foreign_launcher:
    from flows.runtime.fork_server import delegate

    delegate(_program, _arguments)
