"""A multimodal LLM behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`) writes the captions."""

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

from lotlip.caption.config import EndpointCaptionerConfig
from lotlip.caption.reasoning import cut_reasoning
from lotlip.core.compute import CAPTIONER_DEFAULTS, CaptionerCompute
from lotlip.data.images import decode_rgb
from lotlip.data.records import Caption, Failure, ImageRecord, Unusable
from lotlip.data.text import has_words, split_sub_captions

if TYPE_CHECKING:
    import httpx2
    import openai
    from openai.types.chat import ChatCompletion

KEYS = ("LOTLIP_ENDPOINT_KEY", "OPENAI_API_KEY")  # in the environment; the first that is set
NO_KEY = "EMPTY"  # what such servers' own guides give a client that needs none
CONNECT_SECONDS = 5.0
LONGEST_REASON = 300  # characters of what a server says: some send the picture back

# Formats that servers take as they are, by Pillow's name.
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

log = logging.getLogger(__name__)


@dataclass
class _Server:
    """What this process knows of a server, whatever number of units it captions at once.

    Attributes:
        slots: one for each request that may be in flight.
        lock: of whoever finds out whether the server lives.
        alive: when it last gave a caption, in `time.monotonic` seconds.
        dead: when it last failed a trial picture.
    """

    slots: BoundedSemaphore
    lock: Lock = field(default_factory=Lock)
    alive: float = -math.inf
    dead: float = -math.inf


@cache
def _server(url: str, model: str, concurrency: int) -> _Server:
    return _Server(BoundedSemaphore(concurrency))


