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


def caption_for(image: bytes) -> str:
    """The server's caption of an image. It depends on the bytes, so tests notice a mix-up."""
    return f"A picture. Its name is {hashlib.sha256(image).hexdigest()[:12]}."


class Handler(BaseHTTPRequestHandler):
    """One connection, with the faults that the server's `plan` asks for."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart
    server: CaptioningServer

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.error(401, f"Incorrect API key provided: {self.headers['Authorization']}")
        if self.server.list_faults:
            return self.server.list_faults.pop(0)(self)
        if isinstance(self.server.models, int):
            return self.error(self.server.models, "no list")
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server.models]
        return self.answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][0]["content"]
        if isinstance(content, str):  # a request without an image
            image = content.encode()
        else:
            image = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.attempts[image] += 1
            number = server.attempts[image]
            server.in_flight += 1
            server.max_in_flight = max(server.max_in_flight, server.in_flight)
        time.sleep(server.seconds)
        with server.lock:  # before the answer, because the client may send its next request right after it
            server.in_flight -= 1
        fail = server.plan(image, number)
        if fail is None:
            self.caption(caption_for(image))
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
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
        if usage := self.server.usage:
            sent, received = usage
            answer["usage"] = {"prompt_tokens": sent, "completion_tokens": received, "total_tokens": sent + received}
        self.answer(200, answer)

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
    """An error in OpenAI's format."""
    return lambda handler: handler.error(number, message, code, **headers)


def retry_soon(number: int) -> Fault:
    """An error with a short Retry-After, so that tests do not wait for the client's backoff."""
    return status(number, Retry_After="0.02")


def dropped(handler: Handler) -> None:
    """The connection is lost before the answer."""
    handler.drop()


def cut_off(handler: Handler) -> None:
    """The connection is lost in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choices": [{"message": {"content": "A pict')
    handler.wfile.flush()
    handler.close_connection = True


def broken(handler: Handler) -> None:
    """A complete answer that is not JSON."""
    handler.answer(200, b'{"id": "1", "choices": [{"mess')


def web_page(handler: Handler) -> None:
    """What a proxy returns while the server behind it is down."""
    handler.answer(200, b"<html>Back soon</html>", {"Content-Type": "text/html"})


def aborted(handler: Handler) -> None:
    """The engine stopped in the middle of the caption."""
    handler.caption("A pict", "abort")


def silent(handler: Handler) -> None:
    """No answer until the client gives up."""
    select.select([handler.connection], [], [], 30)


def caption_text(text: str | None, finish_reason: str = "stop", **message: Any) -> Fault:
    """A caption with this text."""
    return lambda handler: handler.caption(text, finish_reason, **message)


class CaptioningServer(ThreadingHTTPServer):
    """Serves `MODEL` on loopback while its context is entered.

    Args:
        plan: image and number of the attempt → the fault; None: none.
        seconds: time that a caption takes.
        models: the listed models, or the status of the failing list.
        key: the API key that it requires.
        port: 0: any free port.

    Attributes:
        usage: tokens of a request and of an answer, which each answer states; None: answers state none.
        list_faults: of the next requests for the list of models.
        requests: bodies of all requests for captions.
        attempts: image → number of attempts.
        max_in_flight: maximum number of simultaneous requests.
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
        self.usage: tuple[int, int] | None = None
        self.list_faults: list[Fault] = []
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.attempts: Counter[bytes] = Counter()
        self.in_flight = self.max_in_flight = 0

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
        pass  # clients of the tests give up on purpose


if __name__ == "__main__":
    with CaptioningServer(port=int(sys.argv[1]), seconds=float(os.environ.get("SECONDS_EACH", "0"))):
        threading.Event().wait()
