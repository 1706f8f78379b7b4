"""The one way of a sample from shards to a batch: `batches` lists its steps in order."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from lotlip.config import LongTexts
from lotlip.data.tokenizer import TextTokenizer
from lotlip.text import sample_window, split_sub_captions

# Samples that wait to be drawn from; shards were shuffled whole when they were written.
SHUFFLE_BUFFER = 2000

RawSample = dict[str, Any]  # as webdataset gives it: "__key__", and a file's bytes by its ending


@dataclass(frozen=True)
class Sample:
    """What one image brings to a step: its features or pixels, its raw caption and the long texts drawn for it."""

    key: str
    image: np.ndarray  # [D] stored feature, or [3, H, W] pixels
    raw: list[str]  # the raw caption's sub-captions
    long: list[list[str]]  # K long texts, each a list of sub-captions; empty without long texts


@dataclass(frozen=True)
class Batch:
    """What the towers take. Short and long texts are padded apart, each to its own longest.

    Attributes:
        keys: of the B samples.
        images: stored features [B, D], or pixels [B, 3, H, W].
        raw_ids, raw_lengths: raw captions, [B, L] and [B].
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
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Rows:
    """Which rows of every global batch a process decodes, and in how many pieces.

    Attributes:
        batch_size: of the global batch, over all processes and micro-batches.
        rank: this process.
        processes: how many there are.
        accumulation: micro-batches per step; each is split over the processes.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    accumulation: int = 1

    def slices(self) -> list[slice]:
        """This process's rows of a global batch, a slice for each micro-batch."""
        size = self.batch_size // (self.processes * self.accumulation)
        starts = ((step * self.processes + self.rank) * size for step in range(self.accumulation))
        return [slice(start, start + size) for start in starts]


def batches(
    shards: list[Path],
    rows: Rows,
    tokenizer: TextTokenizer,
    long_texts: LongTexts,
    seed: int,
    epoch: int,
    transform: Callable[[bytes], np.ndarray] | None = None,
    skip: int = 0,
) -> Iterator[Batch]:
    """One epoch of micro-batches: each sample once, but for the rest that fills no batch.

    Which samples stand in a global batch, and which long texts are drawn for them, depends on `seed` and `epoch` alone:
    not on how many processes or micro-batches share the work.

    Args:
        shards: tars with `key.json` and `key.npy` or an image.
        rows: the part of each global batch that this process decodes.
        tokenizer: of the text tower.
        long_texts: what to draw from the long captions.
        seed: of the run.
        epoch: counts from 0.
        transform: encoded image → pixels [3, H, W]; None takes the stored features.
        skip: global batches to pass over, for a run that resumes inside an epoch.

    Raises:
        ValueError: a sample lacks its stored feature.
    """
    order = random.Random(f"{seed}/{epoch}")
    parse = partial(parse_sample, long_texts=long_texts, draw=f"{seed}/{epoch}", transform=transform)
    yield from wds.DataPipeline(
        wds.SimpleShardList(order.sample([str(path) for path in shards], len(shards))),
        partial(wds.tarfile_samples, select_files=partial(_is_used, features=transform is None)),
        wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=order),
        partial(_own_rows, rows=rows, skip=skip),
        partial(_parsed, parse=parse),
        wds.map(partial(collate, tokenizer=tokenizer)),
    )


def _is_used(name: str, features: bool) -> bool:
    """Whether a member of a shard is decoded at all: of image and stored feature it is one or the other."""
    return name.endswith(".json") or name.endswith(".npy") == features


def _own_rows(samples: Iterable[RawSample], rows: Rows, skip: int) -> Iterator[list[RawSample]]:
    """Groups the stream into global batches and keeps this process's rows, one group per micro-batch."""
    waiting: list[RawSample] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == rows.batch_size:
            if skip > 0:
                skip -= 1
            else:
                yield from (waiting[part] for part in rows.slices())
            waiting = []


def _parsed(groups: Iterable[list[RawSample]], parse: Callable[[RawSample], Sample]) -> Iterator[list[Sample]]:
    for group in groups:
        yield [parse(sample) for sample in group]


def parse_sample(
    raw: RawSample,
    long_texts: LongTexts,
    draw: str,
    transform: Callable[[bytes], np.ndarray] | None,
) -> Sample:
    """Decodes what is used of a sample and draws its long texts.

    An image that none of the captioners described keeps its place in the batch: its raw caption stands in.

    Args:
        raw: as webdataset gives it.
        long_texts: what to draw.
        draw: where chance comes from, together with the key, so that draws do not depend on order.
        transform: as in `batches`.
    """
    key = raw["__key__"]
    info = json.loads(raw["json"])
    if transform is None:
        if "npy" not in raw:
            raise ValueError(
                f"sample {key} in {raw['__url__']} has no stored feature; set shard.store_features to true"
            )
        image = np.load(io.BytesIO(raw["npy"]), allow_pickle=False)
    else:
        image = transform(next(value for name, value in raw.items() if name not in ("json", "npy") and name[0] != "_"))
    long: list[list[str]] = []
    if long_texts.sub_captions:
        captions = info["captions"]
        if long_texts.captioners:
            captions = {name: captions[name] for name in long_texts.captioners if name in captions}
        if not any(captions.values()):  # a captioner may fail on an image; the shards' statistics count how often
            captions = {"raw": split_sub_captions(info["raw"])}
        rng = random.Random(f"{draw}/{key}")
        long = [
            sample_window(captions, long_texts.sub_captions, rng, long_texts.window)
            for _ in range(long_texts.per_image)
        ]
    return Sample(key, image, split_sub_captions(info["raw"]), long)


def collate(samples: list[Sample], tokenizer: TextTokenizer) -> Batch:
    """Stacks samples and tokenizes their texts."""
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
