"""Benchmarks: readers that give images and the texts that belong to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotlip.core.files import sha256_json
from lotlip.core.paths import Paths
from lotlip.data.partitions import read_captions, stored_images, unit_names
from lotlip.evaluate.config import (
    BenchmarkConfig,
    HeldOutBenchmarkConfig,
    PublishedBenchmarkConfig,
    SceneBenchmarkConfig,
)

if TYPE_CHECKING:
    from lotlip.demo.world import Scene


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

    Raises:
        ValueError: the benchmark has another size than it should, or lacks what it needs.
    """
    if isinstance(settings, PublishedBenchmarkConfig):
        from lotlip.evaluate.published import published_benchmark

        return published_benchmark(settings.kind, settings.folder, settings.images, settings.partial, name)
    if isinstance(settings, SceneBenchmarkConfig):
        return _scenes(name, settings, paths.ingest)
    return _held_out(name, settings, paths, captioners)


def _split(source: Path, split: str, column: str) -> tuple[list[str], list[Any], Callable[[int], bytes]]:
    """Of the images of a split of partitions the names, another column, and what reads each by its number."""
    found = list(stored_images(source, unit_names(source, split), column))
    return [key for key, _, _ in found], [value for _, value, _ in found], lambda number: found[number][2]()


def _scenes(name: str, settings: SceneBenchmarkConfig, source: Path) -> Benchmark:
    from lotlip.demo.questions import label, long_text, shape_prompts, short_text
    from lotlip.demo.world import Scene

    keys, drawn, read = _split(source, settings.split, "scene")
    if len(keys) != settings.size:
        raise ValueError(
            f"benchmark {name}: {source}/{settings.split} has {len(keys)} scenes, but "
            f"evaluate.benchmarks.{name}.size is {settings.size}; scores of another size cannot be compared"
        )
    if not all(isinstance(scene, str) for scene in drawn):
        raise ValueError(f"benchmark {name}: the images in {source} are not generated scenes; use `kind: held-out`")
    scenes = [Scene.from_json(json.loads(str(scene))) for scene in drawn]
    every = list(range(len(scenes)))
    retrieval = {
        "long": Texts([long_text(scene) for scene in scenes], every),
        "short": Texts([short_text(scene) for scene in scenes], every),
    }
    return Benchmark(
        name=name,
        images=keys,
        read=read,
        retrieval=retrieval,
        prompts=Prompts(shape_prompts(), [label(scene) for scene in scenes]),
        max_unseen_tokens=settings.max_unseen_tokens,
        about={
            "split": settings.split,
            "version": _version(keys, retrieval),
            "texts": "frames that no training caption uses, words that they do use",
        },
        scenes=scenes,
    )


def _held_out(name: str, settings: HeldOutBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Raw captions as short texts; as long text of an image the one of its captions with the most tokens."""
    keys, raw, read = _split(paths.ingest, settings.split, "short_caption")
    if not keys:
        raise ValueError(
            f"benchmark {name}: no image is in the split {settings.split!r}; raise its share in params.yaml"
        )
    retrieval = {"short": Texts([str(caption) for caption in raw], list(range(len(keys))))}
    longest: dict[str, tuple[int, str]] = {}
    for captioner in captioners:
        for unit in unit_names(paths.captions / captioner, settings.split):
            table = read_captions(paths.captions / captioner, unit, ["key", "text", "tokens"])
            for key, text, tokens in zip(table["key"], table["text"], table["tokens"], strict=True):
                longest[key] = max(longest.get(key, (0, "")), (int(tokens), text))
    described = [(index, longest[key][1]) for index, key in enumerate(keys) if key in longest]
    if described:
        retrieval["long"] = Texts([text for _, text in described], [index for index, _ in described])
    about = {"split": settings.split, "version": _version(keys, retrieval)}
    return Benchmark(name, keys, read, retrieval, about=about)


def _version(images: Sequence[str], retrieval: Mapping[str, Texts]) -> str:
    """Hash of the images' names and their texts: equal where the same is asked."""
    asked = {
        kind: sorted([images[image], text] for text, image in zip(texts.texts, texts.image, strict=True))
        for kind, texts in retrieval.items()
    }
    return sha256_json(asked)
