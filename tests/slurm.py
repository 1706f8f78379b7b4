"""A Slurm cluster of two machines for a test: munged and slurmd on each, slurmctld on the first."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

from tests.machines import Machine, two_machines, wait_until

# Program → Debian package.
PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
# Nodes like those for which infra/slurm/reproduce.sbatch is written. Slurm believes the file, not the hardware.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdParameters=config_overrides
SlurmdLogFile={folder}/%n/steps.log
SlurmdDebug=debug
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
NodeName={nodes} CPUs=96 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""
# `cred_expire` is also what a requeued job waits before it starts again, 120 s by default. /run is each machine's own.
# slurmd's sockets are there because a socket's path may have 108 characters, and pytest's folders can be longer.
SOCKET = "/run/munge/munge.socket.2"
DEVICES = [f"/run/gpu{number}" for number in range(8)]
JOB_SECONDS = 600


class Cluster:
    """A running cluster.

    Attributes:
        machines: the nodes; the first one also controls the cluster.
        environment: of Slurm's commands.
    """

    def __init__(self, folder: Path, machines: tuple[Machine, Machine]) -> None:
        self.machines, self.environment = machines, {"SLURM_CONF": str(folder / "slurm.conf")}
        self._controller = machines[0]

    def run(self, *command: str, environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
        """Runs one of Slurm's commands on the first machine, and returns its output."""
        return self._controller.run(*command, environment={**environment, **self.environment}, folder=folder)

    def nodes(self) -> dict[str, str]:
        """Returns the state of each node; empty if the controller does not answer yet."""
        try:
            listed = self.run("sinfo", "--noheader", "--Node", "--format=%N %t")
        except AssertionError:
            return {}
        return dict(line.split() for line in listed.splitlines())

    def works(self) -> bool:
        """Whether a job just ran on all machines. It resumes machines that Slurm drained because none started there."""
        for name, state in self.nodes().items():
            if state.startswith(("drain", "drng", "down")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume")
        try:
            self.run("srun", f"--nodes={len(self.machines)}", "--ntasks-per-node=1", "--immediate=20", "true")
        except AssertionError:
            return False
        return True

    def state(self, job: str) -> str:
        """Returns the state of a job."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for_job(self, job: str, log: Path, sooner: Callable[[], bool] = lambda: False) -> None:
        """Waits until a job has succeeded, or until `sooner` returns true.

        Raises:
            AssertionError: it failed, or took too long.
        """

        def told() -> str:
            written = log.read_text()[-8000:] if log.is_file() else ""
            return f"{''.join(machine.logs() for machine in self.machines)}\njob {job} is {self.state(job)}:\n{written}"

        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        asks = cycle((True, *(False,) * 9))  # the question starts programs; `sooner` must be seen at once
        wait_until(lambda: sooner() or (next(asks) and self.state(job) not in running), told, JOB_SECONDS)
        assert sooner() or self.state(job) == "COMPLETED", told()


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """Runs a cluster for the duration of the block.

    Args:
        folder: a new one, for settings, state and logs.
    """
    folder.mkdir()
    with two_machines(folder) as machines:
        names = [machine.name for machine in machines]
        text = CONFIGURATION.format(socket=SOCKET, controller=names[0], folder=folder, nodes=",".join(names))
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"Name=gpu File={','.join(DEVICES)}\n")
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        cluster = Cluster(folder, machines)
        for machine in machines:
            machine.run("mkdir", "/run/munge")
            machine.run("touch", *DEVICES)
            files = {"key": folder / "munge.key", **{name: f"/run/munge/{name}" for name in ("pid", "seed", "log")}}
            options = [f"--{name}-file={file}" for name, file in files.items()]
            machine.serve("munged", "munged", "--foreground", f"--socket={SOCKET}", *options)
            wait_until(partial(machine.has, SOCKET), machine.logs)
        configuration = ["-D", "-f", cluster.environment["SLURM_CONF"]]
        machines[0].serve("slurmctld", "slurmctld", *configuration)
        for machine in machines:
            machine.serve("slurmd", "slurmd", *configuration)
        wait_until(
            lambda: cluster.nodes() == dict.fromkeys(names, "idle"),
            lambda: "".join(machine.logs() for machine in machines),
        )
        wait_until(cluster.works, lambda: "".join(machine.logs() for machine in machines))
        yield cluster
