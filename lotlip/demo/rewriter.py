"""Rewords the short captions of scenes by a grammar, as a text-only language model would (LaCLIP, arXiv 2305.20088)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lotlip.caption.config import SceneRewriterConfig
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.text import split_sub_captions
from lotlip.demo.world import COLOURS, PLACES, SALIENT_SIZES, SHAPES, TEXTURES, TIMES, with_articles

# Changes whenever the wording below changes.
REVISION = "rewrites-1"

# All words occur in the short captions or in those of `lotlip.demo.captioner`, so that rewrites add no word pieces to
# the training texts.
_FRAMES = (
    "a {thing}",
    "the {thing}",
    "one {thing}",
    "there is a {thing}",
    "the image shows a {thing}",
    "in the picture you can see a {thing}",
    "a view of the {thing}",
    "this is a picture of a {thing}",
    "the object in this image is a {thing}",
    "a {thing} can be seen",
    "a {thing} is shown",
)
_PATTERNS = {"striped": "with stripes", "dotted": "with dots", "checked": "with checks", "bordered": "with a border"}


class SceneRewriter:
    """Rewords short captions of scenes: another order, other function words, the same facts. The scene is not read.

    Attributes:
        revision: of the wording.
        prompt: that the rewriter claims to answer.
    """

    revision = REVISION
    prompt = "Rewrite this caption in other words."

    def __init__(
        self,
        name: str,
        config: SceneRewriterConfig,
        count_tokens: Callable[[str], int],
        _: object = None,  # how to work: there is nothing to choose
    ) -> None:
        self.name = name
        self.config = config
        self.count_tokens = count_tokens
        words = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.about = {**config.model_dump(mode="json", exclude={"path"}), "revision": REVISION, "module": words}

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A rewrite for each record, in order; a short caption that is not a scene's is a failure.

        A rewrite depends only on the seed, the captioner's name, and the record's key and short caption.
        """
        for record in records:
            yield self._caption(record)

    def _caption(self, record: ImageRecord) -> Caption | Failure:
        rng = random.Random(f"{self.config.seed}/{self.name}/{record.key}")
        text = reworded(record.short_caption, rng)
        if text is None:
            reason = f"{self.name} knows captions of generated scenes only; use another kind of captioner"
            return Failure(key=record.key, where=record.key, reason=reason, kind="missing")
        return Caption(
            key=record.key,
            captioner=self.name,
            text=text,
            sub_captions=split_sub_captions(text),
            tokens=self.count_tokens(text),
            finish_reason="stop",
            revision=self.revision,
            prompt=self.prompt,
        )


def reworded(caption: str, rng: random.Random) -> str | None:
    """Another caption with the same facts; None if the caption names no shape of the demo's world.

    >>> reworded("photo of red striped star at night", random.Random(0))
    'at night, a view of the red striped star'
    """
    words = caption.split()
    shape = next((word for word in words if word in SHAPES), None)
    if shape is None:
        return None
    adjectives = [word for word in words if word in COLOURS or word in SALIENT_SIZES or word in TEXTURES]
    rng.shuffle(adjectives)
    texture = next((word for word in adjectives if word in _PATTERNS), None)
    after = ""
    if texture is not None and rng.random() < 0.5:
        adjectives.remove(texture)
        after = f" {_PATTERNS[texture]}"
    sentence = rng.choice(_FRAMES).format(thing=" ".join([*adjectives, shape]) + after)
    where = " ".join(phrase for phrase in (*PLACES.values(), *TIMES.values()) if phrase in caption)
    if where:
        sentence = f"{where}, {sentence}" if rng.random() < 0.3 else f"{sentence} {where}"
    return with_articles(sentence)
