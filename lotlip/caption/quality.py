"""What can be measured of a caption without its image, the rules that drop one, and whether captions were swapped."""

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

NGRAM = 4  # words; of three, ordinary lists of like things repeat many
NEIGHBOURS = 4  # images whose short captions a caption is held against; of several, the mean spreads less

# Scripts without blanks between words. A character of Chinese or Japanese counts as a word, and so do up to four
# letters of Thai, Lao, Burmese or Khmer.
_CHARACTERS = "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = "\u0e01-\u0e4e\u0e81-\u0ecd\u1000-\u109f\u1780-\u17d3"
_LETTER = rf"(?![{_CHARACTERS}{_UNSPACED}])\w"  # of any other script
_WORD = re.compile(rf"[{_CHARACTERS}]|[{_UNSPACED}]{{1,4}}|(?:{_LETTER})+(?:['’-](?:{_LETTER})+)*")
_LETTERS = re.compile(r"[^\W\d_]+")
_NO_ENDS = re.compile(r"[\u0e01-\u0eff]\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # a tab and the two ends of a line are none
_CLOSING = (".", "!", "?", "…", "。", "．", "｡", "！", "？", "।", "؟", "۔")
_AFTER_CLOSING = "\"'”’»)]*_」』）】 \t\r\n\u3000"  # quotes, brackets and Markdown's marks
_SUFFIXES = ("ing", "ed")

ENOUGH_PAIRS = 10  # captions of a partition, to say whether they were swapped

# --- a caption's measures -----------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """A text's words, in lower case; of scripts without blanks between words, pieces of about a word or less.

    >>> words_of("A well-kept dog."), words_of("一只狗 A"), len(words_of("สุนัขวิ่งอยู่"))
    (['a', 'well-kept', 'dog'], ['一', '只', '狗', 'a'], 4)
    """
    return _WORD.findall(text.casefold())


def repetition(words: Sequence[str]) -> float:
    """Share of a text's runs of `NGRAM` words that were there before; 0 where it has none."""
    runs = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_truncated(text: str, finish_reason: str) -> bool:
    """Whether the captioner was cut off, or the last sentence has no end. Thai and Lao do not mark ends."""
    last = text.rstrip(_AFTER_CLOSING)
    return finish_reason == "length" or not (last.endswith(_CLOSING) or _NO_ENDS.search(last))


def mojibake(text: str) -> int:
    """Places that look like text decoded by the wrong encoding, as ftfy tells them, and characters that were lost."""
    from ftfy.badness import badness

    return badness(text) + text.count("\ufffd")


def refusal(text: str) -> str:
    """The first phrase of `refusals.txt` in the text, by which a model says that it does not describe the image."""
    plain = " ".join(text.casefold().replace("’", "'").split())
    found = _refusals().search(plain)
    return found[0] if found else ""


@lru_cache(maxsize=1)
def _refusals() -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, _lines("refusals.txt"))) + r")\b")


def _lines(name: str) -> list[str]:
    """A list that is kept as data beside this module."""
    return (files("lotlip.caption") / name).read_text(encoding="utf-8").splitlines()


def content_words(text: str) -> frozenset[str]:
    """A text's words without case, accents and the usual endings; but for numbers and `stop_words.txt`."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return frozenset(_stem(word) for word in _LETTERS.findall(plain) if len(word) > 1 and word not in _stop_words())


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    """Words that say nothing of what is in a picture, those for the picture itself among them."""
    return frozenset(_lines("stop_words.txt"))


def _stem(word: str) -> str:
    """A word without the ending of a plural or a verb: houses and house, smiling and smiles are the same."""
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
    """Share of the words `of` a short caption that are among a caption's `words`; None where it has none."""
    return len(of & words) / len(of) if of else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def measure(caption: Caption, raw: frozenset[str], neighbours: Sequence[frozenset[str]]) -> MeasuredCaption:
    """A caption with its measures.

    Args:
        caption: whose text is looked at.
        raw: content words of the short caption of its image.
        neighbours: those of the next images'.
    """
    words = words_of(caption.text)
    content = content_words(caption.text)
    pairs = [(raw - other, other - raw) for other in neighbours]
    pairs = [(own, other) for own, other in pairs if own and other]
    return MeasuredCaption(
        **vars(caption),
        words=len(words),
        repetition=repetition(words),
        truncated=is_truncated(caption.text, caption.finish_reason),
        control=len(_CONTROL.findall(caption.text)),
        mojibake=mojibake(caption.text),
        refusal=refusal(caption.text),
        reasoning=reasoning(caption.text),
        agreement=agreement(raw, content),
        own_agreement=_mean([agreement(own, content) for own, _ in pairs]),
        next_agreement=_mean([agreement(other, content) for _, other in pairs]),
    )


