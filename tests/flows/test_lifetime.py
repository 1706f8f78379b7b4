"""Killing a process ends the processes it started and leaves no files: fork server, forks and stages."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.runtime import fork_server as fork_server_module
from flows.runtime.fork_server import SOCKET, fork_server
from flows.runtime.supervisor import end_group, exit_on_signals, start_group
from tests.processes import have_ended
from tests.workspace import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")

# Starts another program like a stage, and prints the numbers of both processes.
PARENT = """
import os, sys, time
from flows.runtime.supervisor import start_group

child = start_group([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
# `python -m flows.runtime.fork_server` without its imports, which take seconds
QUICK = "import socket, sys; from flows.runtime import fork_server; \
fork_server.PRELOADED = (); fork_server._prepare = lambda: None; \
fork_server._Server(socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer).serve()"


@pytest.fixture
def fast_fork_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of programs that use a fork server without preloaded modules."""

    def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        return start_group([command[0], "-c", QUICK, command[-1]], **options)

    monkeypatch.setattr(fork_server_module, "start_group", start)
    (tmp_path / "parent.py").write_text(PARENT)
    with fork_server({**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}) as environment:
        yield environment


def server() -> psutil.Process:
    """The fork server that this process has started."""
    return next(child for child in psutil.Process().children() if QUICK in child.cmdline())


@contextmanager
def program(environment: dict[str, str], *command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def printed_processes(process: subprocess.Popen[str], count: int = 2) -> list[psutil.Process]:
    """The processes whose numbers a program prints."""
    assert process.stdout is not None
    numbers = process.stdout.readline().split()
    assert len(numbers) == count, process.communicate()[1]
    return [psutil.Process(int(number)) for number in numbers]


@pytest.mark.integration
def test_killing_the_fork_server_ends_its_forks_and_their_processes(fast_fork_server):
    with program(fast_fork_server, "-m", "flows.runtime.run", "parent") as client:
        processes = printed_processes(client)
        assert processes[0].ppid() == server().pid
        server().kill()
        assert have_ended(processes)
        assert client.wait(60) == 1
        assert "killed" in client.communicate()[1]


@pytest.mark.integration
def test_forks_collect_garbage(fast_fork_server, tmp_path):
    (tmp_path / "collects.py").write_text("import gc; print(gc.isenabled())")
    with program(fast_fork_server, "-m", "flows.runtime.run", "collects") as client:
        assert client.communicate(timeout=60)[0] == "True\n"


@pytest.mark.integration
def test_the_fork_server_survives_a_client_that_ends_before_its_request(fast_fork_server):
    for sent in (b"", b"\0" * 3, (100).to_bytes(8, "big") + b"{"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(fast_fork_server[SOCKET])
            if sent:
                socket.send_fds(connection, [sent], [0, 1, 2])
    with program(fast_fork_server, "-m", "flows.runtime.run", "parent") as client:
        assert printed_processes(client)[0].ppid() == server().pid


@pytest.mark.integration
def test_the_fork_server_leaves_no_folder_however_its_owner_ends(tmp_path, monkeypatch):
    owner = (
        "import os, time\nfrom flows.runtime.fork_server import fork_server\n"
        f"with fork_server(dict(os.environ)) as e:\n print(e[{SOCKET!r}], flush=True)\n time.sleep(600)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("lotlip.core.temporary.SOCKET_BASE_BYTES", 90)
    with program(environment, "-c", "import lotlip.core.temporary as t; t.SOCKET_BASE_BYTES = 90\n" + owner) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip()).parent
        processes = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        assert have_ended(processes)
    assert folder.is_dir() and folder.parent == tmp_path
    monkeypatch.setattr(
        fork_server_module,
        "start_group",
        lambda command, **options: start_group([*command[:1], "-c", QUICK, command[-1]], **options),
    )
    with fork_server({**os.environ, "PYTHONPATH": str(ROOT)}):
        assert not folder.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_a_program_ends_with_its_parent(tmp_path):
    with program({**os.environ, "PYTHONPATH": str(ROOT)}, "-c", PARENT) as parent:
        processes = printed_processes(parent)
        parent.kill()
        assert have_ended(processes[1:])


# Trains two seeds in parallel, each with two loader workers that hang in their first sample.
STUCK = """
import os, time
import torch
from lotlip.pretrain.loader import Loader
from lotlip.pretrain import trainer

class Stuck(torch.utils.data.IterableDataset):
    def __iter__(self):
        os.write(1, f"{os.getpid()}\\n".encode())
        time.sleep(600)
        yield

def run_job(job, open_sink):
    os.write(1, f"{os.getpid()}\\n".encode())
    loader = object.__new__(Loader)
    loader._workers, loader._prefetch = 2, 4
    loader._pipeline = lambda first, last: Stuck()
    next(loader.steps(0, 100))

trainer.import_deepspeed = trainer._write_start = lambda *_: None
trainer.run_job = run_job
trainer.train_in_parallel(trainer.Job.model_construct(seeds=[0, 1]), 2, None)
"""


@pytest.mark.system
def test_stuck_processes_of_a_killed_training_end_with_it(tmp_path):
    with program({**os.environ, "PYTHONPATH": str(ROOT)}, "-c", STUCK) as training:
        processes = [printed_processes(training, 1)[0] for _ in range(6)]
        training.kill()
        assert have_ended(processes)


@pytest.mark.integration
def test_a_stage_ends_when_dvc_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    script = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'flows.stages.ingest'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "ingest", SOCKET: "socket"}
    with socket.socket(socket.AF_UNIX) as fork_server_process, program(environment, "-c", script) as dvc:
        fork_server_process.bind("socket")
        fork_server_process.listen()
        fork_server_process.settimeout(60)
        with fork_server_process.accept()[0]:  # never answers
            stage = psutil.Process(dvc.pid).children()
            dvc.kill()
            assert stage and have_ended(stage)


def test_a_program_started_in_a_thread_outlives_the_thread():
    processes: list[subprocess.Popen[Any]] = []
    thread = threading.Thread(
        target=lambda: processes.append(start_group(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    )
    thread.start()
    thread.join()
    (process,) = processes
    try:
        assert process.communicate(b"alive") == (b"alive", None)
        assert process.returncode == 0
    finally:
        end_group(process)


@pytest.mark.integration
def test_a_child_exits_if_its_parent_ended_before_it_was_bound(tmp_path):
    script = "from lotlip.core.lifetime import end_with_parent; end_with_parent(1 << 30); print('goes on')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGKILL, "")


@pytest.mark.integration
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_the_supervisor_ends_all_processes_of_its_command(sign):
    """Grandchildren end, too, such as workers of a stage's servers."""
    owner = """
from flows.runtime.supervisor import exit_on_signals, group, supervised
with exit_on_signals(), group(supervised(["sh", "-c", "sleep 600 & echo $$ $!; wait"])) as process:
    process.wait()
"""
    with program({**os.environ, "PYTHONPATH": str(ROOT)}, "-c", owner) as parent:
        processes = printed_processes(parent)
        parent.send_signal(sign)
        assert have_ended(processes)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_only_the_first_signal_interrupts_and_the_clean_up_completes(sign):
    cleaned = False
    kind: type[BaseException] = KeyboardInterrupt if sign == signal.SIGINT else SystemExit
    with pytest.raises(kind), exit_on_signals():
        try:
            os.kill(os.getpid(), sign)
            signal.pause()
        finally:
            for more in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), more)
            cleaned = True
    assert cleaned


@pytest.mark.system
def test_the_prefect_server_of_a_killed_stage_ends(tmp_path):
    script = """
import os, signal, psutil
from flows.runtime.servers import prefect_for_program
with prefect_for_program():
    print(os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    signal.pause()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path)}
    with program(environment, "-c", script, cwd=tmp_path) as stage:
        processes = printed_processes(stage)
        assert processes[1].cmdline()[1:4] == ["-m", "flows.runtime.applications", "prefect"]
        stage.kill()
        assert have_ended(processes[1:])
