"""Items in batches: in order, by length, and prepared by threads ahead of who asks for them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of `size`; the last has what is left."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def by_length(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Places of texts, shortest first, in batches of `size`: texts of like length together, so that few are padded.

    The last of a batch is its longest.
    """
    order = lengths.argsort(kind="stable")
    return (order[start : start + size] for start in range(0, len(order), size))


def ahead(work: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Like `map`, but threads are up to `depth` items ahead of who asks."""
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
