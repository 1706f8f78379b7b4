"""Access control for servers on loopback. Loopback alone does not keep out web pages or other users of the machine.

A page of any site can make the browser that opens it send requests to 127.0.0.1, and with DNS rebinding it can read
the responses under its own host name. Another user of the machine can connect directly.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")

_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def bypass_proxies() -> None:
    """Adds loopback to the addresses that bypass the proxy; keeps the user's own exceptions.

    Without this, `http_proxy` sends requests for our own servers to the proxy, whose loopback is another machine's.
    """
    lists = [os.environ[name] for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)]
    entries = [entry.strip() for text in lists for entry in text.split(",") if entry.strip()]
    if "*" not in entries:
        entries += [*NAMES, "::1"]
    # libraries differ in which of the two they read, and in which they prefer
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(entries))


def origins(port: int) -> list[str]:
    """The origins of a server's own pages, for a server on a loopback port."""
    return [f"http://{name}:{port}" for name in NAMES]


def basic(login: str) -> str:
    """The Authorization header of a login, `user:password`."""
    return f"Basic {base64.b64encode(login.encode()).decode()}"


class LoopbackOnly:
    """ASGI middleware that refuses requests from other sites' pages and, if there is a login, from other users.

    It refuses a Host header that is not a name of loopback (DNS rebinding), an Origin other than the server's own
    (cross-origin requests and WebSockets), and requests without the login.

    Args:
        app: the application.
        login: `user:password`, required by HTTP basic authentication; None: no login.
    """

    def __init__(self, app: _App, login: str | None = None) -> None:
        self.app = app
        self.authorization = basic(login).encode() if login else None

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Refuses a request or passes it to the application."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
            if status == 401:
                headers.append((b"www-authenticate", b'Basic realm="lotlip", charset="UTF-8"'))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refusal(self, scope: _Message) -> tuple[int, str] | None:
        """Status and text of the response to a refused request; None for a request that is allowed."""
        port = scope["server"][1]
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or _hostname(hosts[0]) not in NAMES:
            return 421, f"unknown host; open http://{HOST}:{port}"
        allowed = [*origins(port), f"http://{hosts[0]}"]
        if any(value.decode("latin-1") not in allowed for value in headers.get(b"origin", [])):
            return 403, f"cross-origin requests are refused; open http://{HOST}:{port}"
        if self.authorization is not None:
            given = headers.get(b"authorization", [])
            if len(given) != 1 or not hmac.compare_digest(given[0], self.authorization):
                return 401, "log in with the user and password that the program printed when it started"
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
