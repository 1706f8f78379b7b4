"""A fork server: a process with all imports done, which forks for each stage and so saves it 5 to 12 s of imports.

`flows.reproduce` runs one for its duration and names its socket in LOTLIP_FORK_SERVER. `python -m flows STAGE` then
delegates: it sends its arguments, environment, folder and terminal, waits, and exits with the status that it receives.
Without a socket it does its own imports. No process outlives its owner, however the owner ends: a stage ends with the
program that delegated it, and the fork server with `flows.reproduce`.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lotlip
from flows.runtime.supervisor import start_group
from lotlip.core.code import source_files, stage_files
from lotlip.core.console import INTERRUPTED
from lotlip.core.lifetime import end_with_parent
from lotlip.core.stages import STAGES
from lotlip.core.temporary import temporary_folder

SOCKET = "LOTLIP_FORK_SERVER"
# How long the fork server waits for the request of a connected client, which sends it immediately.
REQUEST_SECONDS = 10

# Modules that the stages import; all forks share them.
PRELOADED = (
    "prefect",
    "flows.runtime.stage",
    "torch",
    "timm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "deepspeed",
    "mlflow",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",  # MLflow imports it when it opens a store
    "great_expectations",
    "pandas",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "jinja2",
    "webdataset",
    "duckdb",
    "prefect.flow_engine",
    "prefect.task_engine",
)


def code_digest() -> str:
    """Returns a hash of the project's code, in hex. A stage must run the code of its own checkout."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(lotlip.__file__).parent):
        for path in source_files(package):
            digest.update(f"{path.relative_to(package.parent)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- the client -----------------------------------------------------------------------------------------------------


def delegate(module: str, arguments: list[str]) -> None:
    """Has the fork server run a module as a program, and exits with its status. Returns if there is no fork server.

    Args:
        module: name of the module, as after `python -m`.
        arguments: arguments of the program.
    """
    path = os.environ.get(SOCKET)
    if not path:
        return
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            request = {
                "code": code_digest(),
                "argv": [module, *arguments],
                "cwd": str(Path.cwd()),
                "env": dict(os.environ),
            }
            data = json.dumps(request, allow_nan=False).encode()
            socket.send_fds(connection, [len(data).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(data)
        except OSError:  # the fork server's owner has ended
            return
        try:
            answer = connection.makefile().readline().strip()
        except ConnectionError:
            answer = ""
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
    if answer == "other code":
        return
    if not answer:  # the fork server was killed, and the stage with it
        sys.exit(f"error: {module}: the process that ran it was killed; if memory ran out, free some and run again")
    sys.exit(int(answer))


# --- the server -----------------------------------------------------------------------------------------------------


@contextmanager
def fork_server(environment: dict[str, str], folder: Path | None = None) -> Iterator[dict[str, str]]:
    """Runs a fork server for the duration of the block. Yields the environment in which stages delegate to it.

    Args:
        environment: environment variables of the fork server and of the stages. Prefect reads its settings only once,
            when it is imported.
        folder: the checkout whose code it runs; default: the current folder.
    """
    if sys.platform != "linux":  # pidfd exists only on Linux; elsewhere stages do their own imports
        yield environment
        return
    with temporary_folder("fork", for_sockets=True) as scratch:
        path = str(scratch / "socket")
        # The socket listens before the imports, so that clients wait for them instead of importing themselves.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            process = start_group(
                [sys.executable, "-m", "flows.runtime.fork_server", str(listener.fileno())],
                stdin=subprocess.PIPE,
                env=environment,
                cwd=folder,
                pass_fds=[listener.fileno()],
            )
        try:
            yield {**environment, SOCKET: path}
        finally:
            assert process.stdin is not None
            process.stdin.close()  # tells the fork server to end
            process.wait()


class _Server:
    """Forks for each request, and sends each client the exit status of its fork.

    Args:
        listener: the socket that clients connect to.
        owner: a stream that reaches its end when the process that owns this one ends.
    """

    def __init__(self, listener: socket.socket, owner: IO[bytes]) -> None:
        self.listener = listener
        self.owner = owner
        self.code = code_digest()
        self.clients: dict[int, socket.socket] = {}  # by the id of the forked process
        self.events = selectors.DefaultSelector()

    def serve(self) -> None:
        """Serves until the owner ends, then kills all forks and exits."""
        self.events.register(self.owner, selectors.EVENT_READ, self._stop)
        gc.disable()  # collections would free nothing and take a sixth of the import time
        for name in PRELOADED:
            if self.events.select(0):  # the owner has ended already
                os._exit(0)
            importlib.import_module(name)
        _prepare()
        gc.freeze()  # otherwise the collector writes to the pages that forks share, which copies them
        gc.enable()
        self.events.register(self.listener, selectors.EVENT_READ, self._accept)
        with contextlib.suppress(_Stopped):
            while True:
                for event, _ in self.events.select():
                    event.data(event.fileobj)
        for process in list(self.clients):
            _kill_group(process)
        os._exit(0)  # the preloaded modules need no clean-up, and the exit handlers of some print errors

    def _stop(self, _owner: IO[bytes]) -> None:
        raise _Stopped

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        request, descriptors = _receive_request(client)
        server = os.getpid()
        if request is None:
            client.close()
        elif request["code"] != self.code:
            with contextlib.suppress(OSError):
                client.sendall(b"other code\n")
            client.close()
        elif process := os.fork():
            with contextlib.suppress(OSError):  # the fork also calls setpgid; the second call may fail
                os.setpgid(process, process)
            self.clients[process] = client
            self.events.register(os.pidfd_open(process), selectors.EVENT_READ, lambda fd: self._ended(process, fd))
            self.events.register(client, selectors.EVENT_READ, lambda _: _kill_group(process))
        else:
            end_with_parent(server)  # before anything else, because the server may be killed at any time
            self.events.close()
            self.listener.close()
            for other in (client, *self.clients.values()):
                other.close()
            _run_program(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _ended(self, process: int, descriptor: int) -> None:
        """Sends the exit status of an ended fork to its client, if the client still listens."""
        self.events.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(process, 0)
        client = self.clients.pop(process)
        self.events.unregister(client)
        with contextlib.suppress(OSError):
            client.sendall(f"{os.waitstatus_to_exitcode(status) % 256}\n".encode())
        client.close()


def _receive_request(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Returns a client's request and the descriptors of its standard streams.

    The request is None if the client ended before it was complete, or did not send it within REQUEST_SECONDS.
    """
    descriptors: list[int] = []
    client.settimeout(REQUEST_SECONDS)
    try:
        head, descriptors, _, _ = socket.recv_fds(client, 8, 3)
        while len(head) < 8 and (more := client.recv(8 - len(head))):
            head += more
        size = int.from_bytes(head, "big")
        data = client.makefile("rb").read(size)
        if len(head) < 8 or len(data) < size or len(descriptors) < 3:
            return None, descriptors
        return json.loads(data), descriptors
    except OSError:
        return None, descriptors
    finally:
        client.settimeout(None)


def _prepare() -> None:
    """Computes what every fork would compute. A stage that needs what fails here reports it itself."""
    for name in ("lotlip.pretrain.trainer", "lotlip.tracking.mlflow", "lotlip.evaluate.ablation"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    for stage in STAGES:
        with contextlib.suppress(SyntaxError, OSError, UnicodeDecodeError):
            stage_files(stage)
    with contextlib.suppress(Exception):
        importlib.import_module("lotlip.core.data_docs").compile_templates()


class _Stopped(Exception):
    """The owner has ended."""


def _kill_group(process: int) -> None:
    """Kills a fork and the processes in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _run_program(request: dict[str, Any], descriptors: list[int]) -> None:
    """Runs the requested program in this fork, and exits with its status. Never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = list(request["argv"])
        sys.path[0] = request["cwd"]  # as `python -m` sets it
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _Server(socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer).serve()
