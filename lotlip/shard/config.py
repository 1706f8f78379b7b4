"""Settings of the shard stage."""

from __future__ import annotations

from pydantic import Field

from lotlip.core.section import Count, Section, Share


class ShardConfig(Section):
    """Images, raw and long captions and the frozen tower's features, as WebDataset tars."""

    samples_per_shard: Count = Field(1000, description="at most")
    max_bytes: Count = Field(1_000_000_000, description="of a shard, about")
    seed: int = Field(0, description="of the order in which samples are put into shards")
    store_features: bool = Field(True, description="run the frozen tower once, here, instead of at every step")
    max_failure_share: Share = Field(0.01, description="of the samples; more fails the gate")
    max_uncaptioned_share: Share = Field(0.05, description="of the samples that no captioner described")
