"""Launches training processes in a process group of their own, so that none outlives the flow that started them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from flows.runtime.scratch import StageFailed
from flows.runtime.supervisor import group
from lotlip.core.compute import HostfileLaunch, Launch, RendezvousLaunch, SlurmLaunch
from lotlip.core.files import not_a_file

TORCHRUN = "torch.distributed.run"
# Options of torchrun: the node that serves the rendezvous store, and the nodes that connect to it.
STORE_HOST, STORE_CLIENT = "--rdzv-conf=is_host=1", "--rdzv-conf=is_host=0"


def launch(module: str, arguments: Sequence[str], processes: int, settings: Launch) -> list[str]:
    """Returns the command that runs a module in distributed training processes.

    Args:
        module: name of the module, as after `python -m`.
        arguments: arguments of the module.
        processes: total number of processes on all machines.
        settings: `compute.training.launch`.

    Raises:
        StageFailed: the hostfile cannot be used or has another number of slots, or there is no Slurm allocation or
            no srun.
    """
    program = ["-m", "flows.runtime.run", module, *arguments]
    if isinstance(settings, HostfileLaunch):
        return [sys.executable, *_deepspeed(settings, processes), *program[1:]]
    if isinstance(settings, SlurmLaunch):
        if "SLURM_JOB_ID" not in os.environ:
            raise StageFailed(
                "compute.training.launch is slurm, but this program does not run in a Slurm allocation; submit "
                "infra/slurm/reproduce.sbatch"
            )
        if shutil.which("srun") is None:
            raise StageFailed("compute.training.launch is slurm, but its program srun is not in PATH; install it")
        step = [
            "srun",
            f"--nodes={settings.nodes}",
            f"--ntasks={settings.nodes}",
            "--ntasks-per-node=1",
            "--kill-on-bad-exit=1",
        ]
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            step.append(f"--cpus-per-task={cores}")  # since Slurm 22.05, srun does not inherit it from sbatch
        endpoint = f"{socket.gethostname()}:{settings.port}"  # sbatch runs its script on the first node
        return [*step, sys.executable, *_torchrun(processes, settings.nodes, endpoint), *program]
    if isinstance(settings, RendezvousLaunch):
        launcher = _torchrun(processes, settings.nodes, settings.endpoint)
        return [sys.executable, *launcher, STORE_HOST, *program]
    if processes == 1:  # delegated to the fork server, if there is one
        return [sys.executable, *program]
    return [sys.executable, "-m", "flows.runtime.local_launch", str(processes), module, *arguments]


def _torchrun(processes: int, nodes: int, endpoint: str) -> list[str]:
    """Returns torchrun's arguments, the same for every node. Each launch has a new id, so earlier nodes cannot join."""
    size = [f"--nnodes={nodes}", f"--nproc-per-node={processes // nodes}"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={uuid4().hex}"]
    return ["-m", TORCHRUN, *size, *rendezvous]


def _deepspeed(settings: HostfileLaunch, processes: int) -> list[str]:
    """Returns the arguments of DeepSpeed's launcher. Without a master address it would ask the first host by ssh."""
    hosts = read_hostfile(settings.path)
    slots = sum(hosts.values())
    if slots != processes:
        raise StageFailed(
            f"{settings.path} has {slots} slots, but compute.training.processes is {processes}; make them equal"
        )
    rendezvous = ["--no_ssh_check", f"--master_addr={next(iter(hosts))}", f"--master_port={settings.port}"]
    # pdsh would put a host's name before each line, so that the flow would not recognise errors and warnings
    options = ["--launcher_args=-N", "--quiet", "--no_local_rank", "--module"]
    return ["-m", "deepspeed.launcher.runner", f"--hostfile={settings.path}", *rendezvous, *options]


def read_hostfile(path: Path) -> dict[str, int]:
    """Reads a DeepSpeed hostfile. Returns the number of slots by host, in the file's order.

    Raises:
        StageFailed: the file does not exist, has no hosts, or has a line that is not `HOST slots=NUMBER`.
    """
    if not path.is_file():
        raise StageFailed(f"{path} {not_a_file(path)}; create it with a line `HOST slots=GPUS` for each machine")
    hosts: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not match or match[1] in hosts:
            raise StageFailed(f"{path} has the line {line!r}; expected `HOST slots=GPUS`, with each host once")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise StageFailed(f"{path} has no hosts; add a line `HOST slots=GPUS` for each machine")
    return hosts


def run_group(command: Sequence[str], on_line: Callable[[str], None], log: Path) -> None:
    """Runs a command in a process group of its own. The whole group ends with this flow.

    Args:
        command: the program and its arguments.
        on_line: called with each line of standard output that is not blank.
        log: file for standard error.

    Raises:
        StageFailed: the command failed. The message has its error, or the last line that it wrote.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    with (
        log.open("w") as errors,
        group(command, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last = line.rstrip()
                on_line(last)
        process.wait()
    if process.returncode:
        reason = reason_of(log.read_text(encoding="utf-8", errors="replace")) or last
        raise StageFailed(f"{reason} (status {process.returncode}; log: {log})")


# A line that says why a Python program failed: this project's error message, or the last line of a traceback.
_ERROR = re.compile(
    r"(?:\[rank\d+\]:\s*)?(?:error: (?P<ours>.+)|(?P<raised>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?::.*)?))"
)
# Errors of torchrun and DeepSpeed's launcher that only say that a worker failed.
_LAUNCHER = ("ChildFailedError", "SignalException", "CalledProcessError")
# torchrun's line for a worker that wrote nothing itself.
_SILENT = re.compile(r"Signal \d+ \(SIG\w+\) received by PID \d+|failed \(exitcode: -?\d+\) local_rank: \d+")


def reason_of(errors: str) -> str:
    """Returns the line of a program's standard error that says why it failed.

    Without such a line it returns the last line, or "" if there is none. Of this project's errors, the first one is
    returned: the other processes fail because one did. torchrun appends a report that only says that a process failed.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    matches = [match for line in lines if (match := _ERROR.fullmatch(line))]
    if ours := [match["ours"] for match in matches if match["ours"]]:
        lost = "lost another one"  # part of `lotlip.train`'s error in a process that waited for the one that failed
        return next((line for line in ours if lost not in line), ours[0])
    raised = [match["raised"] for match in matches if not any(name in match["raised"] for name in _LAUNCHER)]
    silent = [match[0] for line in lines if (match := _SILENT.search(line))]
    plain = [line for line in lines if set(line) - set("=-* ")]
    return [*plain[-1:], *silent[-1:], *raised[-1:]][-1] if plain else ""
