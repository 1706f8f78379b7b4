"""Writes one shard: its samples with the frozen tower's features, and the token ids of its texts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from lotlip.core.files import sha256_json
from lotlip.data.partitions import reuse_or_write
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.data.text import SentenceEnds
from lotlip.data.token_ids import write_token_ids
from lotlip.shard.shards import Features, PartitionGroup, ShardPlan, finished_shard, group_reader, write_shard

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

    def __call__(self, unit: ShardUnit) -> list[UnitReport]:
        """Writes the shard, unless it exists and was made from the same partitions, captions and tower."""
        plan = unit.plan
        reports = reuse_or_write(
            plan.name,
            sha256_json([asdict(plan), unit.sources, self.fingerprint]),
            self.out,
            lambda: [done] if (done := finished_shard(plan.name, self.out)) else None,
            lambda: [self._write(plan)],
        )
        write_token_ids(self.out / f"{plan.name}.tar", self.tokenizer, self.sentence_ends)
        return reports

    def _write(self, plan: ShardPlan) -> UnitReport:
        with _opening:  # once per process for all threads
            group, features = _opened(self)
        return write_shard(plan, group(plan.partitions), self.out, features, self.batch_size)


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
