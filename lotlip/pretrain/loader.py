"""The one way of a sample from shards to a batch: `Loader` lists its steps in order."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lotlip.core.lifetime import end_with_parent
from lotlip.data.images import Transform
from lotlip.data.index import ShardIndex, read_index
from lotlip.data.tars import RawSample, Shards
from lotlip.data.text import SubCaption, sample_texts, sample_window
from lotlip.data.token_ids import TokenIds, read_token_ids
from lotlip.data.tokenizer import TextTokenizer
from lotlip.pretrain.config import LoaderConfig as LoaderSettings
from lotlip.pretrain.config import LongTextsConfig, PretrainConfig
from lotlip.pretrain.order import WINDOW, ExactOrder, Place, ResampledOrder


class WorkerLost(RuntimeError):
    """A worker process of the loader ended before its work did."""


@dataclass(frozen=True)
class _Unusable:
    """What a worker hands over in place of a step: why there is none, for the training process to raise."""

    message: str


# A text as its sub-captions, or as the ids of its words where those are stored (`TextTokenizer.__call__`).
Text = list[str] | np.ndarray


@dataclass(frozen=True)
class Sample:
    """What one image brings to a step: its features or pixels, its short caption and the long texts drawn for it."""

    key: str
    image: np.ndarray  # [D] stored feature, or [3, H, W] pixels
    raw: Text  # the short caption
    long: Sequence[Text]  # K long texts; empty without long texts


@dataclass(frozen=True)
class Batch:
    """What the towers take. Short and long texts are padded apart, each to its own longest.

    Attributes:
        keys: of the B samples.
        images: stored features [B, D], or pixels [B, 3, H, W].
        raw_ids, raw_lengths: short captions, [B, L] and [B].
        long_ids, long_lengths: K long texts of each image in a row, [B·K, L'] and [B·K]; None without long texts.
    """

    keys: list[str]
    images: Tensor
    raw_ids: Tensor
    raw_lengths: Tensor
    long_ids: Tensor | None
    long_lengths: Tensor | None

    @property
    def texts(self) -> dict[str, Tensor | None]:
        """The arguments of `LotlipModel.forward`."""
        return {
            "raw_ids": self.raw_ids,
            "raw_lengths": self.raw_lengths,
            "long_ids": self.long_ids,
            "long_lengths": self.long_lengths,
        }

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU copies from while it computes; torch's DataLoader asks for it."""
        return self._with(Tensor.pin_memory)

    def by_length(self, parts: int) -> list[Batch]:
        """The same samples in `parts` micro-batches, shorter texts first, each padded to its own longest.

        The longest of a sample's long texts counts; of its short caption where it has none.
        """
        lengths = self.raw_lengths if self.long_lengths is None else self.long_lengths
        longest = lengths.view(len(self.keys), -1).amax(1)
        return [self._part(rows) for rows in longest.argsort(stable=True).chunk(parts)]

    def _part(self, rows: Tensor) -> Batch:
        raw_lengths, long_ids, long_lengths = self.raw_lengths[rows], self.long_ids, self.long_lengths
        if long_ids is not None and long_lengths is not None:
            texts = torch.arange(len(long_ids)).view(len(self.keys), -1)[rows].flatten()
            long_lengths = long_lengths[texts]
            long_ids = long_ids[texts, : int(long_lengths.max())]
        return Batch(
            keys=[self.keys[row] for row in rows.tolist()],
            images=self.images[rows],
            raw_ids=self.raw_ids[rows, : int(raw_lengths.max())],
            raw_lengths=raw_lengths,
            long_ids=long_ids,
            long_lengths=long_lengths,
        )

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Rows:
    """Which rows of every global batch a process decodes, and in how many pieces.

    Attributes:
        batch_size: of the global batch, over all processes and micro-batches.
        rank: this process.
        processes: how many there are.
        accumulation: micro-batches per step.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    accumulation: int = 1

    @property
    def own(self) -> slice:
        """This process's rows of a global batch."""
        size = self.batch_size // self.processes
        return slice(self.rank * size, (self.rank + 1) * size)


class Loader:
    """Batches of shards: which sample stands where depends on seed, epoch and the data set alone.

    It does not depend on how many workers, processes or micro-batches share the work, so a run may resume with others,
    at any step, without passing over those before it. Workers are processes that read, decode and tokenize ahead; each
    makes whole steps, in turn. Texts whose token ids are stored beside their tar are not tokenized; the batches are the
    same.

    Args:
        shards: folder with `index.json` and its tars: `key.json`, and `key.npy` or an image.
        settings: of the ablation: `loader` and `long_texts`.
        tokenizer: of the text tower.
        seed: of the run.
        rows: the part of each global batch that this process decodes.
        transform: encoded image → pixels [3, H, W]; None takes the stored features.
        workers: processes that read ahead; 0: this one reads.
        prefetch: steps that each worker holds ready.
        row_of: token id → row of the model's table of word embeddings, −1 where it has none, as in
            `lotlip.pretrain.word_rows`; batches then have rows in the place of ids. None: the table is whole.

    Attributes:
        steps_per_epoch: global batches in an epoch; the rest that fills no batch is left out.

    Raises:
        ValueError: an epoch has fewer samples than a batch, or no key begins as one of the weights does.
    """

    def __init__(
        self,
        shards: Path,
        settings: PretrainConfig,
        tokenizer: TextTokenizer,
        seed: int,
        rows: Rows,
        transform: Transform | None = None,
        workers: int = 1,
        prefetch: int = 4,
        row_of: np.ndarray | None = None,
    ) -> None:
        listed = read_index(shards, ShardIndex).splits["train"].shards
        paths = [shards / f"{shard.name}.tar" for shard in listed]
        self._rows, self._workers, self._prefetch = rows, workers, prefetch
        self._shards = Shards(paths, [shard.samples for shard in listed], opened=2 * WINDOW)
        self._order = _order(self._shards, seed, settings.loader)
        self.steps_per_epoch = self._order.samples // rows.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"{shards} has {self._order.samples} training samples, fewer than a batch of {rows.batch_size}; "
                "set pretrain.batch_size lower"
            )
        self._words_hash = tokenizer.words_hash
        self._token_ids = lru_cache(maxsize=2 * WINDOW)(self._read_token_ids)
        self._parse = partial(parse_sample, long_texts=settings.long_texts, transform=transform, tokenizer=tokenizer)
        self._image = "npy" if transform is None else "image"
        self._collate = partial(collate, tokenizer=tokenizer)
        self._index, self._tokenizer, self._row_of = shards / "index.json", tokenizer, row_of

    def steps(self, first: int, last: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of this process for the global steps first … last − 1, counted from 0 over all epochs.

        Its workers end when it does, or when it is closed.

        Raises:
            ValueError: a sample or a shard cannot be used.
            WorkerLost: a worker was killed.
        """
        workers = min(self._workers, max(last - first, 0))
        loader: DataLoader[list[Batch] | _Unusable] = DataLoader(
            self._pipeline(first, last),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._prefetch if workers else None,
            worker_init_fn=partial(_start_worker, os.getpid() if _in_main_thread() else None),
            multiprocessing_context="fork" if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        steps = _started(loader)
        try:
            for step in steps:
                if isinstance(step, _Unusable):
                    raise ValueError(step.message)
                yield step
        except (RuntimeError, OSError, EOFError) as error:  # the last two: while its tensors were fetched
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise WorkerLost(
                f"a worker of the loader ended too early ({str(error).partition(chr(10))[0]}); if memory ran out, set "
                "compute.training.loader_workers or compute.training.prefetch lower"
            ) from error
        finally:
            del steps  # this ends the workers

    def _pipeline(self, first: int, last: int) -> wds.DataPipeline:
        return wds.DataPipeline(
            partial(_own_steps, first, last),
            wds.map(self._places),  # of this process's rows
            wds.map(self._read),  # one read a sample, of what is used
            wds.map(self._parsed),  # decoded, long texts drawn
            wds.map(self._batched),  # tokenized where ids are not stored, like lengths together
            _errors_handed_over,
        )

    def _places(self, step: int) -> list[Place]:
        epoch, batch = divmod(step, self.steps_per_epoch)
        start, own = batch * self._rows.batch_size, self._rows.own
        return list(self._order.places(epoch, start + own.start, start + own.stop))

    def _read(self, places: list[Place]) -> list[tuple[Place, RawSample]]:
        return [(place, self._shards[place.shard].read(place.row, self._members(place.shard))) for place in places]

    def _read_token_ids(self, shard: int) -> TokenIds | None:
        return read_token_ids(self._shards[shard], self._words_hash)

    def _members(self, shard: int) -> tuple[str, ...]:
        return ("json", self._image) if self._token_ids(shard) is None else (self._image,)

    def _parsed(self, group: list[tuple[Place, RawSample]]) -> list[Sample]:
        return [
            self._parse(raw, row=place.row, draw=place.draw, token_ids=self._token_ids(place.shard))
            for place, raw in group
        ]

    def _batched(self, samples: list[Sample]) -> list[Batch]:
        batch = self._collate(samples)
        if self._row_of is not None:
            batch = self._in_rows(batch, self._row_of)
        return [batch] if self._rows.accumulation == 1 else batch.by_length(self._rows.accumulation)

    def _in_rows(self, batch: Batch, row_of: np.ndarray) -> Batch:
        """The batch with rows of the model's table of word embeddings in the place of token ids."""
        found: dict[str, Any] = {}
        for name in ("raw_ids", "long_ids"):
            ids = getattr(batch, name)
            if ids is None:
                continue
            rows = found[name] = torch.from_numpy(row_of[ids.numpy()])
            if rows.min() < 0:
                text, place = (rows < 0).nonzero()[0].tolist()
                token, key = ids[text, place].item(), batch.keys[text * len(batch.keys) // len(ids)]
                raise ValueError(
                    f"a text of sample {key} has the token {self._tokenizer.token(token)!r} (id {token}), which is not "
                    f"in the vocabulary of {self._index}; write the shards again (python -m flows shard)"
                )
        return replace(batch, **found)


def _order(shards: Shards, seed: int, settings: LoaderSettings) -> ExactOrder:
    if settings.epochs == "exact":
        return ExactOrder(shards, seed)
    return ResampledOrder(shards, seed, settings.samples_per_epoch, settings.weights)


def _own_steps(first: int, last: int) -> Iterator[int]:
    """Every n-th step for each of n workers: torch's DataLoader asks them in turn."""
    worker = get_worker_info()
    yield from range(first, last) if worker is None else range(first + worker.id, last, worker.num_workers)


def _errors_handed_over(steps: Iterable[list[Batch]]) -> Iterator[list[Batch] | _Unusable]:
    """Errors as values: raised in a worker, torch would wrap them in the worker's whole traceback."""
    try:
        yield from steps
    except (ValueError, OSError) as error:
        yield _Unusable(str(error))


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Starts a loader's workers; its next step, within seconds, tells that one was lost.

    torch has a signal handler tell it at once, which raises wherever the training process happens to be.
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
        parent: the training process, which the worker ends with. torch's workers look for it only while they wait.
            None: a thread started the worker, and the kernel would end it with that thread.
    """
    if parent is not None:
        end_with_parent(parent)
    # Workers are the parallelism: the tokenizers library would start a thread for each core in every one of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def parse_sample(
    raw: RawSample,
    long_texts: LongTextsConfig,
    row: int,
    draw: str,
    transform: Transform | None,
    tokenizer: TextTokenizer,
    token_ids: TokenIds | None = None,
) -> Sample:
    """Decodes what is used of a sample and draws its long texts.

    Args:
        raw: as `lotlip.data.tars` reads it.
        long_texts: what to draw.
        row: number of the sample in its tar.
        draw: where chance comes from, together with the key, so that draws do not depend on order.
        transform: as in `Loader`.
        tokenizer: its sentence ends split the short caption into sub-captions; the long ones are stored split.
        token_ids: of the tar's texts; None: the sample's .json has them.

    Raises:
        ValueError: the sample lacks what is needed, or it cannot be read.
    """
    key, place = raw["__key__"], f"sample {raw['__key__']} in {raw['__url__']}"
    text: Text
    long: Sequence[Text]
    if token_ids is None:
        text, captions = sample_texts(raw["json"], place, tokenizer.sentence_ends)
        long = _draw(text, captions, long_texts, f"{draw}/{key}")
    else:
        numbers, numbered = token_ids.captions(row)
        text = token_ids.words(numbers)
        long = [token_ids.words(drawn) for drawn in _draw(numbers, numbered, long_texts, f"{draw}/{key}")]
    image = _feature(raw, place) if transform is None else _pixels(raw, place, transform, f"{draw}/{key}/image")
    return Sample(key, image, text, long)


def _draw(
    short: Sequence[SubCaption],
    captions: Mapping[str, Sequence[SubCaption]],
    settings: LongTextsConfig,
    chance: str,
) -> list[list[SubCaption]]:
    """The long texts of an image.

    An image that none of the captioners described keeps its place in the batch: its short caption stands in.
    """
    if not settings.sub_captions:
        return []
    if settings.captioners:
        captions = {name: captions[name] for name in settings.captioners if name in captions}
    if not any(captions.values()):  # a captioner may fail on an image; the shards' statistics count how often
        captions = {"raw": short}
    rng = random.Random(chance)
    return [sample_window(captions, settings.sub_captions, rng, settings.window) for _ in range(settings.per_image)]


def _feature(raw: RawSample, place: str) -> np.ndarray:
    if "npy" not in raw:
        raise ValueError(f"{place} has no stored feature; set shard.store_features to true")
    try:
        return _array(raw["npy"])
    except ValueError as error:
        raise ValueError(f"{place}: its .npy cannot be read ({error}); write the shard again") from error


def _pixels(raw: RawSample, place: str, transform: Transform, draw: str) -> np.ndarray:
    if "image" not in raw:
        raise ValueError(f"{place} has no image; write the shard again, or set image_tower.features to stored")
    try:
        return transform(raw["image"], random.Random(draw))
    except ValueError as error:
        raise ValueError(f"{place}: {error}; take it out, or write the shard again") from error


def _array(data: bytes) -> np.ndarray:
    """What np.load gives, but all features of a data set have one header, and it is read once."""
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
        raise ValueError(f"an array of {dtype} in {'column' if fortran else 'row'} order is no feature")
    return dtype, shape


def collate(samples: list[Sample], tokenizer: TextTokenizer) -> Batch:
    """Stacks samples and tokenizes those of their texts whose ids are not stored."""
    raw_ids, raw_lengths = tokenizer([sample.raw for sample in samples])
    long = [text for sample in samples for text in sample.long]
    long_ids, long_lengths = map(torch.from_numpy, tokenizer(long)) if long else (None, None)
    return Batch(
        keys=[sample.key for sample in samples],
        images=torch.from_numpy(np.stack([sample.image for sample in samples])),
        raw_ids=torch.from_numpy(raw_ids),
        raw_lengths=torch.from_numpy(raw_lengths),
        long_ids=long_ids,
        long_lengths=long_lengths,
    )
