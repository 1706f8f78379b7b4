"""Measures captions without looking at images, applies the rules that drop captions, and detects swapped captions."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from lotlip.caption.config import QualityConfig
from lotlip.caption.reasoning import reasoning
from lotlip.data.records import Caption, Failure, MeasuredCaption

NGRAM = 4  # words; ordinary lists of similar things repeat many trigrams
NEIGHBOURS = 4  # images with whose short captions a caption is compared; the mean of several varies less

# Scripts without spaces between words. Each Chinese or Japanese character counts as a word, and so does each run of up
# to four letters of Thai, Lao, Burmese or Khmer.
_CHARACTERS = "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = "\u0e01-\u0e4e\u0e81-\u0ecd\u1000-\u109f\u1780-\u17d3"
_LETTER = rf"(?![{_CHARACTERS}{_UNSPACED}])\w"  # of any other script
_WORD = re.compile(rf"[{_CHARACTERS}]|[{_UNSPACED}]{{1,4}}|(?:{_LETTER})+(?:['’-](?:{_LETTER})+)*")
_LETTERS = re.compile(r"[^\W\d_]+")
_NO_ENDS = re.compile(r"[\u0e01-\u0eff]\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # tab, newline and carriage return do not count
_CLOSING = (".", "!", "?", "…", "。", "．", "｡", "！", "？", "।", "؟", "۔")
_AFTER_CLOSING = "\"'”’»)]*_」』）】 \t\r\n\u3000"  # quotes, brackets and Markdown markup
_SUFFIXES = ("ing", "ed")

ENOUGH_PAIRS = 10  # captions in a partition that are needed to decide whether they were swapped

# --- measures of a caption ----------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """A text's words in lower case; in scripts without spaces between words, pieces of about a word or less.

    >>> words_of("A well-kept dog."), words_of("一只狗 A"), len(words_of("สุนัขวิ่งอยู่"))
    (['a', 'well-kept', 'dog'], ['一', '只', '狗', 'a'], 4)
    """
    return _WORD.findall(text.casefold())


def repetition(words: Sequence[str]) -> float:
    """Share of a text's `NGRAM`-grams that occurred earlier in it; 0 if it has none."""
    runs = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_truncated(text: str, finish_reason: str) -> bool:
    """Whether the caption was cut off, or its last sentence has no end. Thai and Lao do not mark ends."""
    last = text.rstrip(_AFTER_CLOSING)
    return finish_reason == "length" or not (last.endswith(_CLOSING) or _NO_ENDS.search(last))


def mojibake(text: str) -> int:
    """Number of lost characters, and of places that ftfy recognises as decoded with the wrong encoding."""
    from ftfy.badness import badness

    return badness(text) + text.count("\ufffd")


def refusal(text: str) -> str:
    """The first phrase of `refusals.txt` in the text, by which a model declines to describe the image; "" if none."""
    plain = " ".join(text.casefold().replace("’", "'").split())
    match = _refusals().search(plain)
    return match[0] if match else ""


@lru_cache(maxsize=1)
def _refusals() -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, _lines("refusals.txt"))) + r")\b")


def _lines(name: str) -> list[str]:
    """The lines of a text file beside this module."""
    return (files("lotlip.caption") / name).read_text(encoding="utf-8").splitlines()


def content_words(text: str) -> frozenset[str]:
    """A text's words without case, accents and common endings, excluding numbers and `stop_words.txt`."""
    plain = text.casefold()
    if not plain.isascii():  # most texts are, and looking at each letter takes a fifth of all measures' time
        letters = unicodedata.normalize("NFKD", plain)
        plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return frozenset(_stem(word) for word in _LETTERS.findall(plain) if len(word) > 1 and word not in _stop_words())


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    """Words that say nothing about a picture's content, including words for the picture itself."""
    return frozenset(_lines("stop_words.txt"))


