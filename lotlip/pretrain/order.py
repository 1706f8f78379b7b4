"""Which sample stands at which position of which epoch, found without going through those before it.

Shards are put into an order of chance and taken in windows, and samples are mixed inside a window. So memory grows with
a window, never with the data set, and the order is a function of seed, epoch and the data set's index alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lotlip.data.tars import Shards

# Shards whose samples are mixed. Shards were shuffled when they were written (`lotlip.shard.shards.plan_shards`).
WINDOW = 64


@dataclass(frozen=True)
class Place:
    """Where a sample of an epoch lies.

    Attributes:
        shard: its number in the data set.
        row: the sample's number in the shard.
        draw: where the sample's chance comes from (long texts, augmentation), together with its key.
    """

    shard: int
    row: int
    draw: str


class ExactOrder:
    """Epochs in which each sample comes once.

    Attributes:
        samples: positions in an epoch.
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        self._shards, self._seed = shards, seed
        self._counts = np.asarray(shards.counts, dtype=np.int64)
        self.samples = int(self._counts.sum())
        # a batch may lie across windows, and a worker may stand in the last one of an epoch while the next begins
        self._windows = lru_cache(maxsize=1)(self._lay_out)
        self._mixed = lru_cache(maxsize=2)(self._mix)

    def places(self, epoch: int, start: int, stop: int) -> Iterator[Place]:
        """Where the samples at positions start … stop − 1 of an epoch lie."""
        shards, ends = self._windows(epoch)
        while start < stop:
            window = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[window - 1]) if window else 0
            end = min(stop, int(ends[window]))
            inside = shards[window * WINDOW : (window + 1) * WINDOW]
            numbers, rows = self._pick(epoch, window, inside, start - first, end - first)
            for position, number, row in zip(range(start, end), numbers.tolist(), rows.tolist(), strict=True):
                yield Place(int(inside[number]), row, self._draw(epoch, position))
            start = end

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the epoch's order, and the position at which each window of them ends."""
        shards = _permutation(len(self._counts), f"{self._seed}/{epoch}")
        starts = np.arange(0, len(shards), WINDOW)
        return shards, self._ends(epoch, np.add.reduceat(self._sizes()[shards], starts))

    def _sizes(self) -> np.ndarray:
        """How much of an epoch each shard has."""
        return self._counts

    def _ends(self, epoch: int, sizes: np.ndarray) -> np.ndarray:
        return np.cumsum(sizes)

    def _pick(
        self, epoch: int, window: int, shards: np.ndarray, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions start … stop − 1 of a window as the number of a shard in it, and a row of that."""
        ends = np.cumsum(self._counts[shards])
        return _split(self._mixed(epoch, window, int(ends[-1]))[start:stop], ends)

    def _mix(self, epoch: int, window: int, samples: int) -> np.ndarray:
        return _permutation(samples, f"{self._seed}/{epoch}/{window}")

    def _draw(self, epoch: int, position: int) -> str:
        return f"{self._seed}/{epoch}"


class ResampledOrder(ExactOrder):
    """Virtual epochs: each position is a draw from all samples, as likely as their weights say, with replacement.

    A window has as many positions as its share of all weights, rounded up or down by chance.

    Args:
        shards: of the data set. Where there are weights, all keys are read once, here.
        seed: of all draws.
        samples: positions in an epoch; None: as many as there are samples.
        weights: beginning of a key → weight. The longest that fits counts, and 1 where none does.

    Raises:
        ValueError: no key begins with one of `weights`.
    """

    def __init__(self, shards: Shards, seed: int, samples: int | None, weights: Mapping[str, float]) -> None:
        super().__init__(shards, seed)
        self.samples = samples or self.samples
        self._weights = weights
        self._shard_weights = self._weigh() if weights else self._counts.astype(np.float64)
        self._summed = lru_cache(maxsize=2)(self._sum)

    def _weigh(self) -> np.ndarray:
        """The weight of each shard."""
        unused = set(self._weights)
        sums = np.zeros(len(self._counts))
        for number in range(len(sums)):
            keys = self._shards[number].keys
            sums[number] = sample_weights(keys, self._weights).sum()
            unused -= {prefix for prefix in unused if pc.any(pc.starts_with(keys, prefix)).as_py()}
        if unused:
            some = ", ".join(str(self._shards[number].keys[0]) for number in range(min(len(sums), 4)))
            raise ValueError(
                f"pretrain.loader.weights: no sample's key begins with {', '.join(map(repr, sorted(unused)))}; "
                f"keys are as {some}"
            )
        return sums

    def _sizes(self) -> np.ndarray:
        return self._shard_weights

    def _ends(self, epoch: int, sizes: np.ndarray) -> np.ndarray:
        shares = np.cumsum(sizes) / sizes.sum()
        shift = _uniform(f"{self._seed}/{epoch}/ends", 0, 1)[0]
        ends = np.floor(shares * self.samples + shift).astype(np.int64)
        ends[-1] = self.samples
        return ends

    def _pick(
        self, epoch: int, window: int, shards: np.ndarray, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        summed = self._summed(tuple(shards.tolist()))
        chance = _uniform(f"{self._seed}/{epoch}/{window}", start, stop) * summed[-1]
        found = np.searchsorted(summed, chance, side="right").clip(max=len(summed) - 1)  # the product may round up
        return _split(found, np.cumsum(self._counts[shards]))

    def _sum(self, shards: tuple[int, ...]) -> np.ndarray:
        """Summed weights over the samples of a window."""
        if not self._weights:
            return np.arange(1, self._counts[list(shards)].sum() + 1)
        return np.cumsum(
            np.concatenate([sample_weights(self._shards[number].keys, self._weights) for number in shards])
        )

    def _draw(self, epoch: int, position: int) -> str:
        return f"{self._seed}/{epoch}/{position}"  # a sample that comes twice brings other texts


def sample_weights(keys: pa.Array, weights: Mapping[str, float]) -> np.ndarray:
    """The weight of each key [n] float64: of the longest beginning in `weights` that it has, 1 if it has none."""
    found = np.ones(len(keys))
    for prefix in sorted(weights, key=len):
        found[pc.starts_with(keys, prefix).to_numpy(zero_copy_only=False)] = weights[prefix]
    return found


def _split(samples: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of samples in a row of shards as the shard's number and the row in it; `ends`: where each shard ends."""
    shards = np.searchsorted(ends, samples, side="right")
    return shards, samples - np.concatenate([[0], ends])[shards]


# NumPy promises the same raw bits of a generator in all versions, but not the same permutations.


def _bits(name: str) -> np.random.PCG64:
    return np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()))


def _permutation(size: int, name: str) -> np.ndarray:
    """0 … size − 1 in an order of chance, [size] int64."""
    return np.argsort(_bits(name).random_raw(size), kind="stable")


def _uniform(name: str, start: int, stop: int) -> np.ndarray:
    """Numbers start … stop − 1 of an endless row between 0 and 1, [stop − start] float64."""
    return (_bits(name).advance(start).random_raw(stop - start) >> np.uint64(11)) * 2.0**-53
