"""Settings of the evaluate stage: its benchmarks, and the models that ablations are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator

from lotlip.core.section import Count, Name, NonNegative, Precision, Section, Share
from lotlip.core.variants import Variants, kinds_of
from lotlip.data.models import local_hashes
from lotlip.models.vision.spec import START


class SceneBenchmarkConfig(Section):
    """Held-out scenes: long and short texts in wording that training texts do not have, and prompts for the shape."""

    kind: Literal["scenes"]
    split: Literal["val", "test"] = Field("test", description="split whose scenes are used")
    size: Count = Field(description="number of scenes in the split; any other number is an error")
    max_unseen_tokens: Share = Field(
        0.01, description="maximum share of the texts' word pieces that occur in no training text"
    )


class HeldOutBenchmarkConfig(Section):
    """Held-out images of the data set with their short captions and, if there are any, their long captions."""

    kind: Literal["held-out"]
    split: Literal["val", "test"] = Field("test", description="split whose images are used")
    size: Count | None = Field(
        None, description="number of images, from the first of the split; fewer are an error; null: all"
    )
    sub_captions: Count | None = Field(
        None,
        description="number of sub-captions in a long text, a window of one of the image's captions, drawn as in "
        "training; null: the image's longest caption in full",
    )


PARTIAL_RUN = "-partial"  # suffix of the name that scores of a partial run are stored under


def _partial(value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value > 0):
        return value
    raise ValueError("must be true (all available images), a number above 0 (the first N of them) or false (complete)")


class PublishedBenchmarkConfig(Section):
    """A published benchmark, which must have its published size; an entry with its name needs no `kind`."""

    kind: Literal[
        "sharegpt4v-1k",
        "sharegpt4v-10k",
        "dci",
        "iiw",
        "urban-1k",
        "docci",
        "coco",
        "flickr30k",
        "imagenet",
        # the same data under other papers' protocols
        "dci-no-separator",
        "long-dci",
        "coco-all-captions",
        "coco-val2017",
        "coco-val2017-all-captions",
        "flickr30k-all",
    ] = Field(description="name of the benchmark and its protocol; docs/benchmarks.md")
    folder: Path = Field(description="folder of its annotations, in the layout of docs/benchmarks.md")
    images: Path | None = Field(None, description="folder of its images; default: in `folder`")
    partial: Annotated[bool | int, PlainValidator(_partial)] = Field(
        False,
        description="true: all available images; a number N: the first N of them. The name that scores are stored "
        "under then ends in -partial",
    )


PUBLISHED: tuple[str, ...] = kinds_of(PublishedBenchmarkConfig)

BenchmarkConfig = Annotated[
    SceneBenchmarkConfig | HeldOutBenchmarkConfig | PublishedBenchmarkConfig, Variants("lotlip.benchmarks")
]


def baseline_hashes(baselines: Iterable[str]) -> dict[str, str]:
    """The hash of each baseline's files on this machine, by name, without `start`, which is an output of a stage."""
    return local_hashes(name for name in baselines if name != START)


MAX_CONDITIONED_PAIRS = 25_000_000  # 5,000 images and texts; half a minute on a core at the demo's sizes


class EvaluateConfig(Section):
    """Zero-shot retrieval and classification of each trained model."""

    benchmarks: Annotated[dict[Name, BenchmarkConfig], Field(min_length=1)] = Field(
        description="name → benchmark; every ablation is scored on all"
    )
    min_score_over_chance: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="multiple of chance that R@1 of short text must reach on each benchmark, else the gate fails. "
        "Without short texts, or if training reads no short captions, R@1 of long text or top-1 accuracy counts",
    )
    baselines: list[str] = Field(
        default_factory=list,
        description="models that are not trained here, scored once on the same benchmarks and shown beside the "
        "ablations: a folder or hub name of a CLIP or SigLIP model, open_clip:NAME:TAG_OR_FILE, the folder of a saved "
        f"model, or {START}, the dual encoder that training starts from",
    )
    max_short_text_loss: Share | None = Field(
        None,
        description=f"largest share of the short-text R@1 (mean of both directions) of {START} that a trained model "
        f"may lose on a benchmark, else the gate fails; needs {START} among `baselines`; null: no limit",
    )
    precision: Precision = Field(
        "fp32", description="number format of the models whose scores are measured; bf16 is autocast"
    )
    max_conditioned_pairs: NonNegative = Field(
        MAX_CONDITIONED_PAIRS,
        description="ablations with loss.conditioned (FLAIR): largest number of pairs of images and texts of one kind "
        "that are all scored with pooled features; with more, only the best candidates of the images' own features are",
    )

    @property
    def names(self) -> list[str]:
        """Names that the benchmarks' scores are stored under, in order."""
        return [
            name + PARTIAL_RUN
            if isinstance(settings, PublishedBenchmarkConfig) and settings.partial is not False
            else name
            for name, settings in self.benchmarks.items()
        ]

    @property
    def splits(self) -> dict[str, str | None]:
        """Name that a benchmark's scores are stored under → the split of its images, if it is one of this data set."""
        splits = (getattr(settings, "split", None) for settings in self.benchmarks.values())
        return dict(zip(self.names, splits, strict=True))

    @model_validator(mode="before")
    @classmethod
    def _kind_from_name(cls, data: Any) -> Any:
        """Sets the kind of an entry that has the name of a published benchmark and no kind."""
        benchmarks = data.get("benchmarks") if isinstance(data, dict) else None
        if not isinstance(benchmarks, dict):
            return data
        return data | {
            "benchmarks": {
                name: {"kind": name, **entry} if name in PUBLISHED and isinstance(entry, dict) else entry
                for name, entry in benchmarks.items()
            }
        }

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _at_least_one(cls, benchmarks: Any) -> Any:
        if benchmarks == {}:
            raise ValueError("is empty, so no model could be scored; add one, such as `captions: {kind: held-out}`")
        return benchmarks

    @field_validator("baselines")
    @classmethod
    def _distinct_models(cls, baselines: list[str]) -> list[str]:
        if not all(name.strip() for name in baselines):
            raise ValueError("an entry is empty; name a model, or remove the entry")
        if repeated := [name for name in dict.fromkeys(baselines) if baselines.count(name) > 1]:
            raise ValueError(f"{', '.join(repeated)}: listed more than once; list each model once")
        return baselines

    @model_validator(mode="after")
    def _start_is_scored(self) -> EvaluateConfig:
        if self.max_short_text_loss is not None and START not in self.baselines:
            raise ValueError(
                f"max_short_text_loss compares each model with the one that training starts from; add {START} to "
                "evaluate.baselines, or set max_short_text_loss to null"
            )
        return self

    @model_validator(mode="after")
    def _own_protocols(self) -> EvaluateConfig:
        for name, entry in self.benchmarks.items():
            if name in PUBLISHED and entry.kind != name and isinstance(entry, PublishedBenchmarkConfig):
                raise ValueError(
                    f"benchmarks.{name}: {name} is the name of another benchmark than its kind, {entry.kind}, and "
                    f"published scores of {name} would be shown; call it {entry.kind} or anything else"
                )
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> EvaluateConfig:
        for name in self.benchmarks:
            if name.endswith(PARTIAL_RUN):
                raise ValueError(f"benchmarks.{name}: the suffix {PARTIAL_RUN} is reserved; choose another name")
        return self
