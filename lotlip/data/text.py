"""Sub-captions and windows of them, for every caller."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

Window = Literal["within-caption", "across-captions"]
CaptionSampler = Literal["first", "all", "without-first", "summary", "details", "subset"]  # of one long caption
Sampler = Literal["window", "merged", CaptionSampler]
ShortSampler = Literal["raw", "raw-or-rewrite", CaptionSampler]
SentenceEnds = Literal["released", "unicode"]
SubCaption = TypeVar("SubCaption")  # its words, or its number among those of a tar

# The inside of a character class: the characters with the property Sentence_Terminal of Unicode 16.0. They are listed
# because `re` does not know the property, and so that a saved tokenizer does not depend on a library's Unicode version.
_SENTENCE_TERMINAL = (
    "!.?\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b"
    "\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b4e\u1b4f"
    "\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d-\u1b7f\u1c3b\u1c3c\u1c7e\u1c7f\u2024\u203c\u203d\u2047-\u2049"
    "\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53\u2e54\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf"
    "\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe52\ufe56\ufe57\uff01\uff0e"
    "\uff1f\uff61\U00010a56\U00010a57\U00010f55-\U00010f59\U00010f86-\U00010f89\U00011047\U00011048"
    "\U000110be-\U000110c1\U00011141-\U00011143\U000111c5\U000111c6\U000111cd\U000111de\U000111df"
    "\U00011238\U00011239\U0001123b\U0001123c\U000112a9\U000113d4\U000113d5\U0001144b\U0001144c"
    "\U000115c2\U000115c3\U000115c9-\U000115d7\U00011641\U00011642\U0001173c-\U0001173e\U00011944"
    "\U00011946\U00011a42\U00011a43\U00011a9b\U00011a9c\U00011c41\U00011c42\U00011ef7\U00011ef8"
    "\U00011f43\U00011f44\U00016a6e\U00016a6f\U00016af5\U00016b37\U00016b38\U00016b44\U00016d6e\U00016d6f"
    "\U00016e98\U0001bc9f\U0001da88"
)

# The end of a sub-caption, by the value of `caption.sentence_ends`: regular expressions for `re` and for the tokenizers
# library. "released" is the method's released code.
SENTENCE_ENDS: dict[SentenceEnds, str] = {
    "released": r"(?:\n|</s>|\.)",
    "unicode": rf"(?:\n|</s>|[{_SENTENCE_TERMINAL}])",
}
_ENDS = {name: re.compile(pattern) for name, pattern in SENTENCE_ENDS.items()}


def as_sentence_ends(value: object, place: str) -> SentenceEnds:
    """Validates a stored value of `sentence_ends`; None, in files that predate the option, means "released".

    Args:
        value: as read from the file.
        place: the file, for the error message.

    Raises:
        ValueError: the value is neither None nor a key of `SENTENCE_ENDS`.
    """
    for name in SENTENCE_ENDS:
        if value == name or (value is None and name == "released"):
            return name
    raise ValueError(
        f"{place}: sentence_ends is {value!r}, not {' or '.join(SENTENCE_ENDS)}; update lotlip, or correct the file"
    )


def split_sub_captions(text: str, sentence_ends: SentenceEnds = "released") -> list[str]:
    """Splits a caption into its sub-captions (sentences), stripped, without empty ones (paper, section 3.1).

    The characters that end a sentence are dropped.

    Args:
        text: a caption.
        sentence_ends: what ends a sentence besides a newline and `</s>`: the full stop ("released"), or every
            character with Unicode's property Sentence_Terminal, such as `.`, `!`, `?`, `。` and `।` ("unicode").

    >>> split_sub_captions("A red bicycle. It leans on a wall.")
    ['A red bicycle', 'It leans on a wall']
    >>> split_sub_captions("一只狗。它在跑！", "unicode")
    ['一只狗', '它在跑']
    """
    return [part for part in (part.strip() for part in _ENDS[sentence_ends].split(text)) if part]


def has_words(text: str) -> bool:
    """Whether a sub-caption of the text has a letter or a digit of any script; punctuation and emoji are not words.

    >>> has_words("A dog."), has_words("..."), has_words("一只狗"), has_words("</s>")
    (True, False, True, False)
    """
    # "unicode" gives the same answer: no sentence terminator is a letter or a digit.
    return any(character.isalnum() for part in split_sub_captions(text) for character in part)


def join_sub_captions(sub_captions: Sequence[str]) -> str:
    """Joins sub-captions into one text; `split_sub_captions` reverses it for every value of `sentence_ends`."""
    return ". ".join(sub_captions)


def sample_texts(data: bytes, place: str, sentence_ends: SentenceEnds) -> tuple[list[str], dict[str, list[str]]]:
    """The sub-captions of a sample's short caption, and those of its long captions by captioner.

    Args:
        data: the sample's .json.
        place: the sample, for the error message.
        sentence_ends: splits the short caption; the long ones are stored split.

    Raises:
        ValueError: a text is missing, is not text or has no words.
    """
    try:
        info = json.loads(data)
        short, captions = split_sub_captions(info["raw"], sentence_ends), dict(info["captions"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{place}: its .json has not `raw`, a caption, and `captions`, lists by captioner ({error!r}); "
            "write the shard again"
        ) from error
    if not short:
        raise ValueError(
            f"{place}: its short caption {info['raw']!r} has no words; remove it, or write the shard again"
        )
    for name, parts in captions.items():
        if not all(isinstance(part, str) and split_sub_captions(part, sentence_ends) for part in parts):
            raise ValueError(
                f"{place}: a sub-caption of {name} has no words or is not text; remove it, or write the shard again"
            )
    return short, captions


def sample_long_text(
    captions: Mapping[str, Sequence[SubCaption]],
    sampler: Sampler,
    length: int,
    rng: random.Random,
    window: Window = "within-caption",
) -> list[SubCaption]:
    """Draws a long text from an image's long captions.

    Args:
        captions: captioner's name → its sub-captions, in order. The order of names does not matter.
        sampler: "window": `length` consecutive sub-captions (paper, Figs. 2 and 5). The others first draw a captioner.
            "all": its whole caption. "first": its first r sub-captions, r uniform (SmartCLIP, arXiv 2507.22264).
            "summary": its first sub-caption (Long-CLIP's release). "without-first": a uniform number of sub-captions
            after the first, in random order (DeBias-CLIP, arXiv 2602.22419). "details": all after the first, in order.
            "subset": a uniform number of any of them, in random order. These three give the whole caption if it has
            only one sub-caption. "merged": 1 to `length` sub-captions, uniform; half the time consecutive ones, else
            any, in random order (FLAIR, arXiv 2412.03561, with `length` 3).
        length: number of sub-captions of a window; a caption with fewer is used in full.
        rng: random number generator.
        window: "within-caption": a window lies in one caption, so that a text has one author. "across-captions":
            all captions are concatenated in the order of the captioners' names, and a window may cross from one into
            the next, as in the authors' earlier code. The paper does not specify this.

    Raises:
        ValueError: there are no sub-captions, or `length` < 1.
    """
    if length < 1:
        raise ValueError(f"a window must have at least 1 sub-caption, not {length}")
    if sampler == "window" and window == "across-captions":
        sequence = [part for text in _captions_of(captions) for part in text]
    else:
        sequence = draw_caption(captions, rng)
    if sampler == "merged":
        length = min(rng.randint(1, length), len(sequence))
        if rng.random() < 0.5:
            return rng.sample(sequence, length)
    elif sampler != "window":
        return sample_sub_captions(sequence, sampler, rng)
    start = rng.randrange(max(len(sequence) - length, 0) + 1)
    return sequence[start : start + length]


def draw_caption(captions: Mapping[str, Sequence[SubCaption]], rng: random.Random) -> list[SubCaption]:
    """Draws one of an image's long captions, each alike.

    Raises:
        ValueError: there are no sub-captions.
    """
    return rng.choice(_captions_of(captions))


def sample_sub_captions(sequence: list[SubCaption], sampler: CaptionSampler, rng: random.Random) -> list[SubCaption]:
    """Draws a text from one long caption, as `sample_long_text` does with the same sampler.

    >>> sample_sub_captions(["a", "b", "c", "d"], "without-first", random.Random(2))
    ['b']
    """
    if sampler == "first":
        return sequence[: rng.randint(1, len(sequence))]
    if sampler == "summary":
        return sequence[:1]
    if sampler == "all" or len(sequence) == 1:
        return sequence
    candidates = sequence if sampler == "subset" else sequence[1:]
    return candidates if sampler == "details" else rng.sample(candidates, rng.randint(1, len(candidates)))


def _captions_of(captions: Mapping[str, Sequence[SubCaption]]) -> list[list[SubCaption]]:
    texts = [list(captions[name]) for name in sorted(captions) if captions[name]]
    if not texts:
        raise ValueError("there are no sub-captions to draw from: no captioner wrote anything for this image")
    return texts
