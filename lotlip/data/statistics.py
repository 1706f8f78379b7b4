"""Statistics of texts: their lengths, as in the paper's Table 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lotlip.data.text import SentenceEnds, split_sub_captions

# Characters tokenised at once: enough for all cores, and little memory whatever the texts' lengths.
_BATCH = 1 << 18


@dataclass(frozen=True)
class Statistics:
    """Sums over texts; adding two of them gives the sums over all their texts.

    Attributes:
        texts: number of texts that are not empty.
        sub_captions: total number.
        tokens: total number of word pieces.
        empty: number of empty texts, which the other sums skip.
    """

    texts: int = 0
    sub_captions: int = 0
    tokens: int = 0
    empty: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.texts + other.texts,
            self.sub_captions + other.sub_captions,
            self.tokens + other.tokens,
            self.empty + other.empty,
        )

    @property
    def sub_captions_per_text(self) -> float:
        """Mean; 0 if there are no texts."""
        return self.sub_captions / max(self.texts, 1)

    @property
    def tokens_per_text(self) -> float:
        """Mean; 0 if there are no texts."""
        return self.tokens / max(self.texts, 1)

    def to_json(self) -> dict[str, Any]:
        """The numbers of the paper's Table 1."""
        names = ("texts", "sub_captions_per_text", "tokens_per_text")
        return {name: getattr(self, name) for name in names}


def text_statistics(texts: Iterable[str], tokenizer: str, sentence_ends: SentenceEnds = "released") -> Statistics:
    """Counts texts, sub-captions and word pieces; memory does not grow with the number of texts.

    Args:
        texts: captions; "" is a missing one.
        tokenizer: name of a bundled vocabulary, or path of a tokenizer.
        sentence_ends: splits texts into sub-captions; tokens are counted on the whole text.

    Raises:
        ValueError: there is no such tokenizer.
    """
    from lotlip.data.tokenizer import token_counts

    total = Statistics()
    for batch in _batches(texts):
        present = [text for text in batch if text]
        sub_captions = sum(len(split_sub_captions(text, sentence_ends)) for text in present)
        total += Statistics(
            len(present), sub_captions, sum(token_counts(tokenizer, present)), len(batch) - len(present)
        )
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_BATCH` characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text) + 1
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    yield batch
