"""Settings of the evaluate stage: its benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from lotlip.core.section import Count, Name, Section, Share
from lotlip.core.variants import Variants, kinds_of


class SceneBenchmarkConfig(Section):
    """Held-out scenes: long and short texts in wording that training never had, and prompts for the shape."""

    kind: Literal["scenes"]
    split: Literal["val", "test"] = Field("test", description="split whose scenes are used")
    size: Count = Field(description="scenes in the split; another number is an error")
    max_unseen_tokens: Share = Field(0.01, description="share of the texts' word pieces that no training text has")


class HeldOutBenchmarkConfig(Section):
    """Held-out images of the data set itself: its short captions, and its long captions where there are any."""

    kind: Literal["held-out"]
    split: Literal["val", "test"] = Field("test", description="split whose images are used")


PARTIAL_RUN = "-partial"  # the end of the name that a partial run's scores are filed under


def _how_partial(value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value > 0):
        return value
    raise ValueError("true takes what is there, a number above 0 the first so many images of it, false all or nothing")


class PublishedBenchmarkConfig(Section):
    """A benchmark that others score on as well, held to its published size; an entry of its name needs no `kind`."""

    kind: Literal[
        "sharegpt4v-1k", "sharegpt4v-10k", "dci", "iiw", "urban-1k", "docci", "coco", "flickr30k", "imagenet"
    ] = Field(description="which benchmark it is")
    folder: Path = Field(description="of its annotations, laid out as docs/benchmarks.md says")
    images: Path | None = Field(None, description="folder of its images, where that is another one")
    partial: Annotated[bool | int, PlainValidator(_how_partial)] = Field(
        False,
        description="true: what is there, without what is missing; a number: the first so many images of that. The "
        "scores are then filed under another name, which ends in -partial",
    )


PUBLISHED: tuple[str, ...] = kinds_of(PublishedBenchmarkConfig)

BenchmarkConfig = Annotated[
    SceneBenchmarkConfig | HeldOutBenchmarkConfig | PublishedBenchmarkConfig, Variants("lotlip.benchmarks")
]


class EvaluateConfig(Section):
    """Zero-shot retrieval and classification of each trained model."""

    benchmarks: dict[Name, BenchmarkConfig] = Field(description="name → a benchmark that every ablation is scored on")
    min_score_over_chance: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="times chance that each benchmark's R@1 of short text must reach (of long text, or top-1 accuracy, "
        "where it has no short one); less fails the gate",
    )

    @property
    def names(self) -> list[str]:
        """What the benchmarks' scores are filed under, in order."""
        return [
            name + PARTIAL_RUN
            if isinstance(settings, PublishedBenchmarkConfig) and settings.partial is not False
            else name
            for name, settings in self.benchmarks.items()
        ]

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_kind(cls, data: Any) -> Any:
        """An entry that is called as a published benchmark and has no kind is that benchmark."""
        benchmarks = data.get("benchmarks") if isinstance(data, dict) else None
        if not isinstance(benchmarks, dict):
            return data
        return data | {
            "benchmarks": {
                name: {"kind": name, **entry} if name in PUBLISHED and isinstance(entry, dict) else entry
                for name, entry in benchmarks.items()
            }
        }

    @model_validator(mode="after")
    def _distinct_names(self) -> EvaluateConfig:
        for name in self.benchmarks:
            if name.endswith(PARTIAL_RUN):
                raise ValueError(f"benchmarks.{name} would look like a partial run; call it otherwise")
        return self
