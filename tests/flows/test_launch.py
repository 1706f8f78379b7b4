"""Starting training: commands, and runs of the tiny world by each launcher on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import yaml

from flows.runtime import agent as join
from flows.runtime.processes import launch, read_hostfile, reason_of, run_group
from flows.runtime.scratch import StageFailed
from flows.runtime.servers import free_port
from flows.runtime.supervisor import end_group, group, start_group, supervised
from lotlip.core.compute import HostfileLaunch, LocalLaunch, RendezvousLaunch, SlurmLaunch, TrainingCompute
from tests.conftest import TinyWorld
from tests.machines import Machine, need, two_machines, wait_until
from tests.ssh import PROGRAMS, ssh_machines
from tests.training import losses, tiny_job, train

ROOT = Path(__file__).parents[2]
TRAINING = "lotlip.train"


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


# --- commands -----------------------------------------------------------------------------------------------------


def test_one_machine_needs_a_launcher_for_several_processes_only():
    assert launch("m", ["x"], 1, LocalLaunch())[1:] == ["-m", "flows.runtime.run", "m", "x"]
    command = launch("m", ["x"], 4, LocalLaunch())
    assert command[1:] == ["-m", "flows.runtime.local_launch", "4", "m", "x"]


def test_a_hostfile_is_passed_to_deepspeed(tmp_path):
    path = hostfile(tmp_path, "# two machines\nnode-a slots=8\n\nnode-b slots=8  # the second\n")
    assert read_hostfile(path) == {"node-a": 8, "node-b": 8}
    command = launch("m", ["x"], 16, HostfileLaunch(kind="hostfile", path=path, port=1234))
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert {f"--hostfile={path}", "--master_addr=node-a", "--master_port=1234", "--module"} <= set(command)
    assert command[-2:] == ["m", "x"]


@pytest.mark.slow
def test_deepspeed_reads_the_hostfile_equally():
    from deepspeed.launcher.runner import fetch_hostfile

    path = ROOT / "infra" / "deepspeed" / "hostfile"
    assert dict(fetch_hostfile(str(path))) == read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\n", "has 8 slots, but compute.training.processes is 16; make them equal"),
        ("a slots=8\na slots=8\n", "has the line 'a slots=8'; expected `HOST slots=GPUS`, with each host once"),
        ("a 8\n", "has the line 'a 8'; expected `HOST slots=GPUS`"),
        ("# nothing\n", "has no hosts; add a line"),
    ],
)
def test_an_unusable_hostfile_is_an_error_with_its_reason(tmp_path, text, message):
    path = hostfile(tmp_path, text)
    with pytest.raises(StageFailed, match=message):
        launch("m", [], 16, HostfileLaunch(kind="hostfile", path=path))
    with pytest.raises(StageFailed, match="does not exist; create it with a line"):
        read_hostfile(tmp_path / "none")


def test_slurm_needs_an_allocation_and_srun(tmp_path, monkeypatch):
    how = SlurmLaunch(kind="slurm", nodes=4)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(StageFailed, match=r"does not run in a Slurm allocation; submit infra/slurm/reproduce\.sbatch"):
        launch("m", ["x"], 32, how)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageFailed, match="its program srun is not in PATH; install it"):
        launch("m", ["x"], 32, how)
    (tmp_path / "srun").touch(mode=0o755)
    command = launch("m", ["x"], 32, how)
    assert command[0] == "srun" and {"--nodes=4", "--ntasks=4", "--ntasks-per-node=1"} <= set(command)
    assert {"--nnodes=4", "--nproc-per-node=8"} <= set(command)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "96")
    assert set(launch("m", ["x"], 32, how)) - set(command) >= {"--cpus-per-task=96"}


def test_each_launch_has_its_own_rendezvous_and_one_machine_hosts_the_store():
    how = RendezvousLaunch(kind="rendezvous", nodes=2, endpoint="lead:29500")
    first, second = (launch("m", ["x"], 16, how) for _ in range(2))
    assert first != second
    assert {"--rdzv-endpoint=lead:29500", "--nproc-per-node=8", "--rdzv-conf=is_host=1"} <= set(first)


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        ({"kind": "slurm", "nodes": 3}, "processes 8 is the total over all machines and must be divisible .* 3; use 9"),
        ({"kind": "rendezvous", "nodes": 2, "endpoint": "lead"}, "should match pattern"),
        ({"kind": "mpi"}, "'local', 'hostfile', 'slurm', 'rendezvous'"),
    ],
)
def test_an_invalid_launch_is_an_error_with_its_reason(launched, message):
    with pytest.raises(ValueError, match=message):
        TrainingCompute(processes=8, launch=launched)


# --- agents -------------------------------------------------------------------------------------------------------


@contextmanager
def start_agent(folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = start_group(
        [sys.executable, "-m", "flows.runtime.agent"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        end_group(process)


@pytest.mark.integration
def test_agents_run_the_announced_training_until_the_announcement_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = RendezvousLaunch(kind="rendezvous", nodes=2, endpoint="localhost:1")
    program = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    with start_agent(tmp_path) as process:
        assert process.stdout is not None
        with join.announced(["python", "-c", program, "--rdzv-conf=is_host=1"], how):
            assert process.stdout.readline().startswith("joining -c import os, time")
            arguments = json.loads(join.ANNOUNCED.read_text())
            assert arguments == ["-c", program, "--rdzv-conf=is_host=0"]
        assert process.stdout.readline() == "waiting for the next training\n"
        started = tmp_path / "pid"
        assert not started.is_file() or not Path(f"/proc/{started.read_text()}").exists()
    assert process.returncode is not None


@pytest.mark.parametrize(
    "how",
    [
        RendezvousLaunch(kind="rendezvous", nodes=2, endpoint="localhost:1"),
        HostfileLaunch(kind="hostfile", path="hosts"),
    ],
    ids=lambda how: how.kind,
)
def test_trainings_on_the_same_machines_take_turns(tmp_path, monkeypatch, how):
    """Stages run side by side (compute.parallel_stages)."""
    monkeypatch.chdir(tmp_path)
    order = []

    def train() -> None:
        with join.announced(["python", "-m", "second"], how):
            order.append("second begins")

    with join.announced(["python", "-m", "first"], how):
        thread = Thread(target=train)
        thread.start()
        thread.join(0.3)
        assert not join.ANNOUNCED.exists() or json.loads(join.ANNOUNCED.read_text()) == ["-m", "first"]
        order.append("first ends")
    thread.join(60)
    assert order == ["first ends", "second begins"]
    assert not join.ANNOUNCED.exists()


def test_other_launches_announce_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with join.announced(["python", "-m", "m"], LocalLaunch()):
        assert not join.ANNOUNCED.exists()


# --- complete runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_process_losses(
    tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory, process_group: dict[str, str]
) -> list[float]:
    """Losses of training in this process."""
    with pytest.MonkeyPatch.context() as patch:  # the launchers below are not to find the group
        for name, value in process_group.items():
            patch.setenv(name, value)
        return losses(train(tiny_job(tiny_world, tmp_path_factory.mktemp("alone"), {"steps": 3})))


Wrap = Callable[[Sequence[str]], list[str]]


def train_by(how, world: TinyWorld, folder: Path, wrap: Wrap) -> list[float]:
    """Trains a few steps in two processes like the flow, and returns the losses.

    `wrap` runs a command on another machine.
    """
    job = tiny_job(world, folder, {"steps": 3, "processes": 2})
    job.write(folder / "job.json")
    command = launch(TRAINING, [str(folder / "job.json")], 2, how)
    with join.announced(command, how):
        run_group(wrap(command), print, folder / "errors.log")
    return losses(job)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder in which training finds this checkout's code."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_pod(container: dict[str, Any], project: Path, world: Path) -> list[str]:
    """The start of a command that runs another one with a container's user, file systems and rights."""
    security, size = container["securityContext"], ["--size", str(2**30)]
    assert security["readOnlyRootFilesystem"] and security["capabilities"] == {"drop": ["ALL"]}
    words = ["bwrap", "--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--ro-bind", "/", "/"]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for mount in container["volumeMounts"]:
        volume = ["--bind", str(project)] if mount["name"] == "project" else [*size, "--tmpfs"]
        words += [*volume, mount["mountPath"]]
    for folder in dict.fromkeys((str(ROOT), sys.prefix, sys.base_prefix, str(world))):  # the volumes may cover them
        words += ["--ro-bind", folder, folder]
    words += ["--bind", str(project), str(project), "--setenv", "PATH", f"{sys.prefix}/bin:{os.environ['PATH']}"]
    for entry in container["env"]:
        words += ["--setenv", entry["name"], entry["value"]]
    return [*words, "--chdir", container["workingDir"], "--"]


