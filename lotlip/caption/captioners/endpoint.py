"""Captions, or rewrites of captions, from a model behind an OpenAI-compatible server (vLLM, SGLang, and others)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from lotlip.caption.captioners.rewriting import question, rewrite_in
from lotlip.caption.config import EndpointCaptionerConfig, EndpointRewriterConfig
from lotlip.caption.endpoint.messages import data_url, has_reasoning_field, text_of, trial_picture
from lotlip.caption.endpoint.server import Endpoint, Trial, clean, error_text, fault_of
from lotlip.caption.reasoning import cut_reasoning
from lotlip.core.compute import CAPTIONER_DEFAULTS, CaptionerCompute
from lotlip.data.images import decode_rgb
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.text import has_words, split_sub_captions

if TYPE_CHECKING:
    import openai


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
        endpoint: the server.

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
        self._concurrency = compute.concurrency
        self.settings = settings
        self.prompt = settings.prompt
        self.revision = f"{settings.model}@{settings.revision}"
        self.about: dict[str, Any] = {
            "kind": settings.kind,
            "model": settings.model,
            "revision": settings.revision,
            "prompt": settings.prompt,
            "decoding": settings.decoding,
        }
        self._name = name
        self._count_tokens = count_tokens
        self._place = f"caption.captioners.{name}"
        self.endpoint = Endpoint(settings, self._place, compute, Trial(self.trial, self._trial_request))

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption or failure for each image, in order.

        Up to twice `concurrency` images are in memory, so that a slow one does not block others.

        Raises:
            NonRetryableError: the server cannot be used with these settings.
            ConnectionError: the server is down, or too busy for a single caption; retry the unit later.
        """
        self.endpoint.check()
        concurrency = self._concurrency
        window: deque[Future[Caption | Failure]] = deque()
        pool, client = ThreadPoolExecutor(concurrency, f"caption-{self._name}"), self.endpoint.open()
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

    # --- what is sent ------------------------------------------------------------------------------------------------

    def _request(self, record: ImageRecord) -> Any:
        """The content of the message for an image.

        Raises:
            ValueError: the image cannot be read.
        """
        return self._about_image(data_url(record.image))

    def _trial_request(self) -> Any:
        """The content of a message that any server with a suitable model can answer."""
        return self._about_image(trial_picture())

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
            choice = self.endpoint.send(client, request).choices[0]
        except openai.APIError as error:
            return self._image_failure(client, record, error)
        finish_reason = str(choice.finish_reason)
        try:
            content, refusal = text_of(choice.message)
        except TypeError as error:  # a retry would cost as much and give the same
            return _failure(record, f"{self._name} gave a malformed answer: {error}", "malformed")
        if finish_reason == "content_filter" or refusal:
            words = refusal or "its content filter stopped the caption"
            return _failure(record, f"{self._name} refused the {self.asked}: {clean(words)}", "refused")
        answer = cut_reasoning(content)
        text = self._text(answer)
        sub_captions = split_sub_captions(text)
        if not has_words(text):
            reasoned = answer != content.strip() or has_reasoning_field(choice.message)
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

    def _image_failure(self, client: openai.OpenAI, record: ImageRecord, error: openai.APIError) -> Failure:
        """The failure of an image, if the image is at fault, or the server with this image only; raises otherwise."""
        failed, fault, reason = time.monotonic(), fault_of(error), error_text(error)
        if fault == "setup":
            raise self.endpoint.unusable(error) from None
        try:
            self._check_readable(record)
        except ValueError as unreadable:
            return _failure(record, str(unreadable), "unreadable")
        if fault == "server":
            self.endpoint.check_alive(client, failed, reason)
            return _failure(record, f"the server failed with this {self.asked} at every attempt: {reason}", "server")
        if error.code in ("content_filter", "content_policy_violation"):
            return _failure(record, f"{self._name} refused the {self.asked}: {reason}", "refused")
        return _failure(record, f"the server does not accept the {self.asked}: {reason}", "rejected")


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
        ValueError: the address or the key cannot be used.
        ConnectionError: nothing responds there.
    """
    about = {"kind": "endpoint", "path": __file__, "url": url, "model": "any", "revision": "any"}
    return EndpointCaptioner("init", EndpointCaptionerConfig.model_validate(about), len).endpoint.served_models()


def _failure(record: ImageRecord, reason: str, kind: str) -> Failure:
    return Failure(key=record.key, where=record.key, reason=reason, kind=kind)
