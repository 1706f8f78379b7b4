"""Captions, or rewrites of captions, from a model behind an OpenAI-compatible server (vLLM, SGLang, and others)."""

from __future__ import annotations

import base64
import io
import ipaddress
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from lotlip.caption.captioners.rewriting import question, rewrite_in
from lotlip.caption.config import EndpointCaptionerConfig, EndpointRewriterConfig
from lotlip.caption.reasoning import cut_reasoning
from lotlip.core.compute import CAPTIONER_DEFAULTS, CaptionerCompute
from lotlip.data.images import decode_rgb
from lotlip.data.records import Caption, Failure, ImageRecord, NonRetryableError
from lotlip.data.text import has_words, split_sub_captions

if TYPE_CHECKING:
    import httpx2
    import openai
    from openai.types.chat import ChatCompletion

    from lotlip.caption.endpoint_client import EndableClient

KEYS = ("LOTLIP_ENDPOINT_KEY", "OPENAI_API_KEY")  # environment variables; the first one that is set is used
NO_KEY = "EMPTY"  # the customary value for servers that need no key
CONNECT_SECONDS = 5.0
_USAGE = 64  # answers
LONGEST_REASON = 300  # characters of a server's error message: some servers send the picture back

# Formats, by Pillow's name, that servers accept directly.
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

log = logging.getLogger(__name__)


@dataclass
class _Server:
    """The state of a server, shared by all units that this process captions at once.

    Attributes:
        slots: one per request that may be in flight.
        lock: held while checking whether the server responds.
        alive: when it last returned a caption, in `time.monotonic` seconds.
        dead: when it last failed to caption the trial picture.
    """

    slots: BoundedSemaphore
    lock: Lock = field(default_factory=Lock)
    alive: float = -math.inf
    dead: float = -math.inf


@cache
def _server(url: str, model: str, concurrency: int) -> _Server:
    return _Server(BoundedSemaphore(concurrency))


