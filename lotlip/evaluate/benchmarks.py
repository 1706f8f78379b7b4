"""Benchmarks: images with texts for retrieval and prompts for classification."""

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
class ImageTexts:
    """Texts of one kind, each belonging to one image.

    Attributes:
        texts: the texts.
        image: index of each text's image.
    """

    texts: list[str]
    image: list[int]


@dataclass(frozen=True)
class Prompts:
    """Prompts for zero-shot classification.

    Attributes:
        classes: the prompts of each class.
        labels: the class of each image.
    """

    classes: list[list[str]]
    labels: list[int]


@dataclass(frozen=True)
class Benchmark:
    """Images with texts and prompts.

    Attributes:
        name: name that scores are stored under; that of a partial run ends in "-partial".
        images: unique name of each image.
        read: index of an image → its encoded bytes.
        retrieval: "long" and "short" → texts.
        prompts: prompts for classification; None if there are no classes.
        max_unseen_tokens: maximum share of the texts' word pieces that occur in no training text; None for no limit.
        about: entries for the protocol, such as "split" and "version".
        scenes: the scene of each image if images are generated; else empty.
        sentence_texts: number of long texts, from the first, for `lotlip.evaluate.sentence_scores`; None: all.
    """

    name: str
    images: Sequence[str]
    read: Callable[[int], bytes]
    retrieval: Mapping[str, ImageTexts]
    prompts: Prompts | None = None
    max_unseen_tokens: float | None = None
    about: Mapping[str, str | int] = field(default_factory=dict)
    scenes: Sequence[Scene] = ()
    sentence_texts: int | None = None


def open_benchmark(name: str, settings: BenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Opens a benchmark. Texts are read now, images when they are used.

    Args:
        name: name that its scores are stored under.
        settings: `evaluate.benchmarks.<name>` of params.yaml.
        paths: locations of the partitions and captions.
        captioners: captioners whose captions may be texts.

    Raises:
        ValueError: the benchmark has an unexpected size or is incomplete.
    """
    open_kind = implementation("lotlip.benchmarks", settings.kind, _BUILT_IN | dict.fromkeys(PUBLISHED, _PUBLISHED))
    return open_kind(name, settings, paths, captioners)


def split_images(source: Path, split: str, column: str) -> tuple[list[str], list[Any], Callable[[int], bytes]]:
    """Returns the keys of a split's images, another column, and a function from an image's index to its bytes."""
    images = list(stored_images(source, unit_names(source, split), column))
    return [key for key, _, _ in images], [value for _, value, _ in images], lambda number: images[number][2]()


def version_of(images: Sequence[str], retrieval: Mapping[str, ImageTexts]) -> str:
    """Hashes the names of the images and their texts, independent of the order."""
    pairs = {
        kind: sorted([images[image], text] for text, image in zip(texts.texts, texts.image, strict=True))
        for kind, texts in retrieval.items()
    }
    return sha256_json(pairs)
