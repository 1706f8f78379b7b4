"""A process that has imported everything and forks for each stage: a stage by itself spends 5 to 12 s on imports.

`flows.reproduce` keeps one for its duration and names its socket in LOTLIP_FORK_SERVER. `python -m flows STAGE` then
delegates: it sends its arguments, environment, folder and terminal, waits, and exits with the status that it receives.
Without a socket it does its own imports. Nothing outlives its owner: a stage ends when the program that delegated it
does, and the fork server when `flows.reproduce` does, however they end.
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
from lotlip.core.console import INTERRUPTED
from lotlip.core.lifetime import end_with_parent
from lotlip.core.temporary import temporary_folder

SOCKET = "LOTLIP_FORK_SERVER"
# How long the warm process waits for a client's request, which the client sends at once.
REQUEST_SECONDS = 10

# What the stages import; every fork shares it.
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
    "mlflow.store.tracking.sqlalchemy_store",  # MLflow imports it when a store is opened
    "great_expectations",
    "pandas",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "jinja2",
    "webdataset",
)


def code() -> str:
    """What the project's code is here, in hex: a checkout's stages are not run by other code than its own."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(lotlip.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package.parent)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- the side of the program that hands over ------------------------------------------------------------------------


def delegate(module: str, arguments: list[str]) -> None:
    """Has the warm process run a module as a program, and ends with its status; returns where there is none.

    Args:
        module: as after `python -m`.
        arguments: of the program.
    """
    path = os.environ.get(SOCKET)
    if not path:
        return
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            request = {"code": code(), "argv": [module, *arguments], "cwd": str(Path.cwd()), "env": dict(os.environ)}
            data = json.dumps(request, allow_nan=False).encode()
            socket.send_fds(connection, [len(data).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(data)
        except OSError:  # its owner has ended
            return
        try:
            answer = connection.makefile().readline().strip()
        except ConnectionError:
            answer = ""
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
    if answer == "other code":
        return
    if not answer:  # the warm process was killed, and the stage with it
        sys.exit(f"error: {module}: the process that ran it was killed; if memory ran out, free some and run again")
    sys.exit(int(answer))


# --- the warm process -----------------------------------------------------------------------------------------------


@contextmanager
def fork_server(environment: dict[str, str], folder: Path | None = None) -> Iterator[dict[str, str]]:
    """Keeps a warm process for the block; gives the environment in which stages hand over to it.

    Args:
        environment: of the warm process and of the stages: Prefect reads its settings once, when it is imported.
        folder: of the checkout whose code it runs; without one, where this program was started.
    """
    if sys.platform != "linux":  # stages do their own imports: file descriptors of processes are Linux's alone
        yield environment
        return
    with temporary_folder("warm", for_sockets=True) as scratch:
        path = str(scratch / "socket")
        # listening from here on: clients wait in line until the imports are done, instead of doing their own
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
            process.stdin.close()  # which it waits for
            process.wait()


class _Server:
    """Forks for each request, and tells each client how its fork ended.

    Args:
        listener: the socket that programs hand over at.
        owner: a stream that ends when the process that owns this one does.
    """

    def __init__(self, listener: socket.socket, owner: IO[bytes]) -> None:
        self.listener = listener
        self.owner = owner
        self.code = code()
        self.clients: dict[int, socket.socket] = {}  # by process
        self.events = selectors.DefaultSelector()

    def serve(self) -> None:
        """Until the owner ends; then ends every fork."""
        self.events.register(self.owner, selectors.EVENT_READ, self._stop)
        gc.disable()  # of the time that imports take, a sixth would go into collections that free nothing
        for name in PRELOADED:
            if self.events.select(0):  # the owner has ended already
                os._exit(0)
            importlib.import_module(name)
        gc.freeze()  # the collector would write to, and so copy, what the forks share
        gc.enable()
        self.events.register(self.listener, selectors.EVENT_READ, self._accept)
        with contextlib.suppress(_Stopped):
            while True:
                for event, _ in self.events.select():
                    event.data(event.fileobj)
        for process in list(self.clients):
            _end(process)
        os._exit(0)  # what was preloaded has nothing to tidy up, and some of it complains when it does

    def _stop(self, _owner: IO[bytes]) -> None:
        raise _Stopped

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        request, descriptors = _request(client)
        own = os.getpid()
        if request is None:
            client.close()
        elif request["code"] != self.code:
            with contextlib.suppress(OSError):
                client.sendall(b"other code\n")
            client.close()
        elif process := os.fork():
            with contextlib.suppress(OSError):  # whichever of the two is first
                os.setpgid(process, process)
            self.clients[process] = client
            self.events.register(os.pidfd_open(process), selectors.EVENT_READ, lambda fd: self._ended(process, fd))
            self.events.register(client, selectors.EVENT_READ, lambda _: _end(process))
        else:
            end_with_parent(own)  # first of all: this process may be killed at any time
            self.events.close()
            self.listener.close()
            for other in (client, *self.clients.values()):
                other.close()
            _become(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _ended(self, process: int, descriptor: int) -> None:
        """A fork is over: tells its client, if that still listens."""
        self.events.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(process, 0)
        client = self.clients.pop(process)
        self.events.unregister(client)
        with contextlib.suppress(OSError):
            client.sendall(f"{os.waitstatus_to_exitcode(status) % 256}\n".encode())
        client.close()


def _request(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What a client asks for, and its standard streams; None if the client ended, or hung, before it had asked."""
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


class _Stopped(Exception):
    """The owner has ended."""


def _end(process: int) -> None:
    """Ends a fork and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Turns a fork into the program that was asked for; never returns."""
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
        sys.path[0] = request["cwd"]  # as `python -m` has it
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
