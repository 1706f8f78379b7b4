"""Runs Prefect's and MLflow's servers on loopback for the duration of a block."""

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
from lotlip.core.environment import number_of
from lotlip.core.loopback import HOST, NAMES, basic, origins
from lotlip.tracking.store import prepare_store

# Default ports; the environment variables PREFECT_PORT and MLFLOW_PORT override them.
PORTS = {"prefect": 4200, "mlflow": 5000}
TITLES = {"prefect": "Prefect", "mlflow": "MLflow"}
DRAIN_SECONDS = 20  # time for sending pending logs and events when a program ends
BACKLOG = 128  # number of requests that can wait for a server to start
START_TIMEOUT_SECONDS = 600  # long, because a machine may be busy; a server that ends is noticed at once


def port_of(server: str) -> int:
    """Returns the configured port of a server, "prefect" or "mlflow".

    Raises:
        ValueError: the environment variable is not a port.
    """
    return number_of(f"{server.upper()}_PORT", PORTS[server], 65535)


def listen(port: int = 0) -> socket.socket:
    """Opens a socket that listens on a loopback port; 0 stands for any free port.

    No other program can take the port before a server inherits the socket. Requests that arrive before the server is
    ready wait.

    Raises:
        OSError: the port is in use.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # otherwise a server that has just ended would keep the port in use
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def listen_for(server: str, any_port: bool = False) -> socket.socket:
    """Opens a socket that listens on the configured port of a server.

    Args:
        server: "prefect" or "mlflow".
        any_port: whether to take any free port if the configured one is in use.

    Raises:
        StageFailed: the port cannot be used, and `any_port` is false.
    """
    port = port_of(server)
    try:
        return listen(port)
    except OSError as error:
        if any_port:
            return listen()
        raise StageFailed(
            f"cannot listen on port {port} for {TITLES[server]}: {error.strerror}; "
            f"stop the program that uses it, or choose another port: {server.upper()}_PORT=… make ui"
        ) from error


def is_free(port: int) -> bool:
    """Returns whether no program listens on a loopback port."""
    try:
        listen(port).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """Returns a loopback port that no program listens on."""
    with listen() as listener:
        return port_at(listener)


def port_at(listener: socket.socket) -> int:
    """Returns the port that a socket listens on."""
    return int(listener.getsockname()[1])


def new_login() -> str:
    """Returns a new `user:password` for a server. It is passed in the environment, which other users cannot read."""
    return f"lotlip:{secrets.token_urlsafe(18)}"


def api_address(port: int) -> str:
    """Returns the address of the API of the Prefect server on a port."""
    return f"http://{HOST}:{port}/api"


def prefect_client(port: int, login: str) -> dict[str, str]:
    """Returns the environment variables of programs that use the Prefect server on a port."""
    return {"PREFECT_API_URL": api_address(port), "PREFECT_API_AUTH_STRING": login}


@contextmanager
def prefect_server(listener: socket.socket, login: str, ui: bool = True) -> Iterator[None]:
    """Runs Prefect's server for the duration of the block.

    Any client of its API can run commands, through a deployment's pull steps. The server therefore requires a password,
    rejects cross-origin requests, and answers only to the host names of loopback (lotlip.core.loopback).

    Args:
        listener: the socket on which it accepts requests. This function closes it.
        login: `user:password` that its API requires.
        ui: whether it serves the UI and the services that only the UI needs, such as schedules.

    Raises:
        StageFailed: the server did not start.
    """
    port = port_at(listener)
    environment = {
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins(port)),
        "PREFECT_SERVER_UI_API_URL": api_address(port),  # otherwise the page requests the default port
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT__SERVER_FINAL": "1",
        **prefect_client(port, login),  # the server's own services are clients too
    }
    if not ui:
        environment |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    log = "prefect.log" if ui else "prefect-temporary.log"
    with _server("prefect", listener, "/api/health", environment, login, log):
        yield


def print_prefect(port: int, login: str) -> None:
    """Prints the address of a Prefect server, and the login that its page asks for."""
    print(
        f"Prefect  {api_address(port).removesuffix('/api')}\n         when asked for a password, paste {login}",
        flush=True,
    )


@contextmanager
def using_prefect(client: Mapping[str, str]) -> Iterator[None]:
    """Makes this process and the programs that it starts use a Prefect server for the duration of the block.

    Args:
        client: environment variables, from `prefect_client`.
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
                # drained while the server runs: after its end, Prefect would try for a minute to reach it
                if not is_free(urlsplit(client["PREFECT_API_URL"]).port or 0):
                    for worker in (APILogWorker, EventsWorker):
                        worker.drain_all(timeout=DRAIN_SECONDS)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def prefect_for_program() -> Iterator[None]:
    """Provides a Prefect server for a stage that runs on its own: the one that PREFECT_API_URL names, or a new one.

    Prefect's ephemeral server would require no password, and would outlive a killed program.
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
    """Runs MLflow's server for a tracking store, and yields its address.

    Any client of its API can read and write files as this user, because an experiment's artifacts may be anywhere on
    disk. Its assistant runs commands. The server therefore has the same checks as Prefect's.

    Args:
        listener: the socket on which it accepts requests. This function closes it.
        store: URI of the tracking store.
        login: `user:password` that it requires.

    Raises:
        StageFailed: the server did not start.
        ValueError: the store is a damaged file.
    """
    prepare_store(store)  # otherwise MLflow ends with a traceback in its log
    from mlflow.environment_variables import MLFLOW_SERVER_ALLOWED_HOSTS, MLFLOW_SERVER_CORS_ALLOWED_ORIGINS
    from mlflow.server import constants

    environment = {  # as the command `mlflow server` sets it, which has no option to add the checks
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
        StageFailed: the server did not start.
    """
    log = Path(SCRATCH) / "logs" / log_name
    inherited = {key: value for key, value in os.environ.items() if key != "LOTLIP_FORK_SERVER"}
    with listener:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = start_group(
                [sys.executable, "-m", "flows.runtime.applications", name, str(listener.fileno())],
                signal.SIGKILL,  # uvicorn handles SIGTERM only once it has started, which can take half a minute
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**inherited, **environment},
                pass_fds=[listener.fileno()],
            )
        address = f"http://{HOST}:{port_at(listener)}"
    try:  # this process's copy of the socket is closed, so the port becomes free when the server ends
        _wait_until_healthy(name, process, address + health, login, log)
        yield address
    finally:
        end_group(process)


def _wait_until_healthy(name: str, process: subprocess.Popen[bytes], address: str, login: str, log: Path) -> None:
    request = urllib.request.Request(address, headers={"Authorization": basic(login)})  # noqa: S310 - on loopback
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    status = process.poll()
    reason = f"did not answer within {START_TIMEOUT_SECONDS} s" if status is None else f"ended with status {status}"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise StageFailed(": ".join([f"{TITLES[name]}'s server at {address} {reason} (log: {log})", *last]))
