"""Settings of the shard stage."""

from __future__ import annotations

from pydantic import Field

from lotlip.core.section import Count, Positive, Precision, Section, Seed, Share


class ShardConfig(Section):
    """Images, short and long captions, and the frozen tower's features, as WebDataset tars."""

    samples_per_shard: Count = Field(1000, description="largest number of samples in a shard")
    max_bytes: Count = Field(1_000_000_000, description="approximate largest size of a shard")
    seed: Seed = Field(0, description="seed of the order in which samples are put into shards")
    store_features: bool = Field(True, description="run the frozen tower once, in this stage, instead of at every step")
    precision: Precision = Field(
        "fp32", description="number format in which the frozen tower computes the stored features; bf16 is autocast"
    )
    max_failure_share: Share = Field(0.01, description="largest share of samples that fail")
    max_uncaptioned_share: Share = Field(0.05, description="largest share of samples without any long caption")
    min_caption_similarity_ratio: Positive | None = Field(
        None,
        description="smallest ratio, of the image tower's features to raw pixels, of the similarity between the "
        "captions of nearest neighbours; 1 requires a tower that separates the pictures better than their pixels do; "
        "null: a ratio below 1 is only a warning",
    )
