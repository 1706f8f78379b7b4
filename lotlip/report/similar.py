"""Finds images and texts that resemble one another, for a look at the data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

_BLOCK = 512  # rows that are compared with all others at once
_WORD = re.compile(r"\w+")


def similar_images(hashes: np.ndarray, distance: int) -> list[list[int]]:
    """Groups images whose perceptual hashes differ in few bits.

    Args:
        hashes: uint64 [n], of `lotlip.ingest.perceptual.perceptual_hash`.
        distance: bits in which two hashes of a pair may differ.

    Returns:
        Groups of at least two rows, the largest first; a group has all rows that a chain of pairs connects.
    """

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(hashes), _BLOCK):
            bits = np.bitwise_count(hashes[start : start + _BLOCK, None] ^ hashes[None])
            rows, others = np.nonzero(bits <= distance)
            yield rows + start, others

    return _groups(len(hashes), pairs())


def similar_texts(texts: Sequence[str], share: float) -> list[list[int]]:
    """Groups texts that have most of their words in common, whatever the words' order and case.

    Args:
        texts: to compare; those without words are in no group.
        share: least number of common words, as a share of the words that at least one of the two texts has (Jaccard).

    Returns:
        As `similar_images`.
    """
    from scipy.sparse import csr_array

    words = [sorted(set(_WORD.findall(text.casefold()))) for text in texts]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(word for one in words for word in one))}
    sizes = np.array([len(one) for one in words], dtype=np.int64)
    columns = np.array([numbers[word] for one in words for word in one], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    has = csr_array((np.ones(len(columns), dtype=np.int32), columns, starts), shape=(len(texts), max(len(numbers), 1)))

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(texts), _BLOCK):
            common = (has[start : start + _BLOCK] @ has.T).tocoo()
            rows, others = common.row.astype(np.int64) + start, common.col.astype(np.int64)
            near = common.data >= share * (sizes[rows] + sizes[others] - common.data)
            yield rows[near], others[near]

    return _groups(len(texts), pairs())


def _groups(number: int, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[list[int]]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found = [(rows[rows < others], others[rows < others]) for rows, others in pairs]
    if not found:
        return []
    rows, others = (np.concatenate(parts) for parts in zip(*found, strict=True))
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, others)), shape=(number, number))
    labels = connected_components(graph, directed=False)[1]
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.bincount(labels)[labels] > 1).tolist():
        groups.setdefault(int(labels[row]), []).append(row)
    return sorted(groups.values(), key=len, reverse=True)