class EndpointCaptioner:
    """Sends images to a server for captioning, several at a time.

    A problem with an image is a permanent `Failure`: "unreadable", "rejected" (the server does not accept it),
    "refused" (by a content filter, or by the model itself), "empty" (no words, or only reasoning) or "malformed" (a
    response without text). A problem with the server is retried, with growing pauses or as its Retry-After says. An
    image whose retries are used up is a `Failure` of kind "server" if the server then captions a trial picture;
    otherwise the server is considered down and the whole unit fails.

    Args:
        name: of the captioner, stored with its captions.
        settings: its entry in params.yaml.
        count_tokens: of a text.

    Attributes:
        revision: the model and its revision, as in the settings.
        prompt: sent with each image.
        about: everything besides the image that decides a caption's text, as JSON.
        usage: tokens of the request and of the answer, as the server counted them, for each of the latest answers.

    Raises:
        ValueError: the key would be sent unencrypted to another machine.
    """

    # for messages: what a request is about, and what a trial request asks for
    asked, trial = "picture", "caption a trial picture"

    def __init__(
        self,
        name: str,
        settings: EndpointCaptionerConfig | EndpointRewriterConfig,
        count_tokens: Callable[[str], int],
        compute: CaptionerCompute = CAPTIONER_DEFAULTS,
    ) -> None:
        self._compute = compute
        self.settings = settings
        self.prompt = settings.prompt
        self.revision = f"{settings.model}@{settings.revision}"
        decoding = settings.decoding
        self.about: dict[str, Any] = {
            "kind": settings.kind,
            "model": settings.model,
            "revision": settings.revision,
            "prompt": settings.prompt,
            "decoding": decoding,
        }
        self.usage: deque[tuple[int, int]] = deque(maxlen=_USAGE)
        self._name = name
        self._count_tokens = count_tokens
        self._decoding = decoding
        self._checked = False
        # A warning would come too late: a key sent in clear text is compromised.
        if _key() != NO_KEY and settings.url.startswith("http:") and not _is_loopback(settings.url):
            raise ValueError(
                f"{self._place}: {settings.url} is plain http to another machine, so others on the network could read "
                f"the key; use https or an ssh tunnel to 127.0.0.1, or set {KEYS[0]}={NO_KEY} to send no key"
            )

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption or failure for each image, in order.

        Up to twice `concurrency` images are in memory, so that a slow one does not block others.

        Raises:
            NonRetryableError: the server cannot be used with these settings.
            ConnectionError: the server is down, or too busy for a single caption; retry the unit later.
        """
        self.check()
        concurrency = self._compute.concurrency
        window: deque[Future[Caption | Failure]] = deque()
        pool, client = ThreadPoolExecutor(concurrency, f"caption-{self._name}"), self._client()
        try:
            for record in records:
                window.append(pool.submit(self._caption, client, record))
                if len(window) == 2 * concurrency:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            client.end()
            pool.shutdown(cancel_futures=True)
            client.close()

    def check(self) -> None:
        """On the first call, checks that the server serves the model and can caption a trial picture.

        Raises:
            NonRetryableError: it cannot be reached, rejects the key, or does not serve the model.
            ConnectionError: it fails for a reason that may be temporary.
        """
        import openai

        with _server_state(self.settings, self._compute).lock:
            if self._checked:
                return
            with self._client() as client:
                models = self._models(client)
                try:
                    self._send(client, self._trial_request())
                except openai.APIError as error:
                    raise self._unusable(error, models) from None
            self._checked = True

    # --- what is sent ------------------------------------------------------------------------------------------------

    def _request(self, record: ImageRecord) -> Any:
        """The content of the message for an image.

        Raises:
            ValueError: the image cannot be read.
        """
        return self._about_image(data_url(record.image))

    def _trial_request(self) -> Any:
        """The content of a message that any server with a suitable model can answer."""
        return self._about_image(_trial_picture())

    def _about_image(self, image: str) -> Any:
        return [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": self.prompt}]

    def _text(self, content: str) -> str:
        """The caption in an answer without reasoning."""
        return content

    def _check_readable(self, record: ImageRecord) -> None:
        """Raises ValueError if the image is broken: for these some servers return 400, others 500."""
        decode_rgb(record.image)

    # --- one image ----------------------------------------------------------------------------------------------------

    def _caption(self, client: openai.OpenAI, record: ImageRecord) -> Caption | Failure:
        import openai

        try:
            request = self._request(record)
        except ValueError as error:
            return _failure(record, str(error), "unreadable")
        try:
            choice = self._send(client, request).choices[0]
        except openai.APIError as error:
            return self._image_failure(client, record, error)
        finish_reason = str(choice.finish_reason)
        try:
            content, refusal = _content(choice.message)
        except TypeError as error:  # a retry would cost as much and give the same
            return _failure(record, f"{self._name} gave a malformed answer: {error}", "malformed")
        if finish_reason == "content_filter" or refusal:
            words = refusal or "its content filter stopped the caption"
            return _failure(record, f"{self._name} refused the {self.asked}: {self._clean(words)}", "refused")
        answer = cut_reasoning(content)
        text = self._text(answer)
        sub_captions = split_sub_captions(text)
        if not has_words(text):
            reasoned = answer != content.strip() or _has_reasoning_field(choice.message)
            reason = f"{self._name} answered without words (finish reason {finish_reason})"
            if reasoned:
                reason = (
                    f"{self._name} answered with only reasoning (finish reason {finish_reason}); turn reasoning off "
                    f"or raise max_tokens of {self._place}"
                )
            return _failure(record, reason, "empty")
        return Caption(
            key=record.key,
            captioner=self._name,
            text=text,
            sub_captions=sub_captions,
            tokens=self._count_tokens(text),
            finish_reason=finish_reason,
            revision=self.revision,
            prompt=self.prompt,
        )

    def _send(self, client: openai.OpenAI, content: Any) -> ChatCompletion:
        messages: Any = [{"role": "user", "content": content}]
        server = _server_state(self.settings, self._compute)
        with server.slots:
            answer = client.chat.completions.create(model=self.settings.model, messages=messages, **self._decoding)
        server.alive = time.monotonic()
        if answer.usage:
            self.usage.append((answer.usage.prompt_tokens, answer.usage.completion_tokens))
        return answer

    def _image_failure(self, client: openai.OpenAI, record: ImageRecord, error: openai.APIError) -> Failure:
        """The failure of an image, if the image is at fault, or the server with this image only; raises otherwise."""
        failed, fault, reason = time.monotonic(), _fault(error), self._error_text(error)
        if fault == "setup":
            raise self._unusable(error, None) from None
        try:
            self._check_readable(record)
        except ValueError as unreadable:
            return _failure(record, str(unreadable), "unreadable")
        if fault == "server":
            self._check_alive(client, failed, reason)
            return _failure(record, f"the server failed with this {self.asked} at every attempt: {reason}", "server")
        if error.code in ("content_filter", "content_policy_violation"):
            return _failure(record, f"{self._name} refused the {self.asked}: {reason}", "refused")
        return _failure(record, f"the server does not accept the {self.asked}: {reason}", "rejected")

    # --- the server ---------------------------------------------------------------------------------------------------

    def _check_alive(self, client: openai.OpenAI, failed: float, reason: str) -> None:
        """Checks that the server still returns captions after a failure.

        If several images fail at once, one of their threads sends the trial picture and the others use its result.

        Raises:
            ConnectionError: the server is down.
        """
        import openai

        server = _server_state(self.settings, self._compute)
        with server.lock:
            if server.alive < failed and server.dead < failed:
                try:
                    self._send(client, self._trial_request())
                except openai.APIError as error:
                    if _fault(error) != "server":
                        raise self._unusable(error, None) from None
                    server.dead = time.monotonic()
            if server.alive < failed:
                raise ConnectionError(
                    f"{self.settings.url} no longer returns captions: {reason}; check the server's log and restart it, "
                    "then rerun the stage: finished units are kept"
                )

    def _models(self, client: openai.OpenAI) -> list[str] | None:
        """The models that the server lists; None if it cannot list them.

        Raises:
            NonRetryableError: it cannot be reached, rejects the key, or lists other models.
        """
        import openai

        url, model = self.settings.url, self.settings.model
        try:
            models = _list_models(client)
        except openai.APIConnectionError as error:
            raise NonRetryableError(
                f"{url} does not respond: {self._error_text(error)}; start the server there, or correct `url` of "
                f"{self._place} in params.yaml"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._unusable(error, None) from None
            return None  # `transformers serve` fails here without a cache; the trial picture is a better test
        if not models or model in models:
            return models
        # `transformers serve` lists only the models that its cache has by branch name: no folders, no commits. Other
        # servers list everything that they serve, but SGLang answers requests for any model.
        if "@" in model or (_is_folder(model) and not any(map(_is_folder, models))):
            log.warning("%s does not list the requested %s; it lists: %s", url, model, _join_names(models))
            return models
        raise NonRetryableError(
            f"{url} does not serve {model!r}; it has: {_join_names(models)}; set `model` of {self._place} in "
            "params.yaml to one of them, or start the server with that model"
        )

    def _unusable(self, error: openai.APIError, models: list[str] | None) -> Exception:
        """The error for a server that cannot be used; `NonRetryableError` if the user must fix something."""
        url, reason = self.settings.url, self._error_text(error)
        if getattr(error, "status_code", None) in (401, 403):
            rejected = "the key in the environment" if _key() != NO_KEY else "requests without a key"
            return NonRetryableError(
                f"{url} rejects {rejected}: {reason}; set {KEYS[0]} in the environment to the server's key"
            )
        listed = "" if models is None else f" (it lists: {_join_names(models)})"
        if _fault(error) == "server":
            return ConnectionError(
                f"{url} cannot {self.trial} with {self.settings.model!r}{listed}: {reason}; check the server's log"
            )
        return NonRetryableError(
            f"{url} does not accept requests for {self.settings.model!r}{listed}: {reason}; set `url`, `model` and "
            f"`max_tokens` of {self._place} in params.yaml to what it serves, set parameters that it does not accept "
            "to null, or start it with that model"
        )

    def _client(self) -> EndableClient:
        import httpx2

        from lotlip.caption.endpoint_client import EndableClient, EndableTransport

        settings = self.settings
        # Redirects are not followed: they would send pictures and key to an address that the user did not configure.
        transport = EndableTransport(
            limits=httpx2.Limits(max_connections=self._compute.concurrency + 1),
            event_hooks={"response": [_refuse_broken_answers]},
            trust_env=not _is_loopback(settings.url),  # a proxy's loopback is another machine's
            follow_redirects=False,
        )
        wait = self._compute.timeout_seconds
        timeout = httpx2.Timeout(wait, connect=min(wait, CONNECT_SECONDS))
        return EndableClient(
            base_url=settings.url,
            api_key=_key(),
            timeout=timeout,
            max_retries=self._compute.retries,
            http_client=transport,
        )

    @property
    def _place(self) -> str:
        return f"caption.captioners.{self._name}"

    def _error_text(self, error: openai.APIError) -> str:
        """An error's message, with its cause for a lost connection."""
        status = getattr(error, "status_code", None)
        if status is None:
            return self._clean(f"{error} ({error.__cause__})" if error.__cause__ else str(error))
        body = error.body
        if isinstance(body, dict):  # OpenAI's format, or FastAPI's
            body = body.get("message") or body.get("detail") or body
        return self._clean(f"status {status}: {body}" if body else f"status {status}")

    def _clean(self, text: str) -> str:
        """A server's text for messages and tables: one short line without the key, which some servers repeat."""
        key = _key()
        line = " ".join((text if key == NO_KEY else text.replace(key, "…")).split())
        return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"


