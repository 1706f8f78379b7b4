"""Prefect's and MLflow's servers, on loopback, for as long as a block of code runs."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows.runtime.applications import LOGIN
from flows.runtime.scratch import SCRATCH, StageFailed
from flows.runtime.supervisor import end_group, start_group
from lotlip.core.caches import Locked, cache_folder, lock
from lotlip.core.loopback import HOST, NAMES, basic, origins
from lotlip.tracking.mlflow import check_store

# PREFECT_PORT and MLFLOW_PORT in the environment choose others.
PORTS = {"prefect": 4200, "mlflow": 5000}
DRAIN_SECONDS = 20  # for logs and events that are still to be sent when a program ends
PATIENCE_SECONDS = 600  # a machine may be busy; a server that ends is told at once


def port_of(server: str) -> int:
    """Where a server is to listen, "prefect" or "mlflow"."""
    return int(os.environ.get(f"{server.upper()}_PORT", PORTS[server]))


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
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(cache_folder() / f"port-{preferred}.lock"))
        except Locked:
            port = free_port()
        else:
            port = preferred if is_free(preferred) else free_port()
        yield port


def new_login() -> str:
    """A fresh `user:password` for a server; processes get it by their environment, which other users cannot read."""
    return f"lotlip:{secrets.token_urlsafe(18)}"


def api_address(port: int) -> str:
    """Of the API of Prefect's server on a port."""
    return f"http://{HOST}:{port}/api"


def prefect_client(port: int, login: str) -> dict[str, str]:
    """The environment of programs that use the Prefect server on a port."""
    return {"PREFECT_API_URL": api_address(port), "PREFECT_API_AUTH_STRING": login}


@contextmanager
def prefect_server(port: int, login: str, ui: bool = True) -> Iterator[None]:
    """Runs Prefect's server for the block.

    Whoever may use its API can have commands run, by a deployment's pull steps. So it asks for a password, refuses
    requests of other sites' pages, and answers under the names of loopback only (lotlip.core.loopback).

    Args:
        port: of loopback.
        login: `user:password` that its API asks for.
        ui: whether it shows pages and runs what only they need, such as schedules.

    Raises:
        StageFailed: the port is taken, or the server did not come up.
    """
    environment = {
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins(port)),
        "PREFECT_SERVER_UI_API_URL": api_address(port),  # the page would ask the default port
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT__SERVER_FINAL": "1",
        **prefect_client(port, login),  # its own services are clients, too
    }
    if not ui:
        environment |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    log = "prefect.log" if ui else "prefect-temporary.log"
    with _server("Prefect", _uvicorn("prefect", port), port, "/api/health", environment, login, log):
        yield


def print_prefect(port: int, login: str) -> None:
    """Prints the address of a Prefect server, and what its page asks for."""
    print(
        f"Prefect  {api_address(port).removesuffix('/api')}\n         when asked for a password, paste {login}",
        flush=True,
    )


@contextmanager
def using_prefect(client: Mapping[str, str]) -> Iterator[None]:
    """Has this process, and the programs that it starts, use a Prefect server for the block.

    Args:
        client: environment, as of `prefect_client`.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = {
        PREFECT_API_URL: client["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: client["PREFECT_API_AUTH_STRING"],
    }
    before = {name: os.environ.get(name) for name in client}
    os.environ.update(client)
    try:
        with temporary_settings(settings):
            try:
                yield
            finally:
                if not is_free(urlsplit(client["PREFECT_API_URL"]).port or 0):  # it has not been killed
                    for worker in (APILogWorker, EventsWorker):  # or Prefect tries for a minute to reach what has ended
                        worker.drain_all(timeout=DRAIN_SECONDS)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def prefect_for_program() -> Iterator[None]:
    """A Prefect server for the flow of a program that runs by itself: the one that PREFECT_API_URL names, or its own.

    Prefect would start one that asks for no password and outlives a program that is killed.
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        yield
        return
    port, login = free_port(), new_login()
    with prefect_server(port, login, ui=False), using_prefect(prefect_client(port, login)):
        yield


@contextmanager
def mlflow_server(port: int, store: str, login: str) -> Iterator[str]:
    """Runs MLflow's UI over a store; gives its address.

    Whoever may use its API can read and write files as this user, by artifacts of an experiment that lie anywhere, and
    its assistant runs commands. So it is behind the same checks as Prefect's server.

    Args:
        port: of loopback.
        store: address of the tracking store.
        login: `user:password` that it asks for.

    Raises:
        StageFailed: the port is taken, or the server did not come up.
        ValueError: the store is a damaged file.
    """
    check_store(store)  # MLflow would end with a traceback in its log
    from mlflow.environment_variables import MLFLOW_SERVER_ALLOWED_HOSTS, MLFLOW_SERVER_CORS_ALLOWED_ORIGINS
    from mlflow.server import constants

    environment = {  # as `mlflow server` sets it; its command has no place for the checks
        constants.BACKEND_STORE_URI_ENV_VAR: store,
        constants.REGISTRY_STORE_URI_ENV_VAR: store,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: "./mlartifacts",
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        MLFLOW_SERVER_ALLOWED_HOSTS.name: ",".join(f"{name}*" for name in NAMES),
        MLFLOW_SERVER_CORS_ALLOWED_ORIGINS.name: ",".join(origins(port)),
        "_MLFLOW_SGI_NAME": "uvicorn",
        LOGIN: login,
    }
    with _server("MLflow", _uvicorn("mlflow", port), port, "/health", environment, login) as address:
        yield address


def _uvicorn(application: str, port: int) -> list[str]:
    """The command that serves an application of flows.runtime.applications."""
    server = [sys.executable, "-m", "uvicorn", "--factory", f"flows.runtime.applications:{application}"]
    # headers of a proxy would say who asks; there is none
    return [*server, "--host", HOST, "--port", str(port), "--no-proxy-headers", "--log-level", "warning"]


@contextmanager
def _server(
    name: str,
    command: Sequence[str],
    port: int,
    health: str,
    environment: Mapping[str, str],
    login: str,
    log_name: str | None = None,
) -> Iterator[str]:
    """Runs a server in a group of its own until the block ends.

    Raises:
        StageFailed: the port is taken, or the server did not come up.
    """
    if not is_free(port):
        raise StageFailed(
            f"port {port} is in use, so {name} cannot listen there; stop what uses it, or choose another: "
            f"{name.upper()}_PORT=… make ui"
        )
    log = Path(SCRATCH) / "logs" / (log_name or f"{name.lower()}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key != "LOTLIP_FORK_SERVER"}
    with log.open("w") as output:
        process = start_group(
            command,
            signal.SIGKILL,  # uvicorn acts on a SIGTERM only when it has started, which can take half a minute
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**inherited, **environment},
        )
        try:
            address = f"http://{HOST}:{port}"
            _await(name, address + health, port, process, log, login)
            yield address
        finally:
            end_group(process)


def _await(name: str, address: str, port: int, process: subprocess.Popen[bytes], log: Path, login: str) -> None:
    request = urllib.request.Request(address, headers={"Authorization": basic(login)})  # noqa: S310 - of this machine
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310
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
