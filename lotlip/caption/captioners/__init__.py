"""Who writes the long captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from lotlip.caption.config import CaptionerConfig
from lotlip.core.compute import CAPTIONER_DEFAULTS, CaptionerCompute
from lotlip.core.variants import implementation
from lotlip.data.records import Caption, Failure, ImageRecord

_BUILT_IN = {
    "scenes": "lotlip.demo.captioner:SceneCaptioner",
    "table": "lotlip.caption.captioners.table:TableCaptioner",
    "endpoint": "lotlip.caption.captioners.endpoint:EndpointCaptioner",
    "transformers": "lotlip.caption.captioners.transformers:TransformersCaptioner",
}


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
    name: str, settings: CaptionerConfig, tokenizer: str, compute: CaptionerCompute = CAPTIONER_DEFAULTS
) -> Captioner:
    """The captioner that `caption.captioners.<name>` of params.yaml describes.

    Args:
        name: what its captions are filed under.
        settings: its entry.
        tokenizer: whose word pieces are counted.
        compute: how it works: `compute.captioners.<name>`.

    Raises:
        ValueError: its file, its model, its server's address or the tokenizer cannot be used. No server is asked yet.
    """
    from lotlip.data.tokenizer import count_tokens

    made = implementation("lotlip.captioners", settings.kind, _BUILT_IN)
    return made(name, settings, count_tokens(tokenizer), compute)