def _stem(word: str) -> str:
    """A word without the ending of a plural or a verb: houses and house are the same, and so are smiling and smiles."""
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
        if word.endswith(("she", "che", "xe", "sse", "zze")):
            word = word[:-1]
    for suffix in _SUFFIXES:
        stem = word.removesuffix(suffix)
        if stem != word and len(stem) > 2 and re.search("[aeiouy]", stem):
            doubled = stem[-1] == stem[-2] and stem[-1] not in "lsz"
            word = stem[:-1] if doubled else stem
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def agreement(of: frozenset[str], words: frozenset[str]) -> float | None:
    """Share of the words `of` a short caption that are among a caption's `words`; None if it has no words."""
    return len(of & words) / len(of) if of else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def measure(
    caption: Caption, raw: frozenset[str], neighbours: Sequence[frozenset[str]], rewrite: bool = False
) -> MeasuredCaption:
    """Measures a caption.

    Args:
        caption: to measure.
        raw: content words of its image's short caption.
        neighbours: content words of the next images' short captions.
        rewrite: whether it rewords the short caption, and so needs no full stop at its end.
    """
    words = words_of(caption.text)
    content = content_words(caption.text)
    pairs = [(raw - other, other - raw) for other in neighbours]
    pairs = [(own, other) for own, other in pairs if own and other]
    return MeasuredCaption(
        **vars(caption),
        words=len(words),
        repetition=repetition(words),
        truncated=caption.finish_reason == "length" if rewrite else is_truncated(caption.text, caption.finish_reason),
        control=len(_CONTROL.findall(caption.text)),
        mojibake=mojibake(caption.text),
        refusal=refusal(caption.text),
        reasoning=reasoning(caption.text),
        agreement=agreement(raw, content),
        own_agreement=_mean([agreement(own, content) for own, _ in pairs]),
        next_agreement=_mean([agreement(other, content) for _, other in pairs]),
    )


def measured(
    captions: Iterable[Caption], short_captions: Mapping[str, str], rewrites: bool = False
) -> Iterator[MeasuredCaption]:
    """Measures each caption.

    Args:
        captions: of a partition.
        short_captions: key → short caption of all the partition's images, in order; the first follows the last.
        rewrites: whether the captions reword the short ones.
    """
    words = [content_words(text) for text in short_captions.values()]
    places = {key: place for place, key in enumerate(short_captions)}
    for caption in captions:
        place = places[caption.key]
        following = [words[(place + step) % len(words)] for step in range(1, NEIGHBOURS + 1)]
        yield measure(caption, words[place], following, rewrites)


# --- rules --------------------------------------------------------------------------------------------------------

RULES = tuple(QualityConfig.model_fields)  # in the order in which they are applied


def broken_rule(caption: MeasuredCaption, rules: QualityConfig) -> Failure | None:
    """Why a caption is dropped, by the first rule that it breaks; None if it breaks none."""
    for rule in RULES:
        limit = getattr(rules, rule)
        reason = None if limit is None or limit is False else _breaks(rule, caption, limit)
        if reason:
            return Failure(caption.key, caption.captioner, reason, rule)
    return None


def _breaks(rule: str, caption: MeasuredCaption, limit: Any) -> str | None:
    """How a caption breaks a rule, with the number and the limit; None if it does not."""
    match rule:
        case "refusal":
            return f'refuses: "{caption.refusal}"' if caption.refusal else None
        case "reasoning":
            return f'shows reasoning: "{caption.reasoning}"' if caption.reasoning else None
        case "truncated":
            ended = f"after {caption.words} words, finish reason {caption.finish_reason!r}"
            return f"is cut off {ended}" if caption.truncated else None
        case "control":
            return _over(caption.control, limit, "control characters")
        case "mojibake":
            return _over(caption.mojibake, limit, "places of mojibake")
        case "long":
            return _over(caption.words, limit, "words")
        case "short":
            return f"{caption.words} words, fewer than {limit}" if caption.words < limit else None
        case "repetition":
            repeated = f"{caption.repetition:.3g} of its {NGRAM}-grams are repeated, more than {limit:g}"
            return repeated if caption.repetition > limit else None
        case "disagreement":
            low = caption.agreement is not None and caption.agreement < limit
            return f"has {caption.agreement:.3g} of the short caption's words, less than {limit:g}" if low else None
    raise AssertionError(f"the rule {rule} is not implemented")


def _over(number: int, limit: int, what: str) -> str | None:
    return f"{number} {what}, more than {limit}" if number > limit else None


def assess(captions: Iterable[MeasuredCaption], rules: QualityConfig) -> Iterator[MeasuredCaption | Failure]:
    """Replaces each caption that breaks a rule by a failure."""
    for caption in captions:
        yield broken_rule(caption, rules) or caption


