"""A client of an OpenAI-compatible server whose requests another thread can end."""

from __future__ import annotations

import contextlib
import socket
from threading import Event, Lock
from typing import Any
from weakref import WeakSet

import httpx2
import openai


class RequestsEndedError(Exception):
    """`EndableClient.end` was called before this request had its answer."""


class EndableTransport(openai.DefaultHttpxClient):
    """Sends requests until `end` is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ended = Event()
        self._lock = Lock()  # held while a socket is added or all are shut down
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends a request.

        Raises:
            RequestsEndedError: `end` was called. openai does not retry after an error of this type.
        """
        request.extensions = {**request.extensions, "trace": self._trace}
        if self.ended.is_set():
            raise RequestsEndedError
        try:
            return super().send(request, **options)
        except Exception:
            if self.ended.is_set():
                raise RequestsEndedError from None
            raise

    def end(self) -> None:
        """Makes requests in flight and later ones fail.

        Sockets are shut down, not closed. To close a socket does not wake a thread that waits for data, which would
        then wait for the whole time-out. A thread that is about to wait could also wait for the wrong connection,
        because the number of a closed socket is free for the next one.
        """
        with self._lock:
            self.ended.set()
            for opened in self._sockets:
                _shut_down(opened)

    def _trace(self, event: str, about: dict[str, Any]) -> None:
        """Adds each new connection's socket; httpcore calls this at each step of a request."""
        if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            return
        opened = about["return_value"].get_extra_info("socket")
        with self._lock:
            self._sockets.add(opened)
            if self.ended.is_set():
                _shut_down(opened)


class EndableClient(openai.OpenAI):
    """A client with an `EndableTransport` as its `http_client`."""

    _client: EndableTransport

    def end(self) -> None:
        """Makes requests in flight, retries and later requests fail with `RequestsEndedError`."""
        self._client.end()

    def _sleep_for_retry(
        self, *, retries_taken: int, max_retries: int, options: Any, response: httpx2.Response | None
    ) -> None:
        """The pause before a retry, as openai computes it (up to two minutes), which `end` cuts short."""
        headers = response.headers if response else None
        if self._client.ended.wait(self._calculate_retry_timeout(max_retries - retries_taken, options, headers)):
            raise RequestsEndedError


def _shut_down(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        socket.socket.shutdown(opened, socket.SHUT_RDWR)  # ssl's method drops the state that its reader uses
