"""A model behind an OpenAI-compatible server, and what its errors mean for images and for the user."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lotlip.caption.config import EndpointCaptionerConfig, EndpointRewriterConfig
from lotlip.core.compute import CaptionerCompute
from lotlip.data.records import NonRetryableError

if TYPE_CHECKING:
    import httpx2
    import openai
    from openai.types.chat import ChatCompletion

    from lotlip.caption.endpoint.client import EndableClient

KEYS = ("LOTLIP_ENDPOINT_KEY", "OPENAI_API_KEY")  # environment variables; the first one that is set is used
NO_KEY = "EMPTY"  # the customary value for servers that need no key
CONNECT_SECONDS = 5.0
_USAGE = 64  # answers
LONGEST_REASON = 300  # characters of a server's error message: some servers send the picture back

log = logging.getLogger(__name__)


@dataclass
class _State:
    """The state of a server, shared by all units that this process captions at once.

    Attributes:
        slots: one per request that may be in flight.
        lock: held while checking whether the server responds.
        alive: when it last returned a caption, in `time.monotonic` seconds.
        dead: when it last failed to answer the trial request.
    """

    slots: BoundedSemaphore
    lock: Lock = field(default_factory=Lock)
    alive: float = -math.inf
    dead: float = -math.inf


@cache
def _state_of(url: str, model: str, concurrency: int) -> _State:
    return _State(BoundedSemaphore(concurrency))


@dataclass(frozen=True)
class Trial:
    """A request that any server with a suitable model can answer.

    Attributes:
        what: it asks for, such as "caption a trial picture"; for messages.
        content: returns the content of its message.
    """

    what: str
    content: Callable[[], Any]


class Endpoint:
    """A model behind an OpenAI-compatible server.

    Args:
        settings: the captioner's entry in params.yaml.
        place: of this entry, such as "caption.captioners.llava"; for messages.
        compute: requests in flight, time-out and retries.
        trial: the request that shows whether the server works.

    Attributes:
        usage: tokens of the request and of the answer, as the server counted them, for each of the latest answers.

    Raises:
        ValueError: the key would be sent unencrypted to another machine.
    """

    def __init__(
        self,
        settings: EndpointCaptionerConfig | EndpointRewriterConfig,
        place: str,
        compute: CaptionerCompute,
        trial: Trial,
    ) -> None:
        self.usage: deque[tuple[int, int]] = deque(maxlen=_USAGE)
        self._settings = settings
        self._place = place
        self._compute = compute
        self._trial = trial
        self._checked = False
        # A warning would come too late: a key sent in clear text is compromised.
        if _key() != NO_KEY and settings.url.startswith("http:") and not _is_loopback(settings.url):
            raise ValueError(
                f"{place}: {settings.url} is plain http to another machine, so others on the network could read "
                f"the key; use https or an ssh tunnel to 127.0.0.1, or set {KEYS[0]}={NO_KEY} to send no key"
            )

    @property
    def _state(self) -> _State:
        return _state_of(self._settings.url, self._settings.model, self._compute.concurrency)

    def open(self) -> EndableClient:
        """Opens a client of the server. Nothing is sent."""
        import httpx2

        from lotlip.caption.endpoint.client import EndableClient, EndableTransport

        # Redirects are not followed: they would send pictures and key to an address that the user did not configure.
        transport = EndableTransport(
            limits=httpx2.Limits(max_connections=self._compute.concurrency + 1),
            event_hooks={"response": [_refuse_broken_answers]},
            trust_env=not _is_loopback(self._settings.url),  # a proxy's loopback is another machine's
            follow_redirects=False,
        )
        wait = self._compute.timeout_seconds
        timeout = httpx2.Timeout(wait, connect=min(wait, CONNECT_SECONDS))
        return EndableClient(
            base_url=self._settings.url,
            api_key=_key(),
            timeout=timeout,
            max_retries=self._compute.retries,
            http_client=transport,
        )

    def send(self, client: openai.OpenAI, content: Any) -> ChatCompletion:
        """Sends one message and returns the answer.

        Raises:
            openai.APIError: there is none after all retries.
        """
        messages: Any = [{"role": "user", "content": content}]
        settings = self._settings
        with self._state.slots:
            answer = client.chat.completions.create(model=settings.model, messages=messages, **settings.decoding)
        self._state.alive = time.monotonic()
        if answer.usage:
            self.usage.append((answer.usage.prompt_tokens, answer.usage.completion_tokens))
        return answer

    def check(self) -> None:
        """On the first call, checks that the server serves the model and answers the trial request.

        Raises:
            NonRetryableError: it cannot be reached, rejects the key, or does not serve the model.
            ConnectionError: it fails for a reason that may be temporary.
        """
        import openai

        with self._state.lock:
            if self._checked:
                return
            with self.open() as client:
                models = self._models(client)
                try:
                    self.send(client, self._trial.content())
                except openai.APIError as error:
                    raise self.unusable(error, models) from None
            self._checked = True

    def check_alive(self, client: openai.OpenAI, failed: float, reason: str) -> None:
        """Checks that the server still answers after a failure.

        If several requests fail at once, one of their threads sends the trial request and the others use its result.

        Args:
            client: sends the trial request.
            failed: when the request failed, in `time.monotonic` seconds.
            reason: of the failure, for the message.

        Raises:
            ConnectionError: the server is down.
        """
        import openai

        state = self._state
        with state.lock:
            if state.alive < failed and state.dead < failed:
                try:
                    self.send(client, self._trial.content())
                except openai.APIError as error:
                    if fault_of(error) != "server":
                        raise self.unusable(error) from None
                    state.dead = time.monotonic()
            if state.alive < failed:
                raise ConnectionError(
                    f"{self._settings.url} no longer returns captions: {reason}; check the server's log and restart "
                    "it, then rerun the stage: finished units are kept"
                )

    def served_models(self) -> list[str]:
        """The models that the server lists; none if it has no list.

        Raises:
            ConnectionError: nothing responds there.
            NonRetryableError: it rejects the key.
        """
        import openai

        with self.open() as client:
            try:
                return _list_models(client)
            except openai.APIConnectionError as error:
                reason = error_text(error)
                raise ConnectionError(f"{self._settings.url} does not respond: {reason}") from None
            except openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    raise self.unusable(error) from None
                return []

    def _models(self, client: openai.OpenAI) -> list[str] | None:
        """The models that the server lists; None if it cannot list them.

        Raises:
            NonRetryableError: it cannot be reached, rejects the key, or lists other models.
        """
        import openai

        url, model = self._settings.url, self._settings.model
        try:
            models = _list_models(client)
        except openai.APIConnectionError as error:
            raise NonRetryableError(
                f"{url} does not respond: {error_text(error)}; start the server there, or correct `url` of "
                f"{self._place} in params.yaml"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self.unusable(error) from None
            return None  # `transformers serve` fails here without a cache; the trial request is a better test
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

    def unusable(self, error: openai.APIError, models: list[str] | None = None) -> Exception:
        """The error for a server that cannot be used; `NonRetryableError` if the user must fix something.

        Args:
            error: of a request, after all retries.
            models: that the server lists, if it was asked.
        """
        url, reason = self._settings.url, error_text(error)
        if getattr(error, "status_code", None) in (401, 403):
            rejected = "the key in the environment" if _key() != NO_KEY else "requests without a key"
            return NonRetryableError(
                f"{url} rejects {rejected}: {reason}; set {KEYS[0]} in the environment to the server's key"
            )
        listed = "" if models is None else f" (it lists: {_join_names(models)})"
        if fault_of(error) == "server":
            return ConnectionError(
                f"{url} cannot {self._trial.what} with {self._settings.model!r}{listed}: {reason}; check the server's "
                "log"
            )
        return NonRetryableError(
            f"{url} does not accept requests for {self._settings.model!r}{listed}: {reason}; set `url`, `model` and "
            f"`max_tokens` of {self._place} in params.yaml to what it serves, set parameters that it does not accept "
            "to null, or start it with that model"
        )


def error_text(error: openai.APIError) -> str:
    """An error's message, with its cause for a lost connection."""
    status = getattr(error, "status_code", None)
    if status is None:
        return clean(f"{error} ({error.__cause__})" if error.__cause__ else str(error))
    body = error.body
    if isinstance(body, dict):  # OpenAI's format, or FastAPI's
        body = body.get("message") or body.get("detail") or body
    return clean(f"status {status}: {body}" if body else f"status {status}")


def clean(text: str) -> str:
    """A server's text for messages and tables: one short line without the key, which some servers repeat."""
    key = _key()
    line = " ".join((text if key == NO_KEY else text.replace(key, "…")).split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"


def fault_of(error: openai.APIError) -> Literal["image", "server", "setup"]:
    """What is at fault when a request fails after all retries."""
    status = getattr(error, "status_code", None)  # None: no complete response arrived
    if status is None or status >= 500 or status in (408, 409, 425, 429):
        return "server"
    return "image" if status in (400, 413, 415, 422) else "setup"


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
