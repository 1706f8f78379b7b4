"""Servers on loopback: which port they take, and whose answer is believed."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.runtime import servers
from flows.runtime.scratch import StageFailed
from flows.runtime.servers import claimed_port, free_port
from lotlip.core.caches import cache_folder


def test_two_that_start_at_the_same_time_take_different_ports():
    port = free_port()
    with claimed_port(port) as first, claimed_port(port) as second:
        assert first == port
        assert second != port
    with claimed_port(port) as again:
        assert again == port


def test_a_lock_that_another_user_made_a_link_is_not_followed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Not in the shared temporary folder, where anybody may put a link under the name, nor anywhere else."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    port = free_port()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / f"lotlip-{os.getuid()}-port-{port}.lock").symlink_to(precious)
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "cache"))
    with claimed_port(port) as claimed:
        assert claimed == port
    assert precious.read_text() == "kept"
    (cache_folder() / f"port-{port}.lock").unlink()
    (cache_folder() / f"port-{port}.lock").symlink_to(precious)
    with pytest.raises(OSError, match=f"port-{port}.lock"), claimed_port(port):
        pass
    assert precious.read_text() == "kept"


def test_a_port_that_is_in_use_is_not_taken(somebody: int):
    with claimed_port(somebody) as port:
        assert port != somebody


@pytest.mark.integration
def test_somebody_elses_server_is_not_taken_for_ours(somebody: int, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """It has come up between the look at the port and the start of ours, which then never listens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(servers, "is_free", lambda port: True)
    monkeypatch.setattr(servers, "PATIENCE_SECONDS", 2)
    idle = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(StageFailed, match="Ours did not come up"),
        servers._server("Ours", idle, somebody, "/", {}, "a:b"),
    ):
        pass


@pytest.mark.integration
def test_our_own_server_is_known_by_its_port(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", servers.HOST, str(port)]
    with servers._server("Ours", command, port, "/", {}, "a:b") as address:
        assert address == f"http://{servers.HOST}:{port}"


@pytest.mark.integration
def test_mlflow_does_not_start_over_a_damaged_store(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"garbage " * 1000)
    with (
        pytest.raises(ValueError, match=r"mlflow\.db.*flows\.restore"),
        servers.mlflow_server(free_port(), "sqlite:///mlflow.db", "a:b"),
    ):
        pass


@pytest.fixture
def somebody():
    """The port of a server of somebody else's."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer((servers.HOST, 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
