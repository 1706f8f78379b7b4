"""Rules that leave samples out by their texts, and by how often texts, images and words occur, as ALIGN has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from lotlip.data.duplicates import find_by_count, hashes
from lotlip.data.partitions import read_table
from lotlip.ingest.config import TextsConfig

# Kinds of failures: of the rules min_words and max_words, and of one other each.
KINDS = ("text-length", "shared-text", "many-texts", "rare-word")

LeftOut = dict[str, dict[int, tuple[str, str]]]  # partition → row → kind and reason of a failure


def left_out_by_texts(
    units: Path, settings: TextsConfig, names: Sequence[str], dropped: Mapping[str, Collection[int]]
) -> LeftOut:
    """Finds the samples that the rules leave out.

    A rule counts the samples that the rules before it keep. Samples that are dropped already do not count, except for
    `max_texts_per_image`, which is about copies of an image.

    Args:
        units: folder of the partitions.
        settings: of the rules.
        names: of the training partitions.
        dropped: partition → rows that are dropped already, such as copies of images.
    """
    found: LeftOut = defaultdict(dict)

    def texts(name: str) -> pd.Series:
        """The texts that are still in the data set, by row."""
        values = read_table(units, name, ["short_caption"])["short_caption"]
        return values.drop(index=[*{*dropped.get(name, ()), *found[name]}])

    def leave_out(batches: Iterator[np.ndarray], kind: str, reason: str) -> None:
        for part, row in chain.from_iterable(batch.tolist() for batch in batches):
            found[names[part]].setdefault(row, (kind, reason))

    if limit := settings.max_texts_per_image:
        images = (_hashed(read_table(units, name, ["sha256"])["sha256"]) for name in names)
        leave_out(find_by_count(images, most=limit), "many-texts", f"more than {limit} samples have this image")
    for name in names if settings.min_words or settings.max_words else ():
        left = texts(name)
        for row, text in zip(left.index.tolist(), left, strict=True):
            words, low, high = len(text.split()), settings.min_words or 0, settings.max_words
            if words < low or (high is not None and words > high):
                reason = f"its text has {words} words, " + (f"fewer than {low}" if words < low else f"more than {high}")
                found[name][row] = ("text-length", reason)
    if limit := settings.max_images_per_text:
        shared = (_hashed(texts(name)) for name in names)
        leave_out(find_by_count(shared, most=limit), "shared-text", f"more than {limit} images have this text")
    if limit := settings.min_token_count:
        tokens = (_hashed(_tokens(texts(name))) for name in names)
        reason = f"a word, or a pair of words, of its text occurs fewer than {limit} times in all texts"
        leave_out(find_by_count(tokens, least=limit), "rare-word", reason)
    return dict(found)


def _hashed(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of some values, and the row of each."""
    return hashes(values), values.index.to_numpy(np.int64)


def _tokens(texts: pd.Series) -> pd.Series:
    """The words and pairs of neighbouring words of texts, without case, by row."""
    words = texts.str.casefold().str.split()
    return words.map(lambda words: [*words, *map(" ".join, pairwise(words))]).explode()