def measured(captions: Iterable[Caption], short_captions: Mapping[str, str]) -> Iterator[MeasuredCaption]:
    """Each caption with its measures.

    Args:
        captions: of a partition.
        short_captions: key → short caption of all the partition's images, in order; after the last comes the first.
    """
    words = [content_words(text) for text in short_captions.values()]
    places = {key: place for place, key in enumerate(short_captions)}
    for caption in captions:
        place = places[caption.key]
        following = [words[(place + step) % len(words)] for step in range(1, NEIGHBOURS + 1)]
        yield measure(caption, words[place], following)


# --- rules --------------------------------------------------------------------------------------------------------

RULES = tuple(QualityConfig.model_fields)  # in the order in which they are asked


def broken_rule(caption: MeasuredCaption, rules: QualityConfig) -> Failure | None:
    """Why a caption is dropped, by the first rule that it breaks; None where it breaks none."""
    for rule in RULES:
        limit = getattr(rules, rule)
        reason = None if limit is None or limit is False else _breaks(rule, caption, limit)
        if reason:
            return Failure(caption.key, caption.captioner, reason, rule)
    return None


def _breaks(rule: str, caption: MeasuredCaption, limit: Any) -> str | None:
    """How a caption breaks a rule, with the number and the limit; None where it does not."""
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
            again = f"{caption.repetition:.3g} of its runs of {NGRAM} words are repeated, more than {limit:g}"
            return again if caption.repetition > limit else None
        case "disagreement":
            low = caption.agreement is not None and caption.agreement < limit
            return f"has {caption.agreement:.3g} of the short caption's words, less than {limit:g}" if low else None
    raise AssertionError(f"the rule {rule} is not written")


def _over(number: int, limit: int, what: str) -> str | None:
    return f"{number} {what}, more than {limit}" if number > limit else None


def assess(captions: Iterable[MeasuredCaption], rules: QualityConfig) -> Iterator[MeasuredCaption | Failure]:
    """The captions, with a failure in place of each that breaks a rule."""
    for caption in captions:
        yield broken_rule(caption, rules) or caption


# --- a captioner's captions as a whole ----------------------------------------------------------------------------

SUMMARISED = ("words", "repetition", "agreement")
QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}


def summarise(tables: Iterable[pd.DataFrame], failure_kinds: Mapping[str, int]) -> dict[str, Any]:
    """What the captions of a captioner are like: means and quantiles of `SUMMARISED`, shares of what was dropped.

    Values are counted, rounded to a thousandth, so memory does not grow with the captions.

    Args:
        tables: the partitions' captions, one at a time.
        failure_kinds: kind → number of the stage's failures; those of `RULES` are captions that were dropped.

    Returns:
        "captions" (dropped ones too), "filtered" (rule → number), "truncated_share" of those kept, and for each of
        `SUMMARISED` "mean" and `QUANTILES`, None where no caption has the value.
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
    found: dict[str, float | None] = {
        name: float(values[np.searchsorted(below, max(math.ceil(share * total), 1))])
        for name, share in QUANTILES.items()
    }
    return {"mean": round(math.fsum(value * count for value, count in counter.items()) / total, 4), **found}


@dataclass(frozen=True)
class Agreement:
    """How well captions agree with the short captions of their own images, and with those of the next ones.

    Only words count that the two short captions do not share, so that pictures that are much alike say nothing, rather
    than something wrong. `a + b` is of both's captions together.

    Attributes:
        pairs: captions for which both short captions have such words.
        own, following: sums of the shares that the captions have of them.
        own_squares, following_squares, products: sums of squares and products, for the spread.
    """

    pairs: int = 0
    own: float = 0.0
    following: float = 0.0
    own_squares: float = 0.0
    following_squares: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, table: pd.DataFrame) -> Agreement:
        """Of the captions of a partition, by the columns own_agreement and next_agreement."""
        both = table[["own_agreement", "next_agreement"]].astype(float).dropna().to_numpy()
        own, following = both[:, 0], both[:, 1]
        sums = (own, following, own * own, following * following, own * following)
        return cls(len(both), *(float(part.sum()) for part in sums))

    def __add__(self, other: Agreement) -> Agreement:
        ours, theirs = asdict(self), asdict(other)
        return Agreement(**{name: ours[name] + theirs[name] for name in ours})

    def is_own(self, ratio: float, errors: float = 3.0) -> bool | None:
        """Whether captions agree at least `ratio` times as well with their own images' short captions.

        Swapped captions agree equally well with both, but for chance. False only where chance does not explain it (by
        that many standard errors), None where neither is certain: few captions, or short captions that say little.
        """
        if self.pairs < ENOUGH_PAIRS:  # to tell how much they spread
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
            return "no short captions to tell apart by their words"
        own, following = self.own / self.pairs, self.following / self.pairs
        return (
            f"{own:.0%} of their own short captions' words, {following:.0%} of the next ones' ({self.pairs} captions)"
        )
