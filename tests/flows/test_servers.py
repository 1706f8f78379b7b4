"""Servers on loopback: their ports, and errors at the start."""

from __future__ import annotations

import errno
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.runtime import servers
from flows.runtime.scratch import StageFailed
from flows.runtime.servers import PORTS, free_port, is_free, listen, listen_for, port_at, port_of, prefect_server


def test_servers_that_start_together_use_different_ports(monkeypatch: pytest.MonkeyPatch):
    """They need no common lock, so they may belong to different users."""
    monkeypatch.setenv("PREFECT_PORT", str(free_port()))
    with listen_for("prefect", any_port=True) as first, listen_for("prefect", any_port=True) as second:
        assert port_at(first) == port_of("prefect")
        assert port_at(second) != port_of("prefect")
    with listen_for("prefect", any_port=True) as third:
        assert port_at(third) == port_of("prefect")


def test_a_busy_port_is_an_error(other_server: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_PORT", str(other_server))
    assert not is_free(other_server)
    with pytest.raises(StageFailed, match=f"port {other_server} for Prefect: Address already in use; .*PREFECT_PORT="):
        listen_for("prefect")
    with listen_for("prefect", any_port=True) as listener:
        assert port_at(listener) not in (0, other_server)


def test_a_forbidden_port_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("MLFLOW_PORT", "80")
    monkeypatch.setattr(servers, "listen", refuse)
    with pytest.raises(StageFailed, match=r"port 80 for MLflow: Permission denied; .*MLFLOW_PORT="):
        listen_for("mlflow")


@pytest.mark.integration
def test_a_server_that_cannot_start_is_an_error_with_its_reason(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The error comes immediately, and the port is free again."""
    monkeypatch.chdir(tmp_path)
    listener = listen()
    port = port_at(listener)
    monkeypatch.setattr(servers, "prefect_client", lambda *_: {"PREFECT_SERVER_API_AUTH_STRING": ""})
    message = r"Prefect's server at .* ended with status 1 .*prefect\.log\): RuntimeError: PREFECT_SERVER_API_AUTH"
    with pytest.raises(StageFailed, match=message), prefect_server(listener, "a:b"):
        pass
    assert is_free(port)


@pytest.mark.integration
def test_mlflow_does_not_start_over_a_damaged_store(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"garbage " * 1000)
    with (
        listen() as listener,
        pytest.raises(ValueError, match=r"mlflow\.db.*flows\.restore"),
        servers.mlflow_server(listener, "sqlite:///mlflow.db", "a:b"),
    ):
        pass


@pytest.fixture
def other_server():
    """The port of another user's server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer((servers.HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("server", ["prefect", "mlflow"])
@pytest.mark.parametrize("given", ["abc", "0", "65536"])
def test_a_port_that_is_none_is_an_error_that_names_the_variable(
    server: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{server.upper()}_PORT"
    monkeypatch.setenv(variable, "")
    assert port_of(server) == PORTS[server]
    monkeypatch.setenv(variable, given)
    message = f"^{variable} is '{given}' in the environment; set it to a number in 1 to 65535, or unset it$"
    with pytest.raises(ValueError, match=message):
        port_of(server)
