"""Training processes: one group of their own, so that none outlives the flow that started them."""

from __future__ import annotations

import os
import re
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
HOST, GUEST = "--rdzv-conf=is_host=1", "--rdzv-conf=is_host=0"  # who keeps the store that all meet at


def launch(module: str, arguments: Sequence[str], processes: int, how: Launch) -> list[str]:
    """The command that runs a module as so many processes that train together.

    Args:
        module: as after `python -m`.
        arguments: of the module.
        processes: on all machines together.
        how: `compute.training.launch`.

    Raises:
        StageFailed: the hostfile has another number of slots, or there is no Slurm allocation.
    """
    program = ["-m", "flows.runtime.run", module, *arguments]
    if isinstance(how, HostfileLaunch):
        return [sys.executable, *_deepspeed(how, processes), *program[1:]]
    if isinstance(how, SlurmLaunch):
        if "SLURM_JOB_ID" not in os.environ:
            raise StageFailed(
                "compute.training.launch is slurm, but this is no Slurm allocation; submit infra/slurm/reproduce.sbatch"
            )
        step = ["srun", f"--nodes={how.nodes}", f"--ntasks={how.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        endpoint = f"{socket.gethostname()}:{how.port}"  # sbatch runs its script on the first node
        return [*step, sys.executable, *_torchrun(processes, how.nodes, endpoint), *program]
    if isinstance(how, RendezvousLaunch):
        meeting = _torchrun(processes, how.nodes, how.endpoint)
        return [sys.executable, *meeting, HOST, *program]
    if processes == 1:  # a warm one's, if there is one
        return [sys.executable, *program]
    return [sys.executable, "-m", "flows.runtime.local_launch", str(processes), module, *arguments]


def _torchrun(processes: int, nodes: int, endpoint: str) -> list[str]:
    """torch's launcher, the same on every node; each try has its own id, so that nobody meets an earlier one's."""
    each = [f"--nnodes={nodes}", f"--nproc-per-node={processes // nodes}"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={uuid4().hex}"]
    return ["-m", TORCHRUN, *each, *meeting]


def _deepspeed(how: HostfileLaunch, processes: int) -> list[str]:
    """DeepSpeed's launcher. It is told where the processes meet, for it would ask the first host by ssh."""
    hosts = read_hostfile(how.path)
    slots = sum(hosts.values())
    if slots != processes:
        raise StageFailed(
            f"{how.path} has {slots} slots, but compute.training.processes is {processes}; make them the same number"
        )
    meeting = ["--no_ssh_check", f"--master_addr={next(iter(hosts))}", f"--master_port={how.port}"]
    options = ["--quiet", "--no_local_rank", "--module"]
    return ["-m", "deepspeed.launcher.runner", f"--hostfile={how.path}", *meeting, *options]


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts of a DeepSpeed hostfile and their slots, in its order.

    Raises:
        StageFailed: the file is not there, or a line is not `HOST slots=NUMBER`.
    """
    if not path.is_file():
        raise StageFailed(f"{path} {not_a_file(path)}; write a line `HOST slots=GPUS` for each machine into it")
    hosts: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not found or found[1] in hosts:
            raise StageFailed(f"{path} has the line {line!r}; it needs `HOST slots=GPUS`, each host once")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise StageFailed(f"{path} names no host; write a line `HOST slots=GPUS` for each machine")
    return hosts


def run_group(command: Sequence[str], on_line: Callable[[str], None], log: Path) -> None:
    """Runs a command in a process group of its own and hands its lines on; ends the whole group when this flow ends.

    Args:
        command: and its arguments.
        on_line: takes each line of standard output.
        log: file that keeps standard error.

    Raises:
        StageFailed: the command failed; the message has its error, or the last line it wrote.
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
        raise StageFailed(f"{reason} (status {process.returncode}; all it wrote: {log})")


# A line that says what ended a Python program: our own words, or the last line of a traceback.
_ERROR = re.compile(
    r"(?:\[rank\d+\]:\s*)?(?:error: (?P<ours>.+)|(?P<raised>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?::.*)?))"
)
# What torchrun and DeepSpeed's launcher say of their workers' end, which is no reason.
_LAUNCHER = ("ChildFailedError", "SignalException", "CalledProcessError")
# What torchrun says of a worker that wrote nothing itself.
_SILENT = re.compile(r"Signal \d+ \(SIG\w+\) received by PID \d+|failed \(exitcode: -?\d+\) local_rank: \d+")


def reason_of(errors: str) -> str:
    """The line of a program's standard error that says why it failed; the last line if none does, "" if it is empty.

    The first of our own errors counts: the other processes fail because one did. torchrun follows it with a block of
    its own, which says no more than that a process failed.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    found = [match for line in lines if (match := _ERROR.fullmatch(line))]
    if ours := [match["ours"] for match in found if match["ours"]]:
        lost = "lost another one"  # as `lotlip.train` says of a process that waited for the one that failed
        return next((line for line in ours if lost not in line), ours[0])
    raised = [match["raised"] for match in found if not any(name in match["raised"] for name in _LAUNCHER)]
    silent = [match[0] for line in lines if (match := _SILENT.search(line))]
    plain = [line for line in lines if set(line) - set("=-* ")]
    return [*plain[-1:], *silent[-1:], *raised[-1:]][-1] if plain else ""
