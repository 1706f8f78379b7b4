"""A captioning server on loopback that fails as real ones do.

`python -m tests.captioning_server PORT` runs it as a process, which can be killed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny/llava"


def words_for(image: bytes) -> str:
    """The caption that the server gives an image: of its bytes, so that a mix-up shows."""
    return f"A picture. Its name is {hashlib.sha256(image).hexdigest()[:12]}."


class Handler(BaseHTTPRequestHandler):
    """One connection; what it does wrong is what the server's `plan` says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart
    server: CaptioningServer

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.error(401, f"Incorrect API key provided: {self.headers['Authorization']}")
        if isinstance(self.server.models, int):
            return self.error(self.server.models, "no list")
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server.models]
        return self.answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][0]["content"]
        if isinstance(content, str):  # a question without an image
            image = content.encode()
        else:
            image = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.tries[image] += 1
            number = server.tries[image]
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.seconds)
        with server.lock:  # before the answer, for the client may send its next request as soon as it has it
            server.at_once -= 1
        fail = server.plan(image, number)
        if fail is None:
            self.caption(words_for(image))
        else:
            fail(self)

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def caption(self, text: str | None, finish_reason: str = "stop", **message: Any) -> None:
        choice = {
            "index": 0,
            "finish_reason": finish_reason,
            "message": {"role": "assistant", "content": text, **message},
        }
        self.answer(200, {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]})

    def error(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer(status, {"error": {"message": message, "type": "error", "code": code}}, names)

    def drop(self) -> None:
        """Resets the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


Fault = Callable[[Handler], None]


def status(number: int, message: str = "no", code: str | None = None, **headers: str) -> Fault:
    """An error in OpenAI's manner."""
    return lambda handler: handler.error(number, message, code, **headers)


def soon(number: int) -> Fault:
    """An error that may be tried again in a moment, so that a test need not wait for the client's own pauses."""
    return status(number, Retry_After="0.02")


def dropped(handler: Handler) -> None:
    """The connection is lost before the answer."""
    handler.drop()


def halved(handler: Handler) -> None:
    """The connection is lost in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choices": [{"message": {"content": "A pict')
    handler.wfile.flush()
    handler.close_connection = True


def broken(handler: Handler) -> None:
    """A whole answer that is no JSON."""
    handler.answer(200, b'{"id": "1", "choices": [{"mess')


def web_page(handler: Handler) -> None:
    """What a proxy shows while the server behind it is not there."""
    handler.answer(200, b"<html>Back soon</html>", {"Content-Type": "text/html"})


def aborted(handler: Handler) -> None:
    """The engine stopped in the middle of the caption."""
    handler.caption("A pict", "abort")


def silent(handler: Handler) -> None:
    """Nothing comes, until the client gives up."""
    select.select([handler.connection], [], [], 30)


def saying(text: str | None, finish_reason: str = "stop", **message: Any) -> Fault:
    """Another caption."""
    return lambda handler: handler.caption(text, finish_reason, **message)


class CaptioningServer(ThreadingHTTPServer):
    """Serves `MODEL` on loopback; a block of code starts and ends it.

    Args:
        plan: what goes wrong for an image at its first, second, … try; None: nothing does.
        seconds: that a caption takes.
        models: what it lists, or the status with which it does not.
        key: that it wants.
        port: 0 for any that is free.

    Attributes:
        requests: bodies of all requests for captions.
        tries: of each image.
        most_at_once: requests that were in flight.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        plan: Callable[[bytes, int], Fault | None] = lambda image, number: None,
        seconds: float = 0.0,
        models: list[str] | int | None = None,
        key: str = "",
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.plan, self.seconds, self.key = plan, seconds, key
        self.models = [MODEL] if models is None else models
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.tries: Counter[bytes] = Counter()
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> CaptioningServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        pass  # clients that give up, as tests have them do


if __name__ == "__main__":
    with CaptioningServer(port=int(sys.argv[1]), seconds=float(os.environ.get("SECONDS_EACH", "0"))):
        threading.Event().wait()
