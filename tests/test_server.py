"""`lotlip serve`: features, search, batches, limits and access."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import HTTPException
from fastapi.testclient import TestClient

from lotlip import cli
from lotlip.retrieval import server
from lotlip.retrieval.embedding import Embedder, embed, search
from lotlip.retrieval.faiss_index import open_searchable
from lotlip.retrieval.server import Batches, Limits, create_app, protected
from tests.conftest import TinySample
from tests.tiny_model import save_tiny_model

TEXTS = ["A red dog. It runs under the open sky.", "two white houses", "One cat sits. One cat sleeps. One runs."]
TOKEN = "0123456789abcdef"
LIMITS = Limits(items=4, bytes=200_000, seconds=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("server") / "model", tiny_tower)


@pytest.fixture(scope="module")
def embedder(model: Path) -> Embedder:
    return Embedder(model, "cpu")


@pytest.fixture(scope="module")
def index(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    embed(model, folder / "texts.txt", folder / "texts.parquet")
    return folder / "texts.parquet"


@pytest.fixture(scope="module")
def client(embedder: Embedder, index: Path) -> Iterator[TestClient]:
    app = protected(create_app(embedder, open_searchable(index), LIMITS), LIMITS, token=None, loopback=False)
    with TestClient(app) as client:
        yield client


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_the_documented_requests_are_answered(client: TestClient, embedder: Embedder) -> None:
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    bodies = re.findall(r"/embed .*?-d '(\{.*?\})'", page, re.DOTALL)
    assert len(bodies) == 2
    for body in map(json.loads, bodies):
        answer = client.post("/embed", json=body)
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["texts"], embedder.texts(body["texts"]), atol=1e-5)


def test_embed_returns_the_models_features(
    client: TestClient, embedder: Embedder, tiny_samples: list[TinySample]
) -> None:
    image = tiny_samples[0].image
    answer = client.post("/embed", json={"texts": TEXTS, "images": [encoded(image)]})
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json()["texts"], embedder.texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(answer.json()["images"], embedder.images([image]), atol=1e-5)


def test_search_agrees_with_the_command(client: TestClient, index: Path, tiny_samples: list[TinySample]) -> None:
    answer = client.post("/search", json={"text": TEXTS[1], "top": 2}).json()["results"]
    expected = [vars(match) for match in search(index, TEXTS[1], top=2)]
    assert [{**one, "score": pytest.approx(one["score"], abs=1e-5)} for one in expected] == answer
    image = encoded(tiny_samples[0].image)
    assert len(client.post("/search", json={"image": image}).json()["results"]) == len(TEXTS)


def test_health_describes_the_model(client: TestClient, embedder: Embedder) -> None:
    assert client.get("/health").json() == {"status": "ok", "width": 32, "items": 3}
    app = create_app(embedder, None, LIMITS)
    with TestClient(app) as without:
        assert without.get("/health").json()["items"] is None
        assert without.post("/search", json={"text": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "request_", "status", "message"),
    [
        ("embed", {}, 400, "has 0 texts and images; give 1 to 4"),
        ("embed", {"texts": ["a"] * 5}, 400, "has 5 texts and images; give 1 to 4"),
        ("embed", {"texts": ["a", " \n"]}, 400, "text 1 is empty"),
        ("embed", {"images": ["%"]}, 400, "image 0 is not base64"),
        ("embed", {"images": ["AAAA"]}, 400, "image 0: not a readable image"),
        ("embed", {"text": ["a"]}, 422, "Extra inputs are not permitted"),
        ("embed", {"texts": ["a" * 100_001]}, 422, "at most 100000 characters"),
        ("embed", {"texts": ["a" * 99_999] * 3}, 413, "larger than 200,000 bytes"),
        ("search", {}, 400, "give either a text or an image"),
        ("search", {"text": "a", "image": "AAAA"}, 400, "give either a text or an image"),
        ("search", {"text": "a", "top": 0}, 422, "greater than or equal to 1"),
    ],
)
def test_an_invalid_request_is_an_error(
    client: TestClient, path: str, request_: Any, status: int, message: str
) -> None:
    answer = client.post(f"/{path}", json=request_)
    assert (answer.status_code, message in answer.text) == (status, True), answer.text


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("search", rb'{"text": "a", "top": NaN}', "Input should be a finite number"),
        ("search", rb'{"text": "a", "more": NaN}', "Extra inputs are not permitted"),
        ("search", rb'{"text": "a \ud800"}', "valid string"),
        ("embed", rb'{"texts": ["a", "\ud800"]}', "valid string"),
        ("embed", rb'{"\ud800": 1}', "valid string"),
        ("embed", b'{"texts": [' + b"1," * 5_000 + b"1]}", "valid string"),
        ("embed", b"{", "JSON decode error"),
    ],
)
def test_an_invalid_request_is_not_repeated(client: TestClient, path: str, body: bytes, message: str) -> None:
    answer = client.post(f"/{path}", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, message in answer.text) == (422, True), answer.text
    assert all(set(one) == {"type", "loc", "msg"} for one in answer.json()["detail"])


def test_the_type_of_a_request_is_json(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.post("/embed", content=b'{"texts": ["a"]}', headers={"Content-Type": kind})
        assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["detail"]
    answer = client.post(
        "/embed", content=b'{"texts": ["a"]}', headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert answer.status_code == 200


class SlowModel:
    """An embedder with slow batches."""

    width = 1

    def __init__(self, seconds: float) -> None:
        self.seconds, self.batches = seconds, list[list[str]]()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        time.sleep(self.seconds)
        return np.array([[float(len(text))] for text in texts], dtype=np.float32)

    prepared = texts


def test_requests_during_a_batch_form_the_next_batch() -> None:
    slow = SlowModel(0.3)

    async def requests() -> list[list[list[float]]]:
        batches = Batches(slow.texts, ThreadPoolExecutor(1), Limits(batch_size=4))
        task = asyncio.create_task(batches.run())
        first = asyncio.create_task(batches.features(["a"]))
        await asyncio.sleep(0.1)
        rest = [asyncio.create_task(batches.features(["b" * number] * 2)) for number in range(1, 4)]
        answers = [(await one).tolist() for one in (first, *rest)]
        task.cancel()
        return answers

    assert asyncio.run(requests()) == [[[1]], [[1], [1]], [[2], [2]], [[3], [3]]]
    assert slow.batches == [["a"], ["b", "b", "bb", "bb"], ["bbb", "bbb"]]


def test_an_error_affects_only_requests_of_its_batch() -> None:
    def encode(items: Sequence[str]) -> np.ndarray:
        if "bad" in items:
            raise ValueError("the model is broken")
        return np.zeros((len(items), 1))

    async def requests() -> None:
        batches = Batches(encode, ThreadPoolExecutor(1), Limits(batch_size=1, waiting=2))
        task = asyncio.create_task(batches.run())
        with pytest.raises(ValueError, match="the model is broken"):
            await batches.features(["bad"])
        assert (await batches.features(["good"])).shape == (1, 1)
        with pytest.raises(HTTPException) as refused:
            await batches.features(["a", "b", "c"])
        assert refused.value.status_code == 503
        task.cancel()

    asyncio.run(requests())


def test_a_slow_request_times_out() -> None:
    slow: Any = SlowModel(0.5)
    limits = Limits(seconds=0.1)
    with TestClient(protected(create_app(slow, None, limits), limits, None, loopback=False)) as client:
        answer = client.post("/embed", json={"texts": ["a"]})
        assert (answer.status_code, answer.json()) == (503, {"detail": "the request took more than 0.1 s"})


def test_a_token_is_required(embedder: Embedder) -> None:
    app = protected(create_app(embedder, None, LIMITS), LIMITS, TOKEN, loopback=False)
    with TestClient(app) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            answer = client.post("/embed", json={"texts": ["a"]}, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        answer = client.post("/embed", json={"texts": ["a"]}, headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/openapi.json").status_code == 401


def test_requests_of_other_sites_are_rejected_on_loopback(embedder: Embedder) -> None:
    app = protected(create_app(embedder, None, LIMITS), LIMITS, None, loopback=True)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
        assert client.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403


def test_the_service_answers_over_a_socket(model: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[uvicorn.Server] = []

    class WatchedServer(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            running.append(self)

    monkeypatch.setattr(uvicorn, "Server", WatchedServer)
    monkeypatch.setenv(server.TOKEN, TOKEN)
    listens, address = threading.Event(), list[str]()

    def on_start(at: str) -> None:
        address.append(at)
        listens.set()

    thread = threading.Thread(target=server.serve, args=(None, index, "127.0.0.1", 0, LIMITS, "cpu", on_start))
    thread.start()
    try:
        assert listens.wait(60)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        data = json.dumps({"text": TEXTS[2], "top": 1}).encode()
        request = urllib.request.Request(f"{address[0]}/search", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["results"][0]["text"] == TEXTS[2]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address[0]}/embed", data, timeout=60)
        port = int(address[0].rpartition(":")[2])
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1, port {port} .*choose another"):
            server.serve(model, None, "127.0.0.1", port, LIMITS, "cpu", on_start)
    finally:
        for one in running:
            one.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["lotlip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    return end.value.code


def test_missing_arguments_are_errors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program(monkeypatch, "serve") == "error: give the folder of a model, an index, or both"
    message = (
        "error: --host 0.0.0.0 lets other machines in, so requests need a token; set LOTLIP_TOKEN, or use 127.0.0.1"
    )
    assert program(monkeypatch, "serve", model, "--host", "0.0.0.0") == message
    monkeypatch.setenv(server.TOKEN, "short")
    message = "error: LOTLIP_TOKEN has 5 characters; it must have at least 16"
    assert program(monkeypatch, "serve", model, "--host", "0.0.0.0") == message


def test_without_fastapi_the_message_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lotlip.retrieval.server")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    message = "error: `lotlip serve` needs the package fastapi: pip install 'lotlip[serve]'"
    assert program(monkeypatch, "serve", model) == message