@pytest.mark.system
def test_training_in_two_confined_pods_equals_training_in_one_process(single_process_losses, tiny_world, project):
    """Runs the agent's command of the Kubernetes manifest, and the stage's, without a cluster."""
    need({"bwrap": "bubblewrap"})
    documents = yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "lotlip.yaml").read_text(encoding="utf-8"))
    spec = next(document for document in documents if document["kind"] == "Job")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    start = in_pod(container, project, tiny_world.shards.parents[1])
    how = RendezvousLaunch(kind="rendezvous", nodes=2, endpoint="lotlip-0.lotlip:29500")
    (project / "pods").mkdir()
    with two_machines(project / "pods", ("lotlip-0", "lotlip-1"), spec["subdomain"]) as (first, second):
        agent = [*start, "env", "JOB_COMPLETION_INDEX=1", *container["command"], *container["args"]]
        second.serve("agent", *agent)
        trained = train_by(how, tiny_world, project, wrap=lambda command: first.inside([*start, *command]))
        assert "joining -m torch.distributed.run" in second.logs()
    assert trained == pytest.approx(single_process_losses, abs=1e-5)


@pytest.mark.system
def test_deepspeeds_launcher_gives_each_process_of_a_machine_its_place(project):
    """All that training needs of a launcher; between machines, it trains by this one below."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    (project / "process.py").write_text(
        f"import os, pathlib; told = [os.environ[name] for name in {names}]\n"
        "pathlib.Path('rank-' + told[0]).write_text(' '.join(told))"
    )
    port = free_port()
    how = HostfileLaunch(kind="hostfile", path=hostfile(project, "localhost slots=2\n"), port=port)
    run_group(launch("process", [], 2, how), print, project / "errors.log")
    told = sorted(path.read_text() for path in project.glob("rank-*"))
    assert told == [f"{rank} {rank} 2 2 localhost {port}" for rank in range(2)]


def two_hosts(folder: Path) -> HostfileLaunch:
    return HostfileLaunch(kind="hostfile", path=hostfile(folder, "node-1 slots=1\nnode-2 slots=1\n"))


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach one another by ssh."""
    need(PROGRAMS)
    with (
        ssh_machines(tmp_path_factory.mktemp("nodes") / "ssh") as (machines, environment),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield machines


@pytest.mark.system
def test_training_by_pdsh_and_ssh_equals_training_in_one_process(single_process_losses, tiny_world, project, two_nodes):
    how = two_hosts(project)
    trained = train_by(how, tiny_world, project, wrap=two_nodes[0].inside)
    assert trained == pytest.approx(single_process_losses, abs=1e-5)
    assert all("Accepted publickey" in machine.logs() for machine in two_nodes)


@pytest.mark.system
def test_the_reason_of_a_failure_on_another_machine_is_found(project, two_nodes):
    (project / "process.py").write_text(
        "import os, sys\nif os.environ['RANK'] == '1': sys.exit('error: rank 1 cannot')"
    )
    command = two_nodes[0].inside(launch("process", [], 2, two_hosts(project)))
    with pytest.raises(StageFailed, match=r"^rank 1 cannot \("):
        run_group(command, print, project / "errors.log")


@pytest.mark.system
def test_no_process_outlives_a_launch_by_pdsh_and_ssh(project, two_nodes):
    (project / "process.py").write_text(
        "import os, pathlib, time; pathlib.Path('rank-' + os.environ['RANK']).touch(); time.sleep(600)"
    )

    def running() -> list[str]:
        return [
            line for machine in two_nodes for line in machine.run("ps", "-eo", "args=").splitlines() if "python" in line
        ]

    command = two_nodes[0].inside(supervised(launch("process", [], 2, two_hosts(project))))
    with group(command, stdout=subprocess.DEVNULL):  # its end kills the supervisor by SIGKILL
        wait_until(lambda: len(list(project.glob("rank-*"))) == 2, lambda: two_nodes[0].logs())
        assert sum("process" in line for line in running()) >= 2
    wait_until(lambda: not running(), lambda: "\n".join(running()))


def listening(processes: Sequence[psutil.Process]) -> set[str]:
    """The addresses at which processes accept connections."""
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.slow
def test_training_in_one_process_listens_on_loopback_only(single_process_losses):
    assert listening([psutil.Process()]) <= {"127.0.0.1", "::1"}


@pytest.mark.system
def test_training_in_several_processes_of_a_machine_listens_on_loopback_only(tiny_world, project):
    job = tiny_job(tiny_world, project, {"steps": 100000, "processes": 2})
    job.write(project / "job.json")
    with group(launch(TRAINING, [str(project / "job.json")], 2, LocalLaunch()), stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert any(b"step 3/" in line for line in started.stdout)
        launched = psutil.Process(started.pid)
        family = [launched, *launched.children(recursive=True)]
        addresses = listening(family)
    assert len(family) >= 2
    assert addresses <= {"127.0.0.1", "::1"}


# --- reasons ------------------------------------------------------------------------------------------------------

# Output of torch.distributed.run after an error in a worker.
TORCHRUN_BLOCK = """
============================================================
m FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-28_05:00:00
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 2)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : 1 (pid: 1)
============================================================
"""


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("error: the shards are gone", "the shards are gone"),
        ("error: x: process 1 of 2 lost another one, which\nerror: the disk is full", "the disk is full"),
        ("Traceback (most recent call last):\n  x = 1\nKeyError: 'key'", "KeyError: 'key'"),
        ("[rank1]: torch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_the_reason_of_a_failure_comes_from_before_torchruns_report(written, reason):
    end = "Traceback (most recent call last):\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert reason_of(written + "\n" + end + TORCHRUN_BLOCK) == reason
    assert reason_of(written) == reason


def test_the_reason_of_a_silent_process_is_torchruns_line_about_it():
    line = "E1128 05:00:00.000000 7 torch/distributed/elastic/api.py:984] failed (exitcode: 3) local_rank: 0 (pid: 8)"
    end = "Traceback (most recent call last):\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    srun = "srun: error: node-1: task 0: Exited with exit code 1\nsrun: Terminating StepId=5.0\n"
    assert reason_of(f"{line}\n{end}{TORCHRUN_BLOCK}{srun}") == "failed (exitcode: 3) local_rank: 0"
    killed = TORCHRUN_BLOCK.replace("To enable traceback see", "Signal 9 (SIGKILL) received by PID 8; see")
    assert reason_of(f"{line}\n{end}{killed}") == "Signal 9 (SIGKILL) received by PID 8"


def test_the_reason_of_a_failure_without_an_error_is_its_last_line():
    assert reason_of("Segmentation fault\n=====\n") == "Segmentation fault"
    assert reason_of("") == ""


@pytest.mark.integration
def test_the_first_process_that_fails_ends_the_others(project):
    (project / "process.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('error: rank 1 cannot')\ntime.sleep(600)"
    )
    with pytest.raises(StageFailed, match="rank 1 cannot"):
        run_group(launch("process", [], 2, LocalLaunch()), print, project / "errors.log")
