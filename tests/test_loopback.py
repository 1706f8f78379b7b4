"""Access to servers on loopback, which are never reached through a proxy."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from lotlip.core.loopback import LoopbackOnly, basic, bypass_proxies

PORT = 4200


def send_request(
    headers: dict[str, str] | list[tuple[str, str]], login: str | None = None, kind: str = "http"
) -> list[Any]:
    """The response to a request; [("application",)]: it reached the application."""
    pairs = headers if isinstance(headers, list) else list(headers.items())
    sent: list[Any] = []

    async def application(*_: Any) -> None:
        sent.append("application")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    raw = [(name.lower().encode(), value.encode()) for name, value in pairs]
    scope = {"type": kind, "server": ("127.0.0.1", PORT), "headers": raw}
    asyncio.run(LoopbackOnly(application, login)(scope, receive, send))
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:4200"},
        {"Host": "localhost:4200"},
        {"Host": "127.0.0.1:4200", "Origin": "http://127.0.0.1:4200"},
        {"Host": "127.0.0.1:4200", "Origin": "http://localhost:4200"},
        {"Host": "localhost:8080", "Origin": "http://localhost:8080"},  # a forwarded port
    ],
)
def test_requests_of_programs_and_the_servers_pages_pass(kind: str, headers: dict[str, str]):
    assert send_request(headers, kind=kind) == ["application"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": ""},
        {"Host": "evil.example:4200"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "evil.example@127.0.0.1.evil.example"},
        {"Host": "[::1"},
        [("Host", "127.0.0.1:4200"), ("Host", "evil.example")],
        {"Host": "127.0.0.1:4200", "Origin": "http://evil.example"},
        {"Host": "127.0.0.1:4200", "Origin": "http://127.0.0.1:8000"},
        {"Host": "127.0.0.1:4200", "Origin": "https://127.0.0.1:4200"},
        {"Host": "127.0.0.1:4200", "Origin": "null"},
        [("Host", "127.0.0.1:4200"), ("Origin", "http://127.0.0.1:4200"), ("Origin", "http://evil.example")],
        {"Host": "evil.example:4200", "Origin": "http://evil.example:4200"},
    ],
)
def test_foreign_hosts_and_origins_are_rejected(kind: str, headers: Any):
    first, *_ = send_request(headers, kind=kind)
    if kind == "websocket":
        assert first == {"type": "websocket.close", "code": 1008}
    else:
        assert first["status"] in (403, 421)


def test_a_login_is_required_and_checked():
    host, login = ("Host", "127.0.0.1:4200"), "lotlip:secret"
    refused = [[host], [host, ("Authorization", basic("lotlip:other"))], [host, ("Authorization", "Basic")]]
    for headers in refused:
        start, _ = send_request(headers, login)
        assert start["status"] == 401
        assert any(name == b"www-authenticate" for name, _ in start["headers"])
    assert send_request([host, ("Authorization", basic(login))], login) == ["application"]


def test_the_users_own_proxy_exceptions_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org, 10.0.0.1")
    bypass_proxies()
    bypass_proxies()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.org,10.0.0.1,127.0.0.1,localhost,::1"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    bypass_proxies()
    assert os.environ["no_proxy"] == "*"


ASK = """
import sys, threading, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import lotlip
import httpx, requests

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
for name in ("127.0.0.1", "localhost"):
    address = f"http://{name}:{server.server_port}/"
    assert urllib.request.urlopen(address).status == 200
    assert httpx.get(address).status_code == 200
    assert requests.get(address).status_code == 200
"""


@pytest.mark.integration
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_http_clients_reach_loopback_without_a_proxy(name: str):
    hidden = ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment[name] = "http://127.0.0.1:9"  # the discard port, where nothing listens
    subprocess.run([sys.executable, "-c", ASK], env=environment, check=True)