class EndpointRewriter(EndpointCaptioner):
    """Sends short captions to a server for rewording, several at a time; no image is sent (arXiv 2305.20088).

    Failures and retries are those of `EndpointCaptioner`.
    """

    asked, trial = "caption", "reword a trial caption"

    def _request(self, record: ImageRecord) -> str:
        return question(self.prompt, record.short_caption)

    def _trial_request(self) -> str:
        return question(self.prompt, "a photo of a dog")

    def _text(self, content: str) -> str:
        return rewrite_in(content)

    def _check_readable(self, record: ImageRecord) -> None:
        """Does nothing, because the image is not sent."""


def served_models(url: str) -> list[str]:
    """The models that a server lists; none if it has no list.

    Raises:
        ValueError: the address cannot be used.
        ConnectionError: nothing responds there.
    """
    import openai

    about = {"kind": "endpoint", "path": __file__, "url": url, "model": "any", "revision": "any"}
    captioner = EndpointCaptioner("init", EndpointCaptionerConfig.model_validate(about), len)
    with captioner._client() as client:
        try:
            return _list_models(client)
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{url} does not respond: {captioner._error_text(error)}") from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise captioner._unusable(error, None) from None
            return []


def _list_models(client: openai.OpenAI) -> list[str]:
    """The models that a server lists.

    A lost connection is tried once more. An error is not: the server may close the connection after it.

    Raises:
        openai.APIError: it does not list them.
    """
    import openai

    client = client.with_options(max_retries=0)
    try:
        return [model.id for model in client.models.list().data]
    except openai.APIConnectionError:
        return [model.id for model in client.models.list().data]


