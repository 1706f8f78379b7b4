"""Who writes the long captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol

from lotlip.caption.config import (
    CaptionerConfig,
    EndpointCaptionerConfig,
    SceneCaptionerConfig,
    TransformersCaptionerConfig,
)
from lotlip.core.compute import CaptionerCompute
from lotlip.data.records import Caption, Failure, ImageRecord


class Captioner(Protocol):
    """Describes images in detail.

    Attributes:
        prompt: what is asked for each image; empty where nothing is asked.
    """

    prompt: str

    @property
    def revision(self) -> str:
        """Of the model or the table behind it; every caption carries it."""

    @property
    def about(self) -> dict[str, Any]:
        """All that decides a caption's text besides the image, as plain JSON.

        Captions written under another prompt, model, revision or way of decoding are kept apart.
        """

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption for each image, or why there is none: one for one, in their order."""


def open_captioner(
    name: str, settings: CaptionerConfig, tokenizer: str, compute: CaptionerCompute | None = None
) -> Captioner:
    """The captioner that `caption.captioners.<name>` of params.yaml describes.

    Args:
        name: what its captions are filed under.
        settings: its entry.
        tokenizer: whose word pieces are counted.
        compute: how it works: `compute.captioners.<name>`; None: the defaults.

    Raises:
        ValueError: its file, its model, its server's address or the tokenizer cannot be used. No server is asked yet.
    """
    from lotlip.data.tokenizer import count_tokens

    if isinstance(settings, SceneCaptionerConfig):
        return import_module("lotlip.demo.captioner").SceneCaptioner(name, settings, count_tokens(tokenizer))

    if isinstance(settings, EndpointCaptionerConfig):
        from lotlip.caption.captioners.endpoint import EndpointCaptioner

        return EndpointCaptioner(name, settings, count_tokens(tokenizer), compute or CaptionerCompute())

    if isinstance(settings, TransformersCaptionerConfig):
        from lotlip.caption.captioners.transformers import TransformersCaptioner

        return TransformersCaptioner(name, settings, count_tokens(tokenizer), compute or CaptionerCompute())

    from lotlip.caption.captioners.table import TableCaptioner

    return TableCaptioner(name, settings, count_tokens(tokenizer))
