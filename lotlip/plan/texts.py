"""Mean lengths of the texts of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lotlip.data.text import Sampler
from lotlip.pretrain.config import PretrainConfig

# Defaults without shards: word pieces of a short caption, and of a sub-caption including its full stop.
SHORT_TOKENS, SUB_CAPTION_TOKENS = 10, 20


@dataclass(frozen=True)
class TextLengths:
    """Mean lengths in tokens, including special and corner tokens.

    Attributes:
        short: tokens of a short caption.
        long: tokens of a long text.
        per_image: long texts per image and step (K).
    """

    short: float
    long: float
    per_image: int

    @property
    def tokens(self) -> float:
        """Tokens per sample."""
        return self.short + self.per_image * self.long


def text_lengths(
    config: PretrainConfig, statistics: Mapping[str, Any], assumed: list[str] | None = None
) -> TextLengths:
    """Estimates the mean lengths of texts in a step; a [SEP] replaces each full stop.

    Args:
        config: training settings of the ablation.
        statistics: statistics of the shards: "raw" or captioner → sub_captions_per_text, tokens_per_text; empty without
            shards.
        assumed: receives assumptions for missing statistics.

    Raises:
        ValueError: the ablation uses captions that the shards do not have.
    """
    text, long_texts = config.text, config.long_texts
    fixed = 1 + text.corner_tokens + text.register_tokens
    if not statistics and assumed is not None:
        assumed.append(
            f"{SHORT_TOKENS} word pieces per short caption, {SUB_CAPTION_TOKENS} per sub-caption (there are no shards)"
        )
    short = statistics["raw"]["tokens_per_text"] if statistics else SHORT_TOKENS
    window = float(long_texts.sub_captions * SUB_CAPTION_TOKENS)
    captioners = long_texts.captioners or [name for name in statistics if name != "raw"]
    if missing := [name for name in captioners if statistics and name not in statistics]:
        available = ", ".join(name for name in statistics if name != "raw") or "none"
        raise ValueError(
            f"long_texts.captioners names {', '.join(missing)}, but the shards have captions by {available}; "
            "rewrite the shards (`dvc repro shard`) or remove these captioners"
        )
    if statistics and captioners:
        sampler, sub_captions = long_texts.sampler, long_texts.sub_captions
        window = fmean(_window(statistics[name], sampler, sub_captions) for name in captioners)
        of_short = config.short_texts.sampler
        if of_short != "raw" and of_short != "raw-or-rewrite":  # rewrites are about as long as short captions
            short = fmean(_window(statistics[name], of_short, 1) for name in captioners)
    limit = text.context_length
    per_image = long_texts.per_image if long_texts.sub_captions else 0
    return TextLengths(min(fixed + short + 1, limit), min(fixed + window, limit), per_image)


def _window(statistics: Mapping[str, float], sampler: Sampler, window: int) -> float:
    """Mean tokens of a text from a long caption, which is at most the whole caption."""
    sentences = max(statistics["sub_captions_per_text"], 1)
    drawn: dict[Sampler, float] = {
        "window": window,
        "merged": (window + 1) / 2,
        "all": sentences,
        "first": (sentences + 1) / 2,
        "without-first": max(sentences / 2, 1),
        "summary": 1,
        "details": max(sentences - 1, 1),
        "subset": (sentences + 1) / 2,
    }
    return statistics["tokens_per_text"] * min(drawn[sampler] / sentences, 1)
