"""The HTTP service of `lotlip serve`: embeds texts and images, and searches an index.

Requests that arrive while the model is busy are embedded together, in the next batch.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import JSONResponse, Response

from lotlip.core.loopback import NAMES, LoopbackOnly
from lotlip.retrieval.embedding import Embedder, index_model, matches
from lotlip.retrieval.faiss_index import open_searchable
from lotlip.retrieval.index import Index

TOKEN = "LOTLIP_TOKEN"  # noqa: S105 - the name of the variable of the environment, not a token
MIN_TOKEN = 16
MAX_CHARACTERS = 100_000  # of a text
MAX_TOP = 1_000
CONNECTIONS = 512


class Limits(NamedTuple):
    """Limits of the service.

    Attributes:
        batch_size: items that are embedded together.
        items: texts and images of a request.
        waiting: items of all requests that wait for the model; requests beyond are refused with status 503.
        bytes: size of the body of a request.
        seconds: time for a request, from its first byte to its answer.
    """

    batch_size: int = 32
    items: int = 256
    waiting: int = 1024
    bytes: int = 32 * 2**20
    seconds: float = 30


Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]


class EmbedRequest(BaseModel):
    """Texts, and images in base64."""

    model_config = ConfigDict(extra="forbid")
    texts: list[Text] = Field(default_factory=list)
    images: list[str] = Field(default_factory=list)


class EmbedAnswer(BaseModel):
    """The normalised feature of each text and image, in order."""

    texts: list[list[float]]
    images: list[list[float]]


class SearchRequest(BaseModel):
    """A text, or an image in base64, and the number of results."""

    model_config = ConfigDict(extra="forbid")
    text: Text | None = None
    image: str | None = None
    top: int = Field(default=10, ge=1, le=MAX_TOP)


class Result(BaseModel):
    """See `lotlip.retrieval.embedding.Match`."""

    score: float
    name: str
    text: str | None
    source: str | None


class SearchAnswer(BaseModel):
    """The nearest items, best first."""

    results: list[Result]


class Batches:
    """Joins items of concurrent requests into batches.

    Args:
        encode: items → features [N, D]; runs in `thread`.
        thread: runs one batch at a time.
        limits: of the service.
    """

    def __init__(
        self, encode: Callable[[Sequence[Any]], np.ndarray], thread: ThreadPoolExecutor, limits: Limits
    ) -> None:
        self._encode, self._thread, self._limits = encode, thread, limits
        self._queue: asyncio.Queue[tuple[Sequence[Any], asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self._waiting = 0

    async def features(self, items: Sequence[Any]) -> np.ndarray:
        """Returns the features of items, [N, D].

        Raises:
            HTTPException: too many items wait (status 503).
        """
        if self._waiting + len(items) > self._limits.waiting:
            raise HTTPException(503, "too many requests are waiting; try again later", {"Retry-After": "1"})
        future = asyncio.get_running_loop().create_future()
        self._waiting += len(items)
        try:
            self._queue.put_nowait((items, future))
            return await future
        finally:
            self._waiting -= len(items)

    async def run(self) -> None:
        """Encodes batches until it is cancelled."""
        while True:
            batch = [await self._queue.get()]
            while sum(len(items) for items, _ in batch) < self._limits.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(items, future) for items, future in batch if not future.done()]  # the others ran out of time
            together = [item for items, _ in batch for item in items]
            try:
                features = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, together)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for items, future in batch:
                if not future.done():
                    future.set_result(features[start : start + len(items)])
                start += len(items)


def create_app(embedder: Embedder, index: Index | None, limits: Limits) -> FastAPI:
    """Returns the service without access control, see `protected`.

    Args:
        embedder: the model.
        index: of items embedded by the same model; None: no /search.
        limits: of the service.

    Raises:
        ValueError: the model's features are not finite.
    """
    embedder.texts(["a"])  # a broken model is refused, and the first request does not wait for start-up work
    model_thread, search_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    texts = Batches(embedder.texts, model_thread, limits)
    images = Batches(embedder.prepared, model_thread, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batches.run()) for batches in (texts, images)]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="lotlip", lifespan=lifespan, docs_url=None, redoc_url=None)

    async def text_features(given: Sequence[str]) -> np.ndarray:
        for number, text in enumerate(given):
            if not text.strip():
                raise HTTPException(400, f"text {number} is empty")
        return await texts.features(given)

    async def image_features(given: Sequence[str]) -> np.ndarray:
        def prepare(number: int, image: str) -> np.ndarray:
            try:
                return embedder.prepare(base64.b64decode("".join(image.split()), validate=True))
            except binascii.Error as error:
                raise HTTPException(400, f"image {number} is not base64 ({error})") from error
            except ValueError as error:
                raise HTTPException(400, f"image {number}: {error}") from error

        return await images.features([await asyncio.to_thread(prepare, *one) for one in enumerate(given)])

    app.add_exception_handler(RequestValidationError, _invalid)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "width": embedder.width, "items": index.size if index else None}

    @app.post("/embed")
    async def embed(request: EmbedRequest) -> EmbedAnswer:
        items = len(request.texts) + len(request.images)
        if not 1 <= items <= limits.items:
            raise HTTPException(400, f"the request has {items} texts and images; give 1 to {limits.items}")
        of_texts = (await text_features(request.texts)).tolist() if request.texts else []
        of_images = (await image_features(request.images)).tolist() if request.images else []
        return EmbedAnswer(texts=of_texts, images=of_images)

    if index is not None:

        @app.post("/search")
        async def search(request: SearchRequest) -> SearchAnswer:
            if (request.text is None) == (request.image is None):
                raise HTTPException(400, "give either a text or an image")
            if request.text is not None:
                (query,) = await text_features([request.text])
            else:
                (query,) = await image_features([str(request.image)])
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(search_thread, matches, index, query, request.top)
            return SearchAnswer(results=[Result(**vars(match)) for match in found])

    return app


async def _invalid(request: Any, error: Any) -> Response:
    """Answers a request of another form without repeating it: it may be long, or have what JSON cannot hold."""
    form = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if form != "application/json":
        return JSONResponse({"detail": "send the request with the header Content-Type: application/json"}, 415)
    detail = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
    return Response(json.dumps({"detail": detail}, allow_nan=False), 422, media_type="application/json")


# --- access and limits ------------------------------------------------------------------------------------------------

_App = Callable[[Any, Any, Any], Awaitable[None]]


def protected(app: _App, limits: Limits, token: str | None, loopback: bool) -> _App:
    """Adds limits of size and time and access control to a service.

    Args:
        app: the service.
        limits: of the service.
        token: that requests must carry as `Authorization: Bearer TOKEN`, except those for /health; None: no token.
        loopback: whether it is served on loopback: then requests for other hosts and of web pages are refused.
    """
    guarded: _App = _Guard(app, limits, token)
    return LoopbackOnly(guarded) if loopback else guarded


class _Guard:
    """Middleware that checks the token, and limits size and time of requests."""

    def __init__(self, app: _App, limits: Limits, token: str | None) -> None:
        self._app, self._limits = app, limits
        self._authorization = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if (
            self._authorization is not None
            and scope["path"] != "/health"
            and not (len(given) == 1 and hmac.compare_digest(given[0], self._authorization))
        ):
            headers = {"WWW-Authenticate": "Bearer"}
            await JSONResponse({"detail": "send Authorization: Bearer TOKEN"}, 401, headers)(scope, receive, send)
            return
        received, started = 0, False

        async def limited_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limits.bytes:
                raise HTTPException(413, f"the request is larger than {self._limits.bytes:,} bytes")
            return message

        async def watched_send(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, limited_receive, watched_send)
        except TimeoutError:
            if started:
                raise
            detail = {"detail": f"the request took more than {self._limits.seconds:g} s"}
            await JSONResponse(detail, 503, {"Connection": "close"})(scope, receive, send)


def serve(
    model: Path | None,
    index: Path | None,
    host: str,
    port: int,
    limits: Limits,
    device: str,
    on_start: Callable[[str], None],
) -> None:
    """Serves a model until the process is interrupted.

    Args:
        model: folder of the model; default: the one that made the index.
        index: file of `lotlip embed` to search; None: no /search.
        host: address to listen on. Other addresses than loopback need a token in the environment variable LOTLIP_TOKEN.
        port: port to listen on; 0: any free one.
        limits: of the service.
        device: see `Embedder`.
        on_start: called with the address when the service listens.

    Raises:
        ValueError: neither model nor index is given, the token is missing or short, the address cannot be listened on,
            or the model or index cannot be used.
    """
    token, loopback = os.environ.get(TOKEN), host in NAMES
    if token is None and not loopback:
        raise ValueError(
            f"--host {host} lets other machines in, so requests need a token; set {TOKEN}, or use 127.0.0.1"
        )
    if token is not None and len(token) < MIN_TOKEN:
        raise ValueError(f"{TOKEN} has {len(token)} characters; it must have at least {MIN_TOKEN}")
    opened = None
    if index is not None:
        opened = open_searchable(index)
        model = index_model(index, opened.about, model)
    if model is None:
        raise ValueError("give the folder of a model, an index, or both")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}); choose another --host or --port") from error
    with listening:
        app = create_app(Embedder(model, device, limits.batch_size), opened, limits)
        config = uvicorn.Config(
            protected(app, limits, token, loopback),
            log_level="warning",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        name = f"[{host}]" if ":" in host else host
        on_start(f"http://{name}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])
