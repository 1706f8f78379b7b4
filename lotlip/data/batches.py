"""Batches of items: in order, by length, and prefetched by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from lotlip.core.cores import available_cores

T = TypeVar("T")
R = TypeVar("R")


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of `size`; the last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def by_length(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Indices of texts, shortest first, in batches of `size`, so that texts of similar length share a batch.

    The last text of a batch is its longest.
    """
    order = lengths.argsort(kind="stable")
    return (order[start : start + size] for start in range(0, len(order), size))


def prefetch(work: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Like `map`, but threads work up to `depth` items ahead of the consumer."""
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(min(8, available_cores()))
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