class EndpointCaptioner:
    """Asks a server for a caption of each image, some at a time.

    What an image is to blame for is a `Failure` for good: "unreadable", "rejected" (the server will not take it),
    "refused" (a content filter, or the model itself), "empty" (no words, or nothing but reasoning) or "malformed" (an
    answer of a type that has no text). What the server is to blame for is tried again, with
    growing pauses or as its Retry-After says. An image whose tries are all used up is a `Failure` of kind "server" if
    the server then captions a trial picture; if it does not, the server is gone and the whole unit fails.

    Args:
        name: what the captions are filed under.
        settings: its entry in params.yaml.
        count_tokens: of a text.

    Attributes:
        revision: the model and its revision, as the settings name them.
        prompt: what is asked for each image.
        about: all that decides a caption's text besides the image, as plain JSON.

    Raises:
        ValueError: the key would be sent unencrypted to another machine.
    """

    def __init__(
        self,
        name: str,
        settings: EndpointCaptionerConfig,
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
        self._name = name
        self._count_tokens = count_tokens
        self._decoding = decoding
        self._checked = False
        # A warning would come too late: a key that went over the wire in the clear is spent.
        if _key() != NO_KEY and settings.url.startswith("http:") and not _is_loopback(settings.url):
            raise ValueError(
                f"{self._place}: {settings.url} is plain http to another machine, where anyone on the way could read "
                f"the key; use https or an ssh tunnel to 127.0.0.1, or set {KEYS[0]}={NO_KEY} to send no key"
            )

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption for each image, or why there is none: one for one, in their order.

        Up to twice `concurrency` images are held in memory: so many, that a slow one does not keep others waiting.

        Raises:
            Unusable: the server cannot be used as params.yaml has it.
            ConnectionError: the server is gone, or too busy for a single caption; try the unit again later.
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
            client.close()  # first, so that what is in flight is not tried again
            pool.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Asks the server, the first time, whether it serves the model and captions a trial picture.

        Raises:
            Unusable: it cannot be reached, refuses the key, or does not serve the model.
            ConnectionError: it fails for a reason that may pass.
        """
        import openai

        with _known(self.settings, self._compute).lock:
            if self._checked:
                return
            with self._client() as client:
                models = self._models(client.with_options(max_retries=1))
                try:
                    self._send(client, _trial_picture())
                except openai.APIError as error:
                    raise self._unusable(error, models) from None
            self._checked = True

    # --- one image ----------------------------------------------------------------------------------------------------

    def _caption(self, client: openai.OpenAI, record: ImageRecord) -> Caption | Failure:
        import openai

        try:
            image = data_url(record.image)
        except ValueError as error:
            return _failure(record, str(error), "unreadable")
        try:
            choice = self._send(client, image).choices[0]
        except openai.APIError as error:
            return self._blame(client, record, error)
        finish_reason = str(choice.finish_reason)
        try:
            written, refused = _content(choice.message)
        except TypeError as error:  # another try would cost as much and bring the same
            return _failure(record, f"{self._name} gave a malformed answer: {error}", "malformed")
        if finish_reason == "content_filter" or refused:
            said = refused or "its content filter stopped the caption"
            return _failure(record, f"{self._name} refused the picture: {self._clean(said)}", "refused")
        text = cut_reasoning(written)
        sub_captions = split_sub_captions(text)
        if not has_words(text):
            reasoned = text != written.strip() or _has_reasoning_field(choice.message)
            reason = f"{self._name} answered without words (finish reason {finish_reason})"
            if reasoned:
                reason = (
                    f"{self._name} answered with nothing but reasoning (finish reason {finish_reason}); turn reasoning "
                    f"off, or raise max_tokens of {self._place}"
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

    def _send(self, client: openai.OpenAI, image: str) -> ChatCompletion:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": self.prompt}]
        messages: Any = [{"role": "user", "content": content}]
        server = _known(self.settings, self._compute)
        with server.slots:
            answer = client.chat.completions.create(model=self.settings.model, messages=messages, **self._decoding)
        server.alive = time.monotonic()
        return answer

    def _blame(self, client: openai.OpenAI, record: ImageRecord, error: openai.APIError) -> Failure:
        """The failure of an image, if it was the image's or the server's with this image alone."""
        failed, fault, reason = time.monotonic(), _fault(error), self._told(error)
        if fault == "setup":
            raise self._unusable(error, None) from None
        try:
            decode_rgb(record.image)
        except ValueError as unreadable:  # some servers say so by 400, others by 500
            return _failure(record, str(unreadable), "unreadable")
        if fault == "server":
            self._make_sure_it_lives(client, failed, reason)
            return _failure(record, f"the server failed with this picture at every try: {reason}", "server")
        if error.code in ("content_filter", "content_policy_violation"):
            return _failure(record, f"{self._name} refused the picture: {reason}", "refused")
        return _failure(record, f"the server will not take the picture: {reason}", "rejected")

    # --- the server ---------------------------------------------------------------------------------------------------

    def _make_sure_it_lives(self, client: openai.OpenAI, failed: float, reason: str) -> None:
        """Tells one image's bad luck from a server that is gone: it has to give a caption after the failure.

        Of many that fail together, one asks for the trial picture's and the others take its answer.

        Raises:
            ConnectionError: the server is gone.
        """
        import openai

        server = _known(self.settings, self._compute)
        with server.lock:
            if server.alive < failed and server.dead < failed:
                try:
                    self._send(client, _trial_picture())
                except openai.APIError as error:
                    if _fault(error) != "server":
                        raise self._unusable(error, None) from None
                    server.dead = time.monotonic()
            if server.alive < failed:
                raise ConnectionError(
                    f"{self.settings.url} gives no captions any more: {reason}; look at the server's log and start it "
                    "again, then run the stage again: finished units are kept"
                )

    def _models(self, client: openai.OpenAI) -> list[str] | None:
        """What the server lists; None where it does not tell.

        Raises:
            Unusable: it cannot be reached, refuses the key, or lists models and not this one.
        """
        import openai

        url, model = self.settings.url, self.settings.model
        try:
            models = [found.id for found in client.models.list().data]
        except openai.APIConnectionError as error:
            raise Unusable(
                f"{url} does not answer: {self._told(error)}; start the server there, or set `url` of {self._place} "
                "in params.yaml to where it is"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._unusable(error, None) from None
            return None  # `transformers serve` fails at this where it has no cache; the trial picture tells more
        if not models or model in models:
            return models
        # `transformers serve` lists what its cache has under a branch's name: no folder, and no model at a commit.
        # Other servers list all they serve, and SGLang's then answers whatever model it is asked for.
        if "@" in model or (_is_folder(model) and not any(map(_is_folder, models))):
            log.warning("%s does not list %s, which it is asked for; it lists: %s", url, model, _joined(models))
            return models
        raise Unusable(
            f"{url} does not serve {model!r}; it has: {_joined(models)}; set `model` of {self._place} in params.yaml "
            "to one of them, or start the server with that model"
        )

    def _unusable(self, error: openai.APIError, models: list[str] | None) -> Exception:
        """Why the server cannot be used; a Unusable where the user has to mend something."""
        url, reason = self.settings.url, self._told(error)
        if getattr(error, "status_code", None) in (401, 403):
            had = "the key in the environment" if _key() != NO_KEY else "requests without a key"
            return Unusable(f"{url} refuses {had}: {reason}; set {KEYS[0]} in the environment to the server's key")
        has = "" if models is None else f" (it lists: {_joined(models)})"
        if _fault(error) == "server":
            return ConnectionError(
                f"{url} cannot caption a trial picture with {self.settings.model!r}{has}: {reason}; "
                "look at the server's log"
            )
        return Unusable(
            f"{url} does not take requests for {self.settings.model!r}{has}: {reason}; set `url`, `model` and "
            f"`max_tokens` of {self._place} in params.yaml to what it serves, set a parameter that it does not take to "
            "null, or start it with that model"
        )

    def _client(self) -> openai.OpenAI:
        import httpx2
        import openai

        settings = self.settings
        # Redirects are not followed: they would take pictures and key to an address that nobody wrote down.
        transport = openai.DefaultHttpxClient(
            limits=httpx2.Limits(max_connections=self._compute.concurrency + 1),
            event_hooks={"response": [_refuse_broken_answers]},
            trust_env=not _is_loopback(settings.url),  # a proxy would look for the server on its own machine
            follow_redirects=False,
        )
        wait = self._compute.timeout_seconds
        timeout = httpx2.Timeout(wait, connect=min(wait, CONNECT_SECONDS))
        return openai.OpenAI(
            base_url=settings.url,
            api_key=_key(),
            timeout=timeout,
            max_retries=self._compute.retries,
            http_client=transport,
        )

    @property
    def _place(self) -> str:
        return f"caption.captioners.{self._name}"

    def _told(self, error: openai.APIError) -> str:
        """An error's words; of a lost connection, what lost it."""
        status = getattr(error, "status_code", None)
        if status is None:
            return self._clean(f"{error} ({error.__cause__})" if error.__cause__ else str(error))
        said = error.body
        if isinstance(said, dict):  # OpenAI's manner, or FastAPI's
            said = said.get("message") or said.get("detail") or said
        return self._clean(f"status {status}: {said}" if said else f"status {status}")

    def _clean(self, text: str) -> str:
        """A server's words for messages and tables: one short line, and never the key, which some servers repeat."""
        key = _key()
        line = " ".join((text if key == NO_KEY else text.replace(key, "…")).split())
        return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"


def _content(message: Any) -> tuple[str, str]:
    """The text of an answer and, where the model refuses, its words; each may be empty.

    `content` is a text or a list of parts, of which those of text are joined and those of reasoning are left out.

    Raises:
        TypeError: it is neither; the message says what it is.
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
    # half of a surrogate pair, which JSON can have, is no text that a tokenizer takes
    whole = "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, " ".join(refused).strip()


def _has_reasoning_field(message: Any) -> bool:
    """Whether the server put reasoning beside the answer, as vLLM and SGLang do for models that they know."""
    return any(getattr(message, name, None) for name in ("reasoning_content", "reasoning"))


def data_url(image: bytes) -> str:
    """An encoded image as a URL that holds it: as it is, or as PNG where servers may not know its format.

    Raises:
        ValueError: it has to be encoded anew and cannot be read.
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
    """A white square, which any server that captions pictures can caption."""
    png = io.BytesIO()
    Image.new("RGB", (224, 224), "white").save(png, "PNG")
    return data_url(png.getvalue())


def _refuse_broken_answers(response: httpx2.Response) -> None:
    """Makes an answer that is not whole a lost connection, which the client tries again."""
    import httpx2

    if not response.is_success:
        return
    response.read()
    try:
        answer = response.json()
        if "choices" in answer:
            choice = answer["choices"][0]
            # "abort": vLLM and SGLang stopped in the middle of it
            whole = choice["finish_reason"] not in (None, "abort") and isinstance(choice["message"], dict)
        else:
            whole = all(isinstance(model["id"], str) for model in answer["data"])
        whole = whole and "json" in response.headers["content-type"]
    except (ValueError, TypeError, KeyError, IndexError):
        whole = False
    if not whole:
        raise httpx2.RemoteProtocolError("the answer is broken, or none of an OpenAI API", request=response.request)


def _fault(error: openai.APIError) -> Literal["image", "server", "setup"]:
    """Who is to blame when a request fails for good."""
    status = getattr(error, "status_code", None)  # none: no whole answer came
    if status is None or status >= 500 or status in (408, 409, 425, 429):
        return "server"
    return "image" if status in (400, 413, 415, 422) else "setup"


def _failure(record: ImageRecord, reason: str, kind: str) -> Failure:
    return Failure(key=record.key, where=record.key, reason=reason, kind=kind)


def _known(settings: EndpointCaptionerConfig, compute: CaptionerCompute) -> _Server:
    return _server(settings.url, settings.model, compute.concurrency)


def _key() -> str:
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), NO_KEY)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _is_folder(model: str) -> bool:
    return model.startswith(("/", ".", "~"))


def _joined(models: list[str]) -> str:
    shown = ", ".join(models[:5]) or "nothing"
    return shown + (", …" if len(models) > 5 else "")