# --- statistics of a captioner ------------------------------------------------------------------------------------

SUMMARISED = ("words", "repetition", "agreement")
QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}


def summarise(tables: Iterable[pd.DataFrame], failure_kinds: Mapping[str, int]) -> dict[str, Any]:
    """Statistics of a captioner's captions: means and quantiles of `SUMMARISED`, and counts of dropped captions.

    Values are rounded to a thousandth and counted, so memory does not grow with the captions.

    Args:
        tables: captions of the partitions, one partition at a time.
        failure_kinds: kind → number of the stage's failures; those in `RULES` are dropped captions.

    Returns:
        "captions" (including dropped ones), "filtered" (rule → number), "truncated_share" of the kept captions, and
        for each of `SUMMARISED` "mean" and `QUANTILES`, None if no caption has the value.
    """
    counts: dict[str, Counter[float]] = {name: Counter() for name in SUMMARISED}
    kept = truncated = 0
    for table in tables:
        kept += len(table)
        truncated += int(table["truncated"].sum())
        for name, counter in counts.items():
            counter.update(table[name].dropna().astype(float).round(3).tolist())
    filtered = {rule: failure_kinds.get(rule, 0) for rule in RULES}
    return {
        "captions": kept + sum(filtered.values()),
        "filtered": filtered,
        "truncated_share": truncated / kept if kept else 0.0,
        **{name: _distribution(counter) for name, counter in counts.items()},
    }


def _distribution(counter: Counter[float]) -> dict[str, float | None]:
    if not counter:
        return dict.fromkeys(["mean", *QUANTILES])
    values = np.array(sorted(counter))
    below = np.cumsum([counter[value] for value in values])
    total = int(below[-1])
    quantiles: dict[str, float | None] = {
        name: float(values[np.searchsorted(below, max(math.ceil(share * total), 1))])
        for name, share in QUANTILES.items()
    }
    return {"mean": round(math.fsum(value * count for value, count in counter.items()) / total, 4), **quantiles}


@dataclass(frozen=True)
class Agreement:
    """How well captions agree with the short captions of their own images, and with those of the next images.

    Only words that the two short captions do not share are compared, so near-identical pictures do not count at all,
    instead of distorting the result. `a + b` is the agreement of both sets of captions.

    Attributes:
        pairs: number of captions for which both short captions have such words.
        own, following: sums of the shares of these words that the captions contain.
        own_squares, following_squares, products: sums of squares and products, for the variance.
    """

    pairs: int = 0
    own: float = 0.0
    following: float = 0.0
    own_squares: float = 0.0
    following_squares: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, table: pd.DataFrame) -> Agreement:
        """Agreement of a partition's captions, from the columns own_agreement and next_agreement."""
        both = table[["own_agreement", "next_agreement"]].astype(float).dropna().to_numpy()
        own, following = both[:, 0], both[:, 1]
        sums = (own, following, own * own, following * following, own * following)
        return cls(len(both), *(float(part.sum()) for part in sums))

    def __add__(self, other: Agreement) -> Agreement:
        ours, theirs = asdict(self), asdict(other)
        return Agreement(**{name: ours[name] + theirs[name] for name in ours})

    def is_own(self, ratio: float, errors: float = 3.0) -> bool | None:
        """Whether captions agree at least `ratio` times as well with their own images' short captions.

        Swapped captions agree equally well with both, up to noise. False only if noise of that many standard errors
        does not explain it; None if neither is certain: few captions, or short captions that say little.
        """
        if self.pairs < ENOUGH_PAIRS:  # too few to estimate the variance
            return None
        mean = (self.own - ratio * self.following) / self.pairs
        squares = self.own_squares - 2 * ratio * self.products + ratio**2 * self.following_squares
        variance = max(squares / self.pairs - mean**2, 0.0) * self.pairs / (self.pairs - 1)
        error = errors * math.sqrt(variance / self.pairs)
        if mean > error:
            return True
        return False if mean < -error else None

    def __str__(self) -> str:
        if not self.pairs:
            return "no short captions that differ in their words"
        own, following = self.own / self.pairs, self.following / self.pairs
        return (
            f"{own:.0%} of their own short captions' words, {following:.0%} of the next ones' ({self.pairs} captions)"
        )
