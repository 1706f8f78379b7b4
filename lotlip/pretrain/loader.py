"""The data path from shards to batches: `Loader._pipeline` lists its steps in order."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lotlip.core.compute import RemoteShards
from lotlip.core.lifetime import end_with_parent
from lotlip.data.images import Transform
from lotlip.data.remote_shards import ShardCache, open_index
from lotlip.data.tars import RawSample, Shards, TarSamples
from lotlip.data.text import SubCaption, draw_caption, sample_long_text, sample_sub_captions, sample_texts
from lotlip.data.token_ids import TokenIds, read_token_ids
from lotlip.data.tokenizer import TextTokenizer
from lotlip.pretrain.config import RAW, LongTextsConfig, PretrainConfig, ShortTextsConfig
from lotlip.pretrain.order import WINDOW, ExactOrder, ResampledOrder, SampleLocation


class WorkerLost(RuntimeError):
    """A worker process of the loader ended before it had finished."""


@dataclass(frozen=True)
class _WorkerError:
    """An error that a worker returns instead of a step; the training process raises it."""

    message: str


RAW_TEXTS = ShortTextsConfig()

# A text: its sub-captions, or the ids of its words if these are stored (`TextTokenizer.__call__`).
Text = list[str] | np.ndarray


@dataclass(frozen=True)
class Sample:
    """An image of a step, with the short text and the long texts sampled for it."""

    key: str
    image: np.ndarray  # [D] stored feature, or [3, H, W] pixels
    short: Text  # short caption, or what `short_texts` puts in its place
    long: Sequence[Text]  # K long texts; empty without long texts
    shift: float | None = None  # of the short text's words, as a share of the free positions; None: no shift


@dataclass(frozen=True)
class Batch:
    """Inputs of the towers. Short and long texts are padded separately, each to their longest.

    Attributes:
        keys: keys of the B samples.
        images: stored features [B, D], or pixels [B, 3, H, W].
        short_ids, short_lengths: short captions, [B, L] and [B].
        long_ids, long_lengths: K consecutive long texts per image, [B·K, L'] and [B·K]; None without long texts.
        patches: features of a frozen tower's patches, [B, P, C], if training has added them.
        short_offsets: number of positions by which the words of short texts are moved, [B]; None: they are not.
    """

    keys: list[str]
    images: Tensor
    short_ids: Tensor
    short_lengths: Tensor
    long_ids: Tensor | None
    long_lengths: Tensor | None
    patches: Tensor | None = None
    short_offsets: Tensor | None = None

    @property
    def texts(self) -> dict[str, Tensor | None]:
        """The texts as arguments of `LotlipForPreTraining.forward`."""
        return {
            "short_ids": self.short_ids,
            "short_lengths": self.short_lengths,
            "long_ids": self.long_ids,
            "long_lengths": self.long_lengths,
            "short_offsets": self.short_offsets,
        }

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory, for asynchronous copies to a GPU; called by torch's DataLoader."""
        return self._with(Tensor.pin_memory)

    def by_length(self, parts: int) -> list[Batch]:
        """Splits the batch into `parts` micro-batches by ascending text length, each padded to its own longest text.

        The length of a sample is that of its longest long text, or of its short caption without long texts.
        """
        lengths = self.short_lengths if self.long_lengths is None else self.long_lengths
        longest = lengths.view(len(self.keys), -1).amax(1)
        return [self._part(rows) for rows in longest.argsort(stable=True).chunk(parts)]

    def _part(self, rows: Tensor) -> Batch:
        short_lengths, long_ids, long_lengths = self.short_lengths[rows], self.long_ids, self.long_lengths
        if long_ids is not None and long_lengths is not None:
            texts = torch.arange(len(long_ids)).view(len(self.keys), -1)[rows].flatten()
            long_lengths = long_lengths[texts]
            long_ids = long_ids[texts, : int(long_lengths.max())]
        return Batch(
            keys=[self.keys[row] for row in rows.tolist()],
            images=self.images[rows],
            short_ids=self.short_ids[rows, : int(short_lengths.max())],
            short_lengths=short_lengths,
            long_ids=long_ids,
            long_lengths=long_lengths,
            short_offsets=None if self.short_offsets is None else self.short_offsets[rows],
        )

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class BatchSlice:
    """The rows of every global batch that a process decodes, and the number of micro-batches.

    Attributes:
        batch_size: size of the global batch, over all processes and micro-batches.
        rank: rank of this process.
        processes: number of processes.
        micro_batches: number of micro-batches per step.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    micro_batches: int = 1

    @property
    def rows(self) -> slice:
        """Rows of this process in a global batch."""
        size = self.batch_size // self.processes
        return slice(self.rank * size, (self.rank + 1) * size)


class Loader:
    """Loads batches from shards. The order of samples depends only on seed, epoch and data set.

    The order does not depend on the number of workers, processes or micro-batches. So a run may resume with other
    numbers of them, at any step, without reading the steps before it. Workers are processes that read, decode and
    tokenize ahead; they take turns, one step each. Texts whose token ids are stored beside their tar are not tokenized
    again; the batches are the same.

    Args:
        shards: folder with `index.json` and its tars: `key.json`, and `key.npy` or an image.
        settings: settings of the ablation; `loader`, `short_texts` and `long_texts` are used.
        tokenizer: tokenizer of the text tower.
        seed: seed of the run.
        part: the part of each global batch that this process decodes.
        transform: encoded image → pixels [3, H, W]; None: use stored features.
        workers: number of worker processes; 0: read in this process.
        prefetch: number of steps that each worker prepares ahead.
        row_of: token id → row of the model's table of word embeddings, −1 if it has none, as in
            `lotlip.pretrain.word_rows`; batches then contain rows instead of ids. None: the table is complete.
        remote: where a copy of the shards is read, through a cache; None: `shards` has them.

    Attributes:
        steps_per_epoch: number of global batches per epoch; an incomplete last batch is dropped.

    Raises:
        ValueError: an epoch has fewer samples than a batch, a prefix in `loader.weights` matches no key, or the copy
            cannot be read.
    """

    def __init__(
        self,
        shards: Path,
        settings: PretrainConfig,
        tokenizer: TextTokenizer,
        seed: int,
        part: BatchSlice,
        transform: Transform | None = None,
        workers: int = 1,
        prefetch: int = 4,
        row_of: np.ndarray | None = None,
        remote: RemoteShards | None = None,
    ) -> None:
        index = open_index(shards, remote)
        train = index.splits["train"].shards
        self._cache = ShardCache(remote, train, held=2 * WINDOW) if remote else None
        folder, open_tar = (self._cache.folder, self._cache.open) if self._cache else (shards, TarSamples)
        paths = [folder / f"{shard.name}.tar" for shard in train]
        self._names = [shard.name for shard in train]
        self._part, self._workers, self._prefetch = part, workers, prefetch
        self._shards = Shards(paths, [shard.samples for shard in train], opened=2 * WINDOW, open_tar=open_tar)
        self._order = _order(self._shards, seed, settings)
        self.steps_per_epoch = self._order.samples // part.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"{shards} has {self._order.samples} training samples, fewer than a batch of {part.batch_size}; "
                "set pretrain.batch_size lower"
            )
        self._words_hash = tokenizer.words_hash
        self._token_ids = lru_cache(maxsize=2 * WINDOW)(self._read_token_ids)
        self._parse = partial(
            parse_sample,
            long_texts=settings.long_texts,
            transform=transform,
            tokenizer=tokenizer,
            short_texts=settings.short_texts,
            rewriters=index.rewriters,
        )
        self._image = "npy" if transform is None else "image"
        self._collate = partial(collate, tokenizer=tokenizer)
        self._index, self._tokenizer, self._row_of = shards / "index.json", tokenizer, row_of

    def steps(self, first: int, last: int) -> Generator[list[Batch], None, None]:
        """Yields this process's micro-batches of the global steps first … last − 1, counted from 0 over all epochs.

        The workers end with the generator.

        Raises:
            ValueError: a sample or a shard cannot be used.
            WorkerLost: a worker was killed.
        """
        workers = min(self._workers, max(last - first, 0))
        loader: DataLoader[list[Batch] | _WorkerError] = DataLoader(
            self._pipeline(first, last),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._prefetch if workers else None,
            worker_init_fn=partial(_start_worker, os.getpid() if _in_main_thread() else None),
            multiprocessing_context="fork" if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        steps = _start_workers(loader)
        try:
            for step in steps:
                if isinstance(step, _WorkerError):
                    raise ValueError(step.message)
                yield step
        except (RuntimeError, OSError, EOFError) as error:  # the last two occur while tensors are transferred
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise WorkerLost(
                f"a worker of the loader ended unexpectedly ({str(error).partition(chr(10))[0]}); if memory ran out, "
                "set compute.training.loader_workers or compute.training.prefetch lower"
            ) from error
        finally:
            del steps  # this ends the workers
            if self._cache:
                self._cache.close()

    def _pipeline(self, first: int, last: int) -> wds.DataPipeline:
        return wds.DataPipeline(
            partial(_steps_of_worker, first, last),
            wds.map(self._locations),  # of this process's rows
            wds.map(self._read),  # one read per sample, of the used members only
            wds.map(self._parse_all),  # decode images, sample long texts
            wds.map(self._micro_batches),  # tokenize texts without stored ids, group by length
            _errors_as_values,
        )

    def _locations(self, step: int) -> list[SampleLocation]:
        epoch, batch = divmod(step, self.steps_per_epoch)
        start, rows = batch * self._part.batch_size, self._part.rows
        if self._cache:
            self._cache.prefetch(self._names[number] for number in self._order.upcoming(epoch, start + rows.start))
        return list(self._order.locations(epoch, start + rows.start, start + rows.stop))

    def _read(self, locations: list[SampleLocation]) -> list[tuple[SampleLocation, RawSample]]:
        return [(at, self._shards[at.shard].read(at.row, self._members(at.shard))) for at in locations]

    def _read_token_ids(self, shard: int) -> TokenIds | None:
        return read_token_ids(self._shards[shard], self._words_hash)

    def _members(self, shard: int) -> tuple[str, ...]:
        return ("json", self._image) if self._token_ids(shard) is None else (self._image,)

    def _parse_all(self, samples: list[tuple[SampleLocation, RawSample]]) -> list[Sample]:
        return [self._parse(raw, row=at.row, seed=at.seed, token_ids=self._token_ids(at.shard)) for at, raw in samples]

    def _micro_batches(self, samples: list[Sample]) -> list[Batch]:
        batch = self._collate(samples)
        if self._row_of is not None:
            batch = self._with_table_rows(batch, self._row_of)
        return [batch] if self._part.micro_batches == 1 else batch.by_length(self._part.micro_batches)

    def _with_table_rows(self, batch: Batch, row_of: np.ndarray) -> Batch:
        """Replaces token ids by rows of the model's table of word embeddings."""
        changed: dict[str, Any] = {}
        for name in ("short_ids", "long_ids"):
            ids = getattr(batch, name)
            if ids is None:
                continue
            rows = changed[name] = torch.from_numpy(row_of[ids.numpy()])
            if rows.min() < 0:
                text, position = (rows < 0).nonzero()[0].tolist()
                token, key = ids[text, position].item(), batch.keys[text * len(batch.keys) // len(ids)]
                raise ValueError(
                    f"a text of sample {key} has the token {self._tokenizer.token(token)!r} (id {token}), which is not "
                    f"in the vocabulary of {self._index}; rewrite the shards (python -m flows shard)"
                )
        return replace(batch, **changed)


def _order(shards: Shards, seed: int, settings: PretrainConfig) -> ExactOrder:
    epochs = settings.loader
    if epochs.epochs == "exact":
        return ExactOrder(shards, seed, settings.samples)
    return ResampledOrder(shards, seed, epochs.samples_per_epoch, epochs.weights, settings.samples)


def _steps_of_worker(first: int, last: int) -> Iterator[int]:
    """Yields every n-th step for each of n workers, because torch's DataLoader reads from them in turn."""
    worker = get_worker_info()
    yield from range(first, last) if worker is None else range(first + worker.id, last, worker.num_workers)


def _errors_as_values(steps: Iterable[list[Batch]]) -> Iterator[list[Batch] | _WorkerError]:
    """Returns errors as values: if a worker raised them, torch would wrap them in the worker's traceback."""
    try:
        yield from steps
    except (ValueError, OSError) as error:
        yield _WorkerError(str(error))


def _start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Starts a loader's workers. If one is lost, reading the next step raises an error within seconds.

    This removes torch's signal handler, which would raise at once, at any point of the training process.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    steps = iter(loader)
    if _in_main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return steps


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _start_worker(parent: int | None, _: int) -> None:
    """Prepares a worker.

    Args:
        parent: ID of the training process, with which the worker ends. torch's workers check for it only while they
            wait. None if a thread started the worker, because the kernel would end the worker with that thread.
    """
    if parent is not None:
        end_with_parent(parent)
    # Workers already run in parallel; the tokenizers library would start a thread per core in each of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def parse_sample(
    raw: RawSample,
    long_texts: LongTextsConfig,
    row: int,
    seed: str,
    transform: Transform | None,
    tokenizer: TextTokenizer,
    token_ids: TokenIds | None = None,
    short_texts: ShortTextsConfig = RAW_TEXTS,
    rewriters: Collection[str] = (),
) -> Sample:
    """Decodes the used members of a sample and samples its texts.

    Args:
        raw: the sample as read by `lotlip.data.tars`.
        long_texts: how to sample long texts.
        row: number of the sample in its tar.
        seed: seed of the sample's random numbers. The key is added, so that they do not depend on the order of samples.
        transform: as in `Loader`.
        tokenizer: its sentence ends split the short caption into sub-captions; long captions are stored split.
        token_ids: token ids of the tar's texts; None: read the texts from the sample's .json.
        short_texts: how to sample the short text.
        rewriters: captioners whose texts reword the short caption and so are no long captions.

    Raises:
        ValueError: a member that is needed is missing or cannot be read.
    """
    key, place = raw["__key__"], f"sample {raw['__key__']} in {raw['__url__']}"
    text: Text
    long: Sequence[Text]
    sample = partial(
        _sample_texts, short_texts=short_texts, long_texts=long_texts, rewriters=rewriters, seed=f"{seed}/{key}"
    )
    if token_ids is None:
        text, long = sample(*sample_texts(raw["json"], place, tokenizer.sentence_ends))
    else:
        short_ids, sampled = sample(*token_ids.captions(row))
        text, long = token_ids.words(short_ids), [token_ids.words(window) for window in sampled]
    shift = random.Random(f"{seed}/{key}/offset").random() if short_texts.random_offset else None
    image = _feature(raw, place) if transform is None else _pixels(raw, place, transform, f"{seed}/{key}/image")
    return Sample(key, image, text, long, shift)


def _sample_texts(
    short: Sequence[SubCaption],
    captions: Mapping[str, Sequence[SubCaption]],
    short_texts: ShortTextsConfig,
    long_texts: LongTextsConfig,
    rewriters: Collection[str],
    seed: str,
) -> tuple[list[SubCaption], list[list[SubCaption]]]:
    """Samples the short text and the long texts of an image."""
    names = long_texts.captioners or [name for name in captions if name not in rewriters]
    available = {**captions, RAW: short}
    described = {name: available[name] for name in names if name in available}
    return (
        list(_sample_short_text(short, captions, described, short_texts, rewriters, seed)),
        _sample_long_texts(short, described, long_texts, seed),
    )


def _sample_short_text(
    short: Sequence[SubCaption],
    captions: Mapping[str, Sequence[SubCaption]],
    described: Mapping[str, Sequence[SubCaption]],
    settings: ShortTextsConfig,
    rewriters: Collection[str],
    seed: str,
) -> Sequence[SubCaption]:
    """Samples the short text of an image.

    An image without the rewrite that is drawn has its short caption instead: the rewriter failed, or wrote fewer words
    than the caption stage's rules keep. So has one without long captions, if the text is taken from these.
    """
    if settings.sampler == "raw":
        return short
    rng = random.Random(f"{seed}/short")
    if settings.sampler == "raw-or-rewrite":
        drawn = rng.choice([None, *sorted(settings.rewriters or rewriters)])
        return short if drawn is None else captions.get(drawn) or short
    if not any(described.values()):
        return short
    # the first draw for long texts chooses a caption, so this one is that of the first long text
    return sample_sub_captions(draw_caption(described, random.Random(seed)), settings.sampler, rng)


def _sample_long_texts(
    short: Sequence[SubCaption],
    captions: Mapping[str, Sequence[SubCaption]],
    settings: LongTextsConfig,
    seed: str,
) -> list[list[SubCaption]]:
    """Samples the long texts of an image.

    An image without long captions stays in the batch: its long texts are sampled from its short caption.
    """
    if not settings.sub_captions:
        return []
    if not any(captions.values()):  # a captioner may fail on an image; the shards' statistics count these
        captions = {RAW: short}
    rng = random.Random(seed)
    return [
        sample_long_text(captions, settings.sampler, settings.sub_captions, rng, settings.window)
        for _ in range(settings.per_image)
    ]


def _feature(raw: RawSample, place: str) -> np.ndarray:
    if "npy" not in raw:
        raise ValueError(f"{place} has no stored feature; set shard.store_features to true")
    try:
        return _read_npy(raw["npy"])
    except ValueError as error:
        raise ValueError(
            f"{place}: its .npy cannot be read ({error}); rewrite the shards (python -m flows shard)"
        ) from error


def _pixels(raw: RawSample, place: str, transform: Transform, seed: str) -> np.ndarray:
    if "image" not in raw:
        raise ValueError(f"{place} has no image; rewrite the shards, or set image_tower.features to stored")
    try:
        return transform(raw["image"], random.Random(seed))
    except ValueError as error:
        raise ValueError(f"{place}: {error}; remove the sample, or rewrite the shards") from error


def _read_npy(data: bytes) -> np.ndarray:
    """Reads an array like np.load, but parses equal headers once: all features of a data set have the same one."""
    length = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _npy_header(data[:length])
    return np.frombuffer(data, dtype, offset=length).reshape(shape)


@lru_cache(maxsize=8)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its format is not version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject:
        raise ValueError(f"an array of {dtype} in {'column' if fortran else 'row'} order is not a feature")
    return dtype, shape


def collate(samples: list[Sample], tokenizer: TextTokenizer) -> Batch:
    """Stacks samples and tokenizes the texts whose ids are not stored."""
    short_ids, short_lengths = map(torch.from_numpy, tokenizer([sample.short for sample in samples]))
    shifts = [sample.shift for sample in samples if sample.shift is not None]
    # the last word may come to lie at the end of the context
    free = tokenizer.context_length - short_lengths + 1
    long = [text for sample in samples for text in sample.long]
    long_ids, long_lengths = map(torch.from_numpy, tokenizer(long)) if long else (None, None)
    return Batch(
        keys=[sample.key for sample in samples],
        images=torch.from_numpy(np.stack([sample.image for sample in samples])),
        short_ids=short_ids,
        short_lengths=short_lengths,
        long_ids=long_ids,
        long_lengths=long_lengths,
        short_offsets=(torch.tensor(shifts, dtype=torch.float64) * free).long() if shifts else None,
    )
