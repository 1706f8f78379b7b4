"""The endpoint captioner, with a server on loopback that fails like real ones."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from flows.runtime.servers import free_port
from flows.runtime.supervisor import end_group, start_group
from lotlip.caption.captioners import open_captioner
from lotlip.caption.captioners.endpoint import EndpointCaptioner
from lotlip.caption.config import EndpointCaptionerConfig as Settings
from lotlip.caption.endpoint.client import EndableTransport, RequestsEndedError
from lotlip.config.params import load_params
from lotlip.core.compute import CaptionerCompute
from lotlip.core.section import ConfigError
from lotlip.data.partitions import finished, read_captions, write_captions
from lotlip.data.records import Caption, Failure, ImageRecord
from tests.captioning_server import (
    MODEL,
    CaptioningServer,
    aborted,
    broken,
    caption_for,
    caption_text,
    cut_off,
    dropped,
    retry_soon,
    silent,
    status,
    web_page,
)

# The trial image of the captioner is white and larger than the images of these tests.
SIZE = (8, 8)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("LOTLIP_ENDPOINT_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Pauses between retries start with a twentieth of a second instead of half a second."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.05)


def image_bytes(number: int, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZE, (number % 256, number // 256, 99)).save(file, file_format)
    return file.getvalue()


def record(number: int, image: bytes | None = None) -> ImageRecord:
    return ImageRecord(f"k{number}", image_bytes(number) if image is None else image, "png", "a dog", *SIZE, "")


def records(count: int) -> list[ImageRecord]:
    return [record(number) for number in range(count)]


def words(text: str) -> int:
    return len(text.split())


def captioner(url: str, **changes) -> EndpointCaptioner:
    how = {key: changes.pop(key) for key in ("concurrency", "timeout_seconds", "retries") if key in changes}
    settings = {
        "path": "lotlip/caption/captioners/endpoint.py",
        "url": url,
        "model": MODEL,
        "revision": "abc",
    } | changes
    return EndpointCaptioner("llava", Settings(kind="endpoint", **settings), words, CaptionerCompute(**how))


def is_trial(image: bytes) -> bool:
    with Image.open(io.BytesIO(image)) as file:
        return file.size != SIZE


def fail_first(fault, tries: int = 1, which=lambda number: number % 3 == 0, count: int = 64):
    """A plan of the server: the first attempts of some images fail."""
    bad = {image_bytes(number) for number in range(count) if which(number)}
    return lambda image, number: fault if image in bad and number <= tries else None


def assert_all_captioned(items: list[Caption | Failure], count: int) -> None:
    assert [item.key for item in items] == [f"k{number}" for number in range(count)]
    assert [getattr(item, "text", None) for item in items] == [
        caption_for(image_bytes(number)) for number in range(count)
    ]


# --- requests and answers -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_image_gets_its_own_caption_in_order():
    with CaptioningServer() as server:
        llava = captioner(server.url, prompt="What is it?", max_tokens=7, seed=3)
        captions = list(llava.caption(records(20)))
    assert_all_captioned(captions, 20)
    text = caption_for(image_bytes(0))
    parts = [part.strip() for part in text.split(".") if part]
    assert captions[0] == Caption("k0", "llava", text, parts, words(text), "stop", f"{MODEL}@abc", "What is it?")
    (request,) = [request for request in server.requests if _image(request) == image_bytes(5)]
    assert {key: value for key, value in request.items() if key != "messages"} == {
        "model": MODEL,
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 3,
    }
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}


def _image(request: dict) -> bytes:
    return base64.b64decode(request["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])


def test_about_holds_only_settings_that_decide_captions():
    first = captioner("http://127.0.0.1:1/v1", concurrency=2, temperature=0.5)
    second = captioner("http://127.0.0.1:2/v1", concurrency=4, temperature=0.5, timeout_seconds=9, retries=1)
    assert json.loads(json.dumps(first.about)) == first.about == second.about
    assert first.about == {
        "kind": "endpoint",
        "model": MODEL,
        "revision": "abc",
        "prompt": "Describe this image in detail.",
        "decoding": {"max_tokens": 512, "temperature": 0.5, "top_p": 1.0, "seed": 0},
    }
    assert captioner("http://127.0.0.1:1/v1", seed=1).about != captioner("http://127.0.0.1:1/v1").about


@pytest.mark.slow
@pytest.mark.parametrize(("file_format", "kind"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp")])
def test_images_are_sent_as_stored(file_format, kind):
    image = image_bytes(1, file_format)
    with CaptioningServer() as server:
        (caption,) = captioner(server.url).caption([record(0, image)])
    assert caption.text == caption_for(image)
    assert server.requests[-1]["messages"][0]["content"][0]["image_url"]["url"].startswith(f"data:image/{kind};base64,")


def test_an_uncommon_format_is_sent_as_png():
    with CaptioningServer() as server:
        (caption,) = captioner(server.url).caption([record(0, image_bytes(1, "BMP"))])
    assert caption.text == caption_for(image_bytes(1))


@pytest.mark.slow
def test_images_are_read_when_they_are_needed():
    read = []
    with CaptioningServer() as server:
        captions = captioner(server.url, concurrency=2).caption(read.append(one) or one for one in records(50))
        assert next(captions).key == "k0"
        assert len(read) == 4
        assert len(list(captions)) == 49


@pytest.mark.slow
def test_units_share_the_limit_of_requests_in_flight():
    with CaptioningServer(seconds=0.03) as server:
        authors = [captioner(server.url, concurrency=3), captioner(server.url, concurrency=3)]  # as in one process
        with ThreadPoolExecutor(4) as pool:
            units = list(pool.map(lambda author: list(author.caption(records(12))), authors * 2))
    for captions in units:
        assert_all_captioned(captions, 12)
    assert server.max_in_flight == 3


def test_closing_the_captions_ends_threads_and_connections():
    before = set(threading.enumerate())
    with CaptioningServer(seconds=0.1) as server:
        started = time.monotonic()
        captions = captioner(server.url, concurrency=4).caption(records(1000))
        next(captions)
        captions.close()
        assert time.monotonic() - started < 15  # all captions take 25 s
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("caption-")]
        assert threads == []
        assert _connections_to(server.server_port) == 0
    assert {thread for thread in set(threading.enumerate()) - before if not thread.daemon} == set()


@pytest.mark.parametrize(
    "fault",
    [
        silent,  # the thread waits for the answer
        retry_soon(503),  # for the server, or in the pause before a retry
        status(503, Retry_After="100"),  # in a long pause
    ],
)
def test_closing_the_captions_does_not_wait_for_answers_or_retries(fault):
    with CaptioningServer(fail_first(fault, 999, lambda number: number == 1)) as server:
        captions = captioner(server.url, concurrency=2, timeout_seconds=100, retries=999).caption(records(2))
        next(captions)
        while not server.attempts[image_bytes(1)]:
            time.sleep(0.01)
        started = time.monotonic()
        captions.close()
        assert time.monotonic() - started < 50
        attempts = server.attempts[image_bytes(1)]
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("caption-")] == []
        assert _connections_to(server.server_port) == 0
        assert server.attempts[image_bytes(1)] == attempts


def test_requests_end_while_they_connect():
    """`end` may be called before the connection exists that a request then waits for."""
    ended = []

    class Ending(EndableTransport):
        def _trace(self, event, about):
            if event.endswith("connect_tcp.complete") and not ended:
                ended.append(event)
                self.end()
            super()._trace(event, about)

    with CaptioningServer() as server, Ending() as transport, pytest.raises(RequestsEndedError):
        transport.get(f"{server.url}/models")
    assert ended


def _connections_to(port: int) -> int:
    connections = psutil.Process().net_connections("tcp")
    return sum(
        bool(connection.raddr) and connection.raddr.port == port and connection.status == "ESTABLISHED"
        for connection in connections
    )


# --- faults of the server -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [retry_soon(429), retry_soon(500), retry_soon(503), dropped, cut_off, broken, web_page, aborted]
)
def test_failed_requests_are_retried_without_loss_or_duplicates(fault):
    with CaptioningServer(fail_first(fault, which=lambda number: number % 4 == 0)) as server:
        captions = list(captioner(server.url, concurrency=4, retries=2).caption(records(9)))
    assert_all_captioned(captions, 9)
    assert [server.attempts[image_bytes(number)] for number in range(9)] == [2, 1, 1, 1, 2, 1, 1, 1, 2]


@pytest.mark.slow
def test_a_request_that_times_out_is_retried():
    with CaptioningServer(fail_first(silent)) as server:
        captions = list(captioner(server.url, timeout_seconds=2).caption(records(7)))
    assert_all_captioned(captions, 7)


def test_retry_after_is_respected():
    with CaptioningServer(fail_first(status(429, Retry_After="1.2"), which=lambda number: number == 1)) as server:
        author = captioner(server.url)
        author.endpoint.check()
        started = time.monotonic()
        assert_all_captioned(list(author.caption(records(2))), 2)
        assert time.monotonic() - started > 1.1


@pytest.mark.parametrize("fault", [retry_soon(500), retry_soon(429), aborted])
def test_an_image_that_fails_at_every_attempt_is_a_failure(fault):
    with CaptioningServer(fail_first(fault, 99, lambda number: number == 4)) as server:
        captions = list(captioner(server.url, retries=1, concurrency=2).caption(records(5)))
    assert_all_captioned(captions[:4], 4)
    assert (captions[4].key, captions[4].kind) == ("k4", "server")
    assert "failed with this picture at every attempt: " in captions[4].reason
    assert server.attempts[image_bytes(4)] == 2


@pytest.mark.slow
def test_a_server_that_stops_working_fails_the_unit():
    images = []

    def plan(image, number):
        images.append(image)
        return retry_soon(503) if len(images) > 6 else None

    with CaptioningServer(plan) as server, pytest.raises(ConnectionError, match=r"no longer returns captions.*503"):
        list(captioner(server.url, retries=1, concurrency=4).caption(records(30)))


@pytest.mark.integration
def test_a_unit_resumes_after_its_server_was_killed(tmp_path):
    port, unit = free_port(), "train/part-00000"
    author = captioner(f"http://127.0.0.1:{port}/v1", concurrency=3, retries=1)
    server = _start_server(port)
    try:
        captions = author.caption(records(40))
        first = [next(captions) for _ in range(5)]
        end_group(server)
        with pytest.raises(ConnectionError, match=rf"127\.0\.0\.1:{port}/v1 no longer returns captions.*restart it"):
            list(captions)
        with pytest.raises(ConnectionError):  # the server is down
            write_captions(unit, author.caption(records(40)), 40, tmp_path)
        assert finished(unit, tmp_path) is None
        server = _start_server(port)
        report = write_captions(unit, author.caption(records(40)), 40, tmp_path)
    finally:
        end_group(server)
    assert_all_captioned(first, 5)
    assert (finished(unit, tmp_path), report.written) == (report, 40)
    assert list(read_captions(tmp_path, unit)["text"]) == [caption_for(image_bytes(number)) for number in range(40)]


def _start_server(port: int) -> subprocess.Popen:
    environment = {**os.environ, "SECONDS_EACH": "0.02"}
    server = start_group([sys.executable, "-m", "tests.captioning_server", str(port)], env=environment)
    _await(f"http://127.0.0.1:{port}/v1/models", server, 300)
    return server


def _await(url: str, server: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, f"nothing answers at {url}"
            time.sleep(0.05)


# --- faults of an image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (status(400, "too many pixels"), "rejected", "too many pixels"),
        (status(413), "rejected", "413"),
        (status(422), "rejected", "422"),
        (status(400, "not for me", "content_filter"), "refused", "not for me"),
        (caption_text("", "content_filter"), "refused", "content filter"),
        (caption_text(None, refusal="I cannot do that"), "refused", "I cannot do that"),
        (caption_text(" \n"), "empty", "without words"),
        (caption_text("!!! 🐕"), "empty", "without words"),
        (caption_text(None, "length"), "empty", "finish reason length"),
    ],
)
def test_an_image_without_a_caption_has_a_reason_and_is_not_retried(fault, kind, reason):
    with CaptioningServer(fail_first(fault, 99, lambda number: number == 1)) as server:
        first, bad, last = captioner(server.url).caption(records(3))
    assert isinstance(first, Caption) and isinstance(last, Caption)
    assert (bad.key, bad.where, bad.kind) == ("k1", "k1", kind)
    assert reason in bad.reason
    assert server.attempts[image_bytes(1)] == 1


def test_a_truncated_caption_has_its_finish_reason():
    with CaptioningServer(
        fail_first(caption_text("A dog. It r", "length"), which=lambda number: number == 0)
    ) as server:
        (caption,) = captioner(server.url).caption(records(1))
    assert (caption.text, caption.finish_reason) == ("A dog. It r", "length")


@pytest.mark.parametrize("answer", [retry_soon(500), status(400)])
def test_an_unreadable_image_is_reported_whatever_the_server_answers(answer):
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 99).save(noise, "PNG")
    cut = noise.getvalue()[:-2000]
    with CaptioningServer(lambda image, number: answer if image == cut else None) as server:
        captions = list(
            captioner(server.url, retries=1).caption([record(0, b"not an image"), record(1, cut), record(2)])
        )
    assert [getattr(item, "kind", "caption") for item in captions] == ["unreadable", "unreadable", "caption"]
    assert "not a readable image" in captions[0].reason


# --- errors of configuration --------------------------------------------------------------------------------------


def test_opening_sends_no_request():
    settings = Settings(kind="endpoint", path="x", url="http://127.0.0.1:9/v1", model="m", revision="r")
    author = open_captioner("llava", settings, "bert-base-uncased")
    assert (author.revision, author.prompt) == ("m@r", settings.prompt)


def test_an_unreachable_server_is_an_error_at_first_use():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ValueError, match=rf"{url} does not respond: .*refused.*`url` of caption\.captioners\.llava"):
        list(captioner(url).caption(records(1)))


def test_another_kind_of_server_is_an_error_at_first_use():
    nameless = [None]
    with (
        CaptioningServer(models=nameless) as server,
        pytest.raises(ValueError, match=r"not respond: .*not an OpenAI"),
    ):
        captioner(server.url).endpoint.check()


def test_an_unknown_model_is_an_error_listing_the_served_models():
    with (
        CaptioningServer(models=["other/model", "third"]) as server,
        pytest.raises(ValueError, match=rf"does not serve '{MODEL}'; it has: other/model, third; set `model`"),
    ):
        captioner(server.url).endpoint.check()
    assert server.requests == []


@pytest.mark.parametrize("models", [[], 404, 500, 503])
def test_a_server_without_a_model_list_gets_a_trial_request(models):
    with CaptioningServer(models=models) as server:
        assert_all_captioned(list(captioner(server.url).caption(records(3))), 3)
    assert [is_trial(_image(request)) for request in server.requests] == [True, False, False, False]


def test_a_lost_connection_is_tried_once_more():
    with CaptioningServer(models=["third"]) as server:
        server.list_faults = [dropped]
        with pytest.raises(ValueError, match="it has: third"):
            captioner(server.url).endpoint.check()
        server.list_faults = [dropped, dropped]
        with pytest.raises(ValueError, match="does not respond"):
            captioner(server.url).endpoint.check()


def test_a_server_may_close_the_connection_after_an_internal_error():
    with CaptioningServer() as server:
        server.list_faults = [status(500), dropped, dropped]
        captioner(server.url).endpoint.check()
        assert server.list_faults == [dropped, dropped]


def test_a_served_folder_need_not_be_listed(caplog):
    with CaptioningServer(models=["cached/model"]) as server, caplog.at_level(logging.WARNING):
        assert len(list(captioner(server.url, model="/models/llava").caption(records(2)))) == 2
    assert "does not list the requested /models/llava; it lists: cached/model" in caplog.text


def test_a_different_listed_folder_is_an_error():
    with CaptioningServer(models=["/models/llava-13b"]) as server, pytest.raises(ValueError, match="does not serve"):
        captioner(server.url, model="/models/llava-7b").endpoint.check()


@pytest.mark.parametrize("number", [400, 404, 422])
def test_a_server_that_rejects_every_image_is_an_error(number):
    with CaptioningServer(lambda image, tries: status(number, "not multimodal")) as server:
        with pytest.raises(
            ValueError, match=rf"does not accept requests for '{MODEL}' \(it lists: {MODEL}\).*multimodal"
        ):
            list(captioner(server.url).caption(records(3)))
        assert len(server.requests) == 1


def test_a_failed_trial_can_be_repeated():
    with CaptioningServer(lambda image, number: retry_soon(500) if number <= 2 else None) as server:
        author = captioner(server.url, retries=1)
        with pytest.raises(ConnectionError, match="cannot caption a trial picture"):
            author.endpoint.check()
        author.endpoint.check()
        author.endpoint.check()
        assert len(server.requests) == 3


@pytest.mark.slow
def test_a_model_that_disappears_stops_the_unit():
    with (
        CaptioningServer(fail_first(status(404, "no such model"), 9)) as server,
        pytest.raises(ValueError, match="such model"),
    ):
        list(captioner(server.url).caption(records(9)))


@pytest.mark.parametrize("variable", ["LOTLIP_ENDPOINT_KEY", "OPENAI_API_KEY"])
def test_the_key_comes_from_the_environment(monkeypatch, variable):
    monkeypatch.setenv(variable, "sesame")
    with CaptioningServer(key="sesame") as server:
        assert_all_captioned(list(captioner(server.url).caption(records(2))), 2)


def test_the_projects_own_key_has_precedence(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    monkeypatch.setenv("LOTLIP_ENDPOINT_KEY", "sesame")
    with CaptioningServer(key="sesame") as server:
        captioner(server.url).endpoint.check()


def test_a_wrong_key_is_an_error_that_hides_the_key(monkeypatch, caplog):
    monkeypatch.setenv("LOTLIP_ENDPOINT_KEY", "wrong-secret")
    with (
        CaptioningServer(key="sesame") as server,
        caplog.at_level(logging.DEBUG),
        pytest.raises(
            ValueError, match=r"rejects the key in the environment: .*401.*set LOTLIP_ENDPOINT_KEY"
        ) as caught,
    ):
        captioner(server.url).endpoint.check()
    assert "Incorrect API key provided: Bearer …" in str(caught.value)
    assert "wrong-secret" not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_a_missing_key_is_an_error():
    with CaptioningServer(key="sesame") as server, pytest.raises(ValueError, match="rejects requests without a key"):
        captioner(server.url).endpoint.check()


def test_a_key_is_not_sent_over_plain_http_to_another_machine(monkeypatch):
    captioner("http://gpu-7.example:8000/v1")  # there is no key to protect
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    for url in ("http://127.0.0.1:1/v1", "http://localhost:1/v1", "http://[::1]:1/v1", "https://gpu-7.example/v1"):
        captioner(url)
    with pytest.raises(ValueError, match=r"plain http to another machine.*use https or an ssh tunnel") as caught:
        captioner("http://gpu-7.example:8000/v1")
    assert "sesame" not in str(caught.value)
    monkeypatch.setenv("LOTLIP_ENDPOINT_KEY", "EMPTY")
    captioner("http://gpu-7.example:8000/v1")


def test_a_local_server_is_reached_without_the_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with CaptioningServer() as server:
        captioner(server.url).endpoint.check()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("127.0.0.1:8000/v1", "not the address of an API; write one like http"),
        ("http:///v1", "not the address of an API"),
        ("http://host:port/v1", "not the address of an API"),
        ("https://host/v1?key=sesame", "not the address of an API"),
        ("https://me:sesame@host/v1", "contains a password; remove it and set LOTLIP_ENDPOINT_KEY"),
    ],
)
def test_an_invalid_address_is_an_error_that_hides_secrets(tmp_path, url, problem):
    params = Path("params.yaml").read_text(encoding="utf-8")
    entry = f"    gpt: {{kind: endpoint, path: x, url: '{url}', model: m, revision: r}}"
    text = params.replace("  captioners:\n", f"  captioners:\n{entry}\n")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"caption\.captioners\.gpt: url .*") as caught:
        load_params(tmp_path / "params.yaml")
    assert problem in str(caught.value)
    assert "sesame" not in str(caught.value)


# --- a real server ------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_transformers_serve_captions_images(tmp_path):
    from tests.tiny_mllm import save_llava

    model, port = save_llava(tmp_path / "tiny-llava"), free_port()
    url = f"http://127.0.0.1:{port}"
    images = [record(number, image_bytes(number * 13_000)) for number in range(6)]  # colours far apart
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = start_group(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await(f"{url}/health", server, 600)
        author = captioner(f"{url}/v1", model=str(model), max_tokens=12, concurrency=2)
        captions = list(author.caption(images))
        again = list(author.caption(images))
        with pytest.raises(ValueError, match=r"Server is pinned to .*tiny-llava"):
            captioner(f"{url}/v1", model="other/model").endpoint.check()
    finally:
        end_group(server)
    failures = [item for item in captions if isinstance(item, Failure)]
    assert not failures, (failures, (tmp_path / "log").read_text())
    assert [item.key for item in captions] == [f"k{number}" for number in range(6)]
    assert len({item.text for item in captions}) > 1, captions  # captions depend on the images
    assert {item.finish_reason for item in captions} <= {"stop", "length"}
    assert captions == again
