"""Writes one shard: its samples with the frozen tower's features, and the token ids of its texts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from lotlip.core.files import sha256_json
from lotlip.data.partitions import MARKER, reuse_or_write
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.data.tars import IDS, INDEX
from lotlip.data.text import SentenceEnds
from lotlip.data.token_ids import write_token_ids
from lotlip.data.tokenizer import tokenizer_paths
from lotlip.data.work import Ranges, UnitFiles, Write, write_here
from lotlip.shard.shards import (
    DONE,
    Features,
    PartitionGroup,
    ShardPlan,
    finished_shard,
    group_reader,
    image_ranges,
    write_shard,
)

_opening = threading.Lock()


@dataclass(frozen=True)
class ShardUnit:
    """A shard to write.

    Attributes:
        plan: its contents.
        sources: hash of the partitions and captions that it is written from.
    """

    plan: ShardPlan
    sources: str


@dataclass(frozen=True)
class Sharding:
    """Everything that is needed to write a shard; small enough to be sent to another process.

    Attributes:
        ingest: folder of the ingest stage.
        captions: name of each captioner and folder of its captions.
        out: folder for the shards.
        image_tower: folder of the tower whose features are stored; None: features are not stored.
        tokenizer: whose token ids are stored.
        sentence_ends: what splits the texts.
        device: of the image tower, as in `compute`.
        precision: likewise.
        batch_size: likewise.
        fingerprint: hash of all inputs, because a cluster's process may outlive a run.
    """

    ingest: Path
    captions: tuple[tuple[str, Path], ...]
    out: Path
    image_tower: Path | None
    tokenizer: str
    sentence_ends: SentenceEnds
    device: str
    precision: str
    batch_size: int
    fingerprint: str

    def __call__(self, unit: ShardUnit, write: Write = write_here) -> list[UnitReport]:
        """Writes the shard, unless it exists and was made from the same partitions, captions and tower."""
        plan = unit.plan
        return reuse_or_write(
            plan.name,
            sha256_json([asdict(plan), unit.sources, self.fingerprint]),
            self.out,
            lambda: self._finished(plan),
            lambda: write(self, unit),
        )

    def _finished(self, plan: ShardPlan) -> list[UnitReport] | None:
        report = finished_shard(plan.name, self.out)
        if report is None:
            return None
        self._write_token_ids(plan)  # those that it has may be another tokenizer's
        return [report]

    def write(self, unit: ShardUnit) -> list[UnitReport]:
        """Writes the shard and the token ids of its texts."""
        plan = unit.plan
        with _opening:  # once per process for all threads
            group, features = _opened(self)
        report = write_shard(plan, group(plan.partitions), self.out, features, self.batch_size)
        self._write_token_ids(plan)
        return [report]

    def _write_token_ids(self, plan: ShardPlan) -> None:
        write_token_ids(self.out / f"{plan.name}.tar", self.tokenizer, self.sentence_ends)

    def files(self, unit: ShardUnit) -> UnitFiles:
        """The tables and captions of the shard's partitions, its images in them, the shard, and the tower."""
        plan, reads = unit.plan, dict[Path, Ranges | None]()
        for name, images in image_ranges(plan, self.ingest).items():
            reads[self.ingest / f"{name}.tar"], reads[self.ingest / f"{name}.parquet"] = images, None
            for _, captions in self.captions:
                reads |= dict.fromkeys(captions / f"{name}{ending}" for ending in (".parquet", MARKER))
        tower = [] if self.image_tower is None else [self.image_tower]
        writes = [self.out / f"{plan.name}{ending}" for ending in (".tar", INDEX, IDS, DONE)]
        return UnitFiles(reads, writes, [*tower, *tokenizer_paths(self.tokenizer)])


@lru_cache(maxsize=1)
def _opened(work: Sharding) -> tuple[Callable[[tuple[str, ...]], PartitionGroup], Features | None]:
    return group_reader(work.ingest, dict(work.captions)), _features(work)


def _features(work: Sharding) -> Features | None:
    if work.image_tower is None:
        return None
    from lotlip.shard.features import frozen_features

    try:
        return frozen_features(work.image_tower, work.device, work.precision)
    except ValueError as error:  # the device does not exist, or the tower cannot be read
        raise NonRetryableError(str(error)) from error
