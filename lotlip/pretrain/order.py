"""The order of samples in each epoch. Any position can be computed without computing those before it.

Shards are shuffled and read in windows, and samples are shuffled within a window. So memory grows with the window, not
with the data set, and the order is a function of seed, epoch and the data set's index only.
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

# Number of shards whose samples are mixed. Samples were already shuffled when the shards were written
# (`lotlip.shard.shards.plan_shards`).
WINDOW = 64


@dataclass(frozen=True)
class SampleLocation:
    """Location of a sample of an epoch.

    Attributes:
        shard: number of the shard in the data set.
        row: number of the sample in the shard.
        seed: seed of the sample's random numbers (long texts, augmentation), together with its key.
    """

    shard: int
    row: int
    seed: str


class ExactOrder:
    """Epochs that contain each sample once.

    Args:
        shards: shards of the data set.
        seed: seed of all random numbers.
        subset: number, or share, of the samples that are used; see `subset_counts`. None: all.

    Attributes:
        samples: number of positions in an epoch.

    Raises:
        ValueError: `subset` exceeds the number of samples.
    """

    def __init__(self, shards: Shards, seed: int, subset: float | None = None) -> None:
        self._shards, self._seed = shards, seed
        self._counts = subset_counts(np.asarray(shards.counts, dtype=np.int64), subset)
        self.samples = int(self._counts.sum())
        # two windows: a batch may span two, and a worker may read the last one of an epoch and the first of the next
        self._windows = lru_cache(maxsize=1)(self._lay_out)
        self._mixed = lru_cache(maxsize=2)(self._mix)

    def locations(self, epoch: int, start: int, stop: int) -> Iterator[SampleLocation]:
        """Yields the locations of the samples at positions start … stop − 1 of an epoch."""
        shards, ends = self._windows(epoch)
        while start < stop:
            window = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[window - 1]) if window else 0
            end = min(stop, int(ends[window]))
            inside = shards[window * WINDOW : (window + 1) * WINDOW]
            numbers, rows = self._pick(epoch, window, inside, start - first, end - first)
            for position, number, row in zip(range(start, end), numbers.tolist(), rows.tolist(), strict=True):
                yield SampleLocation(int(inside[number]), row, self._sample_seed(epoch, position))
            start = end

    def upcoming(self, epoch: int, position: int) -> list[int]:
        """Returns the shards of the window at a position of an epoch, and of the next window if the epoch has one."""
        shards, ends = self._windows(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        return shards[window * WINDOW : (window + 2) * WINDOW].tolist()

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shards in the epoch's order, and the position at which each window ends."""
        shards = _permutation(len(self._counts), f"{self._seed}/{epoch}")
        starts = np.arange(0, len(shards), WINDOW)
        return shards, self._ends(epoch, np.add.reduceat(self._sizes()[shards], starts))

    def _sizes(self) -> np.ndarray:
        """Returns the weight of each shard in an epoch, relative to the others."""
        return self._counts

    def _ends(self, epoch: int, sizes: np.ndarray) -> np.ndarray:
        return np.cumsum(sizes)

    def _pick(
        self, epoch: int, window: int, shards: np.ndarray, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shard (its number in the window) and the row for positions start … stop − 1 of a window."""
        ends = np.cumsum(self._counts[shards])
        return _split(self._mixed(epoch, window, int(ends[-1]))[start:stop], ends)

    def _mix(self, epoch: int, window: int, samples: int) -> np.ndarray:
        return _permutation(samples, f"{self._seed}/{epoch}/{window}")

    def _sample_seed(self, epoch: int, position: int) -> str:
        return f"{self._seed}/{epoch}"


class ResampledOrder(ExactOrder):
    """Virtual epochs: each position is drawn from all samples with replacement, in proportion to their weights.

    The number of positions of a window is proportional to its weight, randomly rounded up or down.

    Args:
        shards: shards of the data set. With weights, all keys are read here, once.
        seed: seed of all random numbers.
        samples: number of positions in an epoch; None: the number of samples in the data set.
        weights: prefix of a key → weight. The longest matching prefix counts; without a match the weight is 1.
        subset: as in `ExactOrder`.

    Raises:
        ValueError: a prefix in `weights` matches no key, or `subset` exceeds the number of samples.
    """

    def __init__(
        self,
        shards: Shards,
        seed: int,
        samples: int | None,
        weights: Mapping[str, float],
        subset: float | None = None,
    ) -> None:
        super().__init__(shards, seed, subset)
        self.samples = samples or self.samples
        self._weights = weights
        self._shard_weights = self._weigh() if weights else self._counts.astype(np.float64)
        self._summed = lru_cache(maxsize=2)(self._sum)

    def _weigh(self) -> np.ndarray:
        """Returns the weight of each shard."""
        unused = set(self._weights)
        sums = np.zeros(len(self._counts))
        for number in range(len(sums)):
            keys = self._keys(number)
            sums[number] = sample_weights(keys, self._weights).sum()
            unused -= {prefix for prefix in unused if pc.any(pc.starts_with(keys, prefix)).as_py()}
        if unused:
            examples = ", ".join(str(self._shards[number].keys[0]) for number in range(min(len(sums), 4)))
            raise ValueError(
                f"pretrain.loader.weights: no sample's key begins with {', '.join(map(repr, sorted(unused)))}; "
                f"keys look like {examples}"
            )
        return sums

    def _keys(self, shard: int) -> pa.Array:
        return self._shards[shard].keys[: self._counts[shard]]

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
        draws = _uniform(f"{self._seed}/{epoch}/{window}", start, stop) * summed[-1]
        samples = np.searchsorted(summed, draws, side="right").clip(max=len(summed) - 1)  # the product may round up
        return _split(samples, np.cumsum(self._counts[shards]))

    def _sum(self, shards: tuple[int, ...]) -> np.ndarray:
        """Returns the cumulative weights of the samples of a window."""
        if not self._weights:
            return np.arange(1, self._counts[list(shards)].sum() + 1)
        return np.cumsum(np.concatenate([sample_weights(self._keys(number), self._weights) for number in shards]))

    def _sample_seed(self, epoch: int, position: int) -> str:
        return f"{self._seed}/{epoch}/{position}"  # a repeated sample gets other texts


def subset_counts(counts: np.ndarray, subset: float | None) -> np.ndarray:
    """Returns how many samples of each shard, from its first, belong to a subset of the data set, [S].

    Samples were shuffled when the shards were written, so the first ones of each shard are a random subset. A smaller
    subset is contained in every larger one, also if one is given as a number and the other as a share.

    Args:
        counts: number of samples of each shard, [S].
        subset: number of samples; below 1 a share of all, rounded to at least one sample; None: all.

    Raises:
        ValueError: the number exceeds that of all samples.
    """
    if subset is None:
        return counts
    total = int(counts.sum())
    wanted = int(subset) if subset >= 1 else max(round(subset * total), 1)
    if wanted > total:
        raise ValueError(f"pretrain.samples is {wanted}, but the shards have {total} training samples; set it lower")
    # Sample j of a shard of n samples belongs to a subset if (j + u) / n is below a threshold; u is a random number of
    # the shard. So subsets grow with the threshold, sample by sample.
    shifts = _uniform("subset", 0, len(counts))

    def below(threshold: float) -> np.ndarray:
        return np.clip(np.ceil(threshold * counts - shifts), 0, counts).astype(np.int64)

    low, high = 0.0, 2.0
    while (found := below((low + high) / 2)).sum() != wanted:
        low, high = ((low + high) / 2, high) if found.sum() < wanted else (low, (low + high) / 2)
    return found


def sample_weights(keys: pa.Array, weights: Mapping[str, float]) -> np.ndarray:
    """Returns the weight of each key [n] float64: that of its longest prefix in `weights`, or 1 without a match."""
    result = np.ones(len(keys))
    for prefix in sorted(weights, key=len):
        result[pc.starts_with(keys, prefix).to_numpy(zero_copy_only=False)] = weights[prefix]
    return result


def _split(samples: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps numbers of samples in concatenated shards, with ends `ends`, to numbers of shards and rows in them."""
    shards = np.searchsorted(ends, samples, side="right")
    return shards, samples - np.concatenate([[0], ends])[shards]


# NumPy guarantees that a generator's raw bits are the same in all versions, but not its permutations.


def _bits(name: str) -> np.random.PCG64:
    return np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()))


def _permutation(size: int, name: str) -> np.ndarray:
    """Returns 0 … size − 1 in random order, [size] int64."""
    return np.argsort(_bits(name).random_raw(size), kind="stable")


def _uniform(name: str, start: int, stop: int) -> np.ndarray:
    """Returns numbers start … stop − 1 of an infinite sequence of random numbers in [0, 1), [stop − start] float64."""
    return (_bits(name).advance(start).random_raw(stop - start) >> np.uint64(11)) * 2.0**-53