def _content(message: Any) -> tuple[str, str]:
    """The text of a response and the model's refusal; each may be empty.

    `content` is a text or a list of parts; text parts are joined, reasoning parts are skipped.

    Raises:
        TypeError: it is neither; the message names its type.
    """
    content = message.content
    refused = [message.refusal] if isinstance(message.refusal, str) else []
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) and part is not content else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            refused.append(part["refusal"])
        elif kind in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind not in ("thinking", "redacted_thinking", "reasoning"):
            what = f"a part of type {kind!r}" if isinstance(kind, str) else type(part).__name__
            raise TypeError(f"content has {what}, not text")
    # an unpaired surrogate, which JSON may contain, is not accepted by tokenizers
    text = "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, " ".join(refused).strip()


def _has_reasoning_field(message: Any) -> bool:
    """Whether the server separated reasoning from the answer, as vLLM and SGLang do for models that they support."""
    return any(getattr(message, name, None) for name in ("reasoning_content", "reasoning"))


def data_url(image: bytes) -> str:
    """An encoded image as a data URL: unchanged, or as PNG if servers may not know its format.

    Raises:
        ValueError: it must be re-encoded and cannot be read.
    """
    try:
        with Image.open(io.BytesIO(image)) as file:  # reads the header only
            media_type = MEDIA_TYPES.get(file.format or "")
    except Exception:  # Pillow raises many types on broken files
        media_type = None
    if media_type is None:
        png = io.BytesIO()
        decode_rgb(image).save(png, "PNG")
        image, media_type = png.getvalue(), MEDIA_TYPES["PNG"]
    return f"data:{media_type};base64,{base64.b64encode(image).decode('ascii')}"


@cache
def _trial_picture() -> str:
    """A white square, which any captioning server can describe."""
    png = io.BytesIO()
    Image.new("RGB", (224, 224), "white").save(png, "PNG")
    return data_url(png.getvalue())


def _refuse_broken_answers(response: httpx2.Response) -> None:
    """Treats an incomplete response as a lost connection, which the client retries."""
    import httpx2

    if not response.is_success:
        return
    response.read()
    try:
        answer = response.json()
        if "choices" in answer:
            choice = answer["choices"][0]
            # "abort": vLLM and SGLang stopped in the middle
            whole = choice["finish_reason"] not in (None, "abort") and isinstance(choice["message"], dict)
        else:
            whole = all(isinstance(model["id"], str) for model in answer["data"])
        whole = whole and "json" in response.headers["content-type"]
    except (ValueError, TypeError, KeyError, IndexError):
        whole = False
    if not whole:
        raise httpx2.RemoteProtocolError("the response is broken, or not an OpenAI API's", request=response.request)


def _fault(error: openai.APIError) -> Literal["image", "server", "setup"]:
    """What is at fault when a request fails after all retries."""
    status = getattr(error, "status_code", None)  # None: no complete response arrived
    if status is None or status >= 500 or status in (408, 409, 425, 429):
        return "server"
    return "image" if status in (400, 413, 415, 422) else "setup"


def _failure(record: ImageRecord, reason: str, kind: str) -> Failure:
    return Failure(key=record.key, where=record.key, reason=reason, kind=kind)


def _server_state(settings: EndpointCaptionerConfig | EndpointRewriterConfig, compute: CaptionerCompute) -> _Server:
    return _server(settings.url, settings.model, compute.concurrency)


def _key() -> str:
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), NO_KEY)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return host == "localhost"


def _is_folder(model: str) -> bool:
    return model.startswith(("/", ".", "~"))


def _join_names(models: list[str]) -> str:
    shown = ", ".join(models[:5]) or "nothing"
    return shown + (", …" if len(models) > 5 else "")
