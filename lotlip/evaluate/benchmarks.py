"""Benchmarks: readers that give images and the texts that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotlip.core.files import sha256_json
from lotlip.core.paths import Paths
from lotlip.core.variants import implementation
from lotlip.data.partitions import stored_images, unit_names
from lotlip.evaluate.config import PUBLISHED, BenchmarkConfig

if TYPE_CHECKING:
    from lotlip.demo.world import Scene

_BUILT_IN = {
    "scenes": "lotlip.evaluate.scenes:scene_benchmark",
    "held-out": "lotlip.evaluate.held_out:held_out_benchmark",
}
_PUBLISHED = "lotlip.evaluate.published:open_published"


@dataclass(frozen=True)
class Texts:
    """Texts of one kind, each belonging to one image.

    Attributes:
        texts: the texts.
        image: index of each text's image.
    """

    texts: list[str]
    image: list[int]


@dataclass(frozen=True)
class Prompts:
    """Zero-shot classification.

    Attributes:
        classes: several prompts for each class.
        labels: each image's class.
    """

    classes: list[list[str]]
    labels: list[int]


@dataclass(frozen=True)
class Benchmark:
    """Images with what is asked of them.

    Attributes:
        name: that scores are filed under; a partial run's ends in "-partial", so that the word is wherever they are.
        images: name of each image, unique.
        read: number of an image → its encoded bytes.
        retrieval: "long" and "short" → texts.
        prompts: for classification; None where there are no classes.
        max_unseen_tokens: share of the texts' word pieces that no training text may have; None where any may.
        about: what its protocol says of it, such as "split" and "version".
        scenes: of each image, where it is a generated one and all is known of it; else none.
    """

    name: str
    images: Sequence[str]
    read: Callable[[int], bytes]
    retrieval: Mapping[str, Texts]
    prompts: Prompts | None = None
    max_unseen_tokens: float | None = None
    about: Mapping[str, str | int] = field(default_factory=dict)
    scenes: Sequence[Scene] = ()


def open_benchmark(name: str, settings: BenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Reads a benchmark's texts; its images stay on disk.

    Args:
        name: that its scores are filed under.
        settings: `evaluate.benchmarks.<name>` of params.yaml.
        paths: of the partitions and captions.
        captioners: whose captions may be texts.

    Raises:
        ValueError: the benchmark has another size than it should, or lacks what it needs.
    """
    opened = implementation("lotlip.benchmarks", settings.kind, _BUILT_IN | dict.fromkeys(PUBLISHED, _PUBLISHED))
    return opened(name, settings, paths, captioners)


def images_of(source: Path, split: str, column: str) -> tuple[list[str], list[Any], Callable[[int], bytes]]:
    """Of the images of a split of partitions the names, another column, and what reads each by its number."""
    found = list(stored_images(source, unit_names(source, split), column))
    return [key for key, _, _ in found], [value for _, value, _ in found], lambda number: found[number][2]()


def version_of(images: Sequence[str], retrieval: Mapping[str, Texts]) -> str:
    """Hash of the images' names and their texts: equal where the same is asked."""
    asked = {
        kind: sorted([images[image], text] for text, image in zip(texts.texts, texts.image, strict=True))
        for kind, texts in retrieval.items()
    }
    return sha256_json(asked)
