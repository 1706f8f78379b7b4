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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from flows.runtime.applications import LOGIN
from flows.runtime.scratch import SCRATCH, StageFailed
from flows.runtime.supervisor import end_group, start_group
from lotlip.core.loopback import HOST, NAMES, basic, origins
from lotlip.tracking.mlflow import check_store

# PREFECT_PORT and MLFLOW_PORT in the environment choose others.
PORTS = {"prefect": 4200, "mlflow": 5000}
TITLES = {"prefect": "Prefect", "mlflow": "MLflow"}
DRAIN_SECONDS = 20  # for logs and events that are still to be sent when a program ends
BACKLOG = 128  # requests that wait for a server to start
PATIENCE_SECONDS = 600  # a machine may be busy; a server that ends is told at once


def port_of(server: str) -> int:
    """Where a server is to listen, "prefect" or "mlflow"."""
    return int(os.environ.get(f"{server.upper()}_PORT", PORTS[server]))


def listen(port: int = 0) -> socket.socket:
    """A socket that listens on a port of loopback; 0: any free one.

    A server that inherits it needs no time in which another program could take the port; requests that come before
    the server is ready wait.

    Raises:
        OSError: the port is in use.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a server that just ended holds the port
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def listen_for(server: str, any_port: bool = False) -> socket.socket:
    """A socket that listens where a server is to be found.

    Args:
        server: "prefect" or "mlflow".
        any_port: whether another port serves if that one is in use.

    Raises:
        StageFailed: the port is in use, and `any_port` is false.
    """
    port = port_of(server)
    try:
        return listen(port)
    except OSError as error:
        if any_port:
            return listen()
        raise StageFailed(
            f"cannot listen on port {port} for {TITLES[server]}: {error.strerror}; "
            f"stop what uses it, or choose another: {server.upper()}_PORT=… make ui"
        ) from error


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of loopback."""
    try:
        listen(port).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with listen() as listener:
        return port_at(listener)


def port_at(listener: socket.socket) -> int:
    """The port that a socket listens on."""
    return int(listener.getsockname()[1])


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
def prefect_server(listener: socket.socket, login: str, ui: bool = True) -> Iterator[None]:
    """Runs Prefect's server for the block.

    Whoever may use its API can have commands run, by a deployment's pull steps. So it asks for a password, refuses
    requests of other sites' pages, and answers under the names of loopback only (lotlip.core.loopback).

    Args:
        listener: where it accepts requests; closed here.
        login: `user:password` that its API asks for.
        ui: whether it shows pages and runs what only they need, such as schedules.

    Raises:
        StageFailed: the server did not come up.
    """
    port = port_at(listener)
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
    with _server("prefect", listener, "/api/health", environment, login, log):
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
    listener, login = listen(), new_login()
    client = prefect_client(port_at(listener), login)
    with prefect_server(listener, login, ui=False), using_prefect(client):
        yield


@contextmanager
def mlflow_server(listener: socket.socket, store: str, login: str) -> Iterator[str]:
    """Runs MLflow's UI over a store; gives its address.

    Whoever may use its API can read and write files as this user, by artifacts of an experiment that lie anywhere, and
    its assistant runs commands. So it is behind the same checks as Prefect's server.

    Args:
        listener: where it accepts requests; closed here.
        store: address of the tracking store.
        login: `user:password` that it asks for.

    Raises:
        StageFailed: the server did not come up.
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
        MLFLOW_SERVER_CORS_ALLOWED_ORIGINS.name: ",".join(origins(port_at(listener))),
        "_MLFLOW_SGI_NAME": "uvicorn",
        LOGIN: login,
    }
    with _server("mlflow", listener, "/health", environment, login, "mlflow.log") as address:
        yield address


@contextmanager
def _server(
    name: str, listener: socket.socket, health: str, environment: Mapping[str, str], login: str, log_name: str
) -> Iterator[str]:
    """Runs an application of flows.runtime.applications in a process group of its own until the block ends.

    Raises:
        StageFailed: the server did not come up.
    """
    log = Path(SCRATCH) / "logs" / log_name
    inherited = {key: value for key, value in os.environ.items() if key != "LOTLIP_FORK_SERVER"}
    with listener:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = start_group(
                [sys.executable, "-m", "flows.runtime.applications", name, str(listener.fileno())],
                signal.SIGKILL,  # uvicorn acts on a SIGTERM only when it has started, which can take half a minute
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**inherited, **environment},
                pass_fds=[listener.fileno()],
            )
        address = f"http://{HOST}:{port_at(listener)}"
    try:  # this process's copy of the socket is closed: when the server ends, so does its port
        _await(name, process, address + health, login, log)
        yield address
    finally:
        end_group(process)


def _await(name: str, process: subprocess.Popen[bytes], address: str, login: str, log: Path) -> None:
    request = urllib.request.Request(address, headers={"Authorization": basic(login)})  # noqa: S310 - of this machine
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    status = process.poll()
    what = f"did not answer within {PATIENCE_SECONDS} s" if status is None else f"ended with status {status}"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise StageFailed(": ".join([f"{TITLES[name]}'s server at {address} {what} (its log: {log})", *last]))
