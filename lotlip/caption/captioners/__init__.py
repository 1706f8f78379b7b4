"""Captioners, which write the long captions, or reword the short ones."""

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
    "rewrite-scenes": "lotlip.demo.rewriter:SceneRewriter",
    "rewrite-endpoint": "lotlip.caption.captioners.endpoint:EndpointRewriter",
    "rewrite-transformers": "lotlip.caption.captioners.transformers:TransformersRewriter",
}


class Captioner(Protocol):
    """Describes images in detail.

    Attributes:
        prompt: sent with each image; empty if there is none.
    """

    prompt: str

    @property
    def revision(self) -> str:
        """The revision of the model or table behind the captioner; stored with every caption."""

    @property
    def about(self) -> dict[str, Any]:
        """Everything besides the image that decides a caption's text, as JSON.

        Captions with another prompt, model, revision or decoding are stored separately.
        """

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption or failure for each image, in order."""


def open_captioner(
    name: str, settings: CaptionerConfig, tokenizer: str, compute: CaptionerCompute = CAPTIONER_DEFAULTS
) -> Captioner:
    """Opens the captioner that `caption.captioners.<name>` of params.yaml describes.

    Args:
        name: of the captioner, stored with its captions.
        settings: its entry.
        tokenizer: that counts tokens.
        compute: its compute settings, `compute.captioners.<name>`.

    Raises:
        ValueError: its file, its model, its server's URL or the tokenizer cannot be used. No server is contacted yet.
    """
    from lotlip.data.tokenizer import count_tokens

    captioner = implementation("lotlip.captioners", settings.kind, _BUILT_IN)
    return captioner(name, settings, count_tokens(tokenizer), compute)
