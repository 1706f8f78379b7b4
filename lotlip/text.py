"""Captions as text: sub-captions, windows of them, and their statistics. The one copy for every caller."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

# Sentence ends as the method's release splits them: newline, `</s>` and the full stop.
_ENDS = re.compile(r"\n|</s>|\.")

Window = Literal["within-caption", "across-captions"]


def split_sub_captions(text: str) -> list[str]:
    """Splits a caption into its sub-captions (sentences), stripped, empty ones dropped (paper, section 3.1).

    >>> split_sub_captions("A red bicycle. It leans on a wall.")
    ['A red bicycle', 'It leans on a wall']
    """
    return [part for part in (part.strip() for part in _ENDS.split(text)) if part]


def has_words(text: str) -> bool:
    """Whether a sub-caption of the text has a letter or a digit of any script; signs and emoji alone are no words.

    >>> has_words("A dog."), has_words("..."), has_words("一只狗"), has_words("</s>")
    (True, False, True, False)
    """
    return any(character.isalnum() for part in split_sub_captions(text) for character in part)


def join_sub_captions(sub_captions: Sequence[str]) -> str:
    """Joins sub-captions into one text; `split_sub_captions` undoes it."""
    return ". ".join(sub_captions)


def sample_window(
    captions: Mapping[str, Sequence[str]],
    length: int,
    rng: random.Random,
    window: Window = "within-caption",
) -> list[str]:
    """Draws a long text: `length` consecutive sub-captions of an image's long captions (paper, Figs. 2 and 5).

    Args:
        captions: captioner's name → the sub-captions it wrote, in order. Order of names does not matter.
        length: sub-captions in the text; a caption with fewer gives all it has.
        rng: where chance comes from.
        window: "within-caption" first chooses one captioner, then a window inside its caption, so that a
            text has one author. "across-captions" puts all captions in a row, in the order of their names, and
            lets the window cross from one into the next, as the authors' earlier code does. The paper does not say.

    Raises:
        ValueError: no captioner wrote anything, or `length` < 1.
    """
    if length < 1:
        raise ValueError(f"a window has at least 1 sub-caption, not {length}")
    texts = [list(captions[name]) for name in sorted(captions) if captions[name]]
    if not texts:
        raise ValueError("no sub-captions to draw from: no captioner wrote anything for this image")
    row = rng.choice(texts) if window == "within-caption" else [part for text in texts for part in text]
    start = rng.randrange(max(len(row) - length, 0) + 1)
    return row[start : start + length]
