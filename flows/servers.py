"""Prefect's and MLflow's servers, on loopback, for as long as a block of code runs."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.guard import end_group, start_group
from flows.stage import SCRATCH, StageFailed

HOST = "127.0.0.1"
PATIENCE_SECONDS = 600  # a machine may be busy; a server that ends is told at once


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def claimed_port(preferred: int) -> Iterator[int]:
    """A port for a server of the block: the preferred one, unless it is in use or another such block has claimed it.

    A server takes seconds to listen; without the claim, two that start at the same time would both find the port free.
    """
    claim = Path(tempfile.gettempdir(), f"lotlip-{os.getuid()}-port-{preferred}.lock")
    with claim.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield free_port()
        else:
            yield preferred if is_free(preferred) else free_port()


def api_address(port: int) -> str:
    """Of the API of Prefect's server on a port."""
    return f"http://{HOST}:{port}/api"


@contextmanager
def prefect_server(port: int) -> Iterator[None]:
    """Runs Prefect's server for the block."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {
        "PREFECT_SERVER_UI_API_URL": api_address(port),  # the page would ask the default port
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    with _server("Prefect", command, port, "/api/health", environment):
        yield


@contextmanager
def mlflow_server(port: int, store: str) -> Iterator[str]:
    """Runs MLflow's UI over a store; gives its address."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    with _server("MLflow", [*command, "--backend-store-uri", store], port, "/health", {}) as address:
        yield address


@contextmanager
def _server(name: str, command: Sequence[str], port: int, health: str, environment: dict[str, str]) -> Iterator[str]:
    """Runs a server in a group of its own until the block ends.

    Raises:
        StageFailed: the port is taken, or the server did not come up.
    """
    if not is_free(port):
        raise StageFailed(
            f"port {port} is in use, so {name} cannot listen there; stop what uses it, or choose another: "
            f"{name.upper()}_PORT=… make ui"
        )
    log = Path(SCRATCH) / "logs" / f"{name.lower()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = start_group(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
        try:
            address = f"http://{HOST}:{port}"
            _await(name, address + health, port, process, log)
            yield address
        finally:
            end_group(process)


def _await(name: str, address: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310 - an http address of this machine
                if _listens(process.pid, port):  # and not somebody else's server, which may end at any time
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise StageFailed(f"{name} did not come up at {address}; what it wrote is in {log}")


def _listens(pid: int, port: int) -> bool:
    """Whether a process or one that it has started listens on a port."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for process in family
            for connection in process.net_connections("tcp")
        )
    except psutil.NoSuchProcess:
        return False
