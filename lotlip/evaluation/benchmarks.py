"""Benchmarks: readers that give images and the texts that belong to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lotlip import config
from lotlip.partitions import read_captions, read_image, read_table, unit_names


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
        name: in params.yaml.
        split: whose images these are.
        places: where each image's bytes lie: partition, offset and size.
        source: folder of the partitions.
        retrieval: "long" and "short" → texts.
        prompts: for classification; None where there are no classes.
    """

    name: str
    split: str
    source: Path
    places: list[tuple[str, int, int]]
    retrieval: Mapping[str, Texts]
    prompts: Prompts | None = None
    max_unseen_tokens: float | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def images(self) -> Iterator[bytes]:
        """The encoded images, one in memory at a time."""
        return (read_image(self.source, *place) for place in self.places)


def open_benchmark(name: str, settings: config.Benchmark, paths: config.Paths, captioners: list[str]) -> Benchmark:
    """Reads a benchmark's texts; its images stay on disk.

    Raises:
        ValueError: the split has another size than params.yaml says, or lacks what the benchmark needs.
    """
    if isinstance(settings, config.ScenesBenchmark):
        return _scenes(name, settings, paths.ingest)
    return _held_out(name, settings, paths, captioners)


def _rows(source: Path, split: str, column: str) -> tuple[list[tuple[str, int, int]], list[tuple[str, str | None]]]:
    """Places of a split's images, and each one's key with one more column."""
    places, values = [], []
    for unit in unit_names(source, split):
        table = read_table(source, unit, ["key", "offset", "size", column])
        places += [(unit, int(offset), int(size)) for offset, size in zip(table["offset"], table["size"], strict=True)]
        values += list(zip(table["key"], table[column], strict=True))
    return places, values


def _scenes(name: str, settings: config.ScenesBenchmark, source: Path) -> Benchmark:
    from lotlip.evaluation.scenes import label, long_text, shape_prompts, short_text
    from lotlip.sources.scenes import Scene

    places, rows = _rows(source, settings.split, "scene")
    if len(places) != settings.size:
        raise ValueError(
            f"benchmark {name}: {source}/{settings.split} has {len(places)} scenes, but "
            f"evaluate.benchmarks.{name}.size is {settings.size}; scores of another size cannot be compared"
        )
    if not all(isinstance(scene, str) for _, scene in rows):
        raise ValueError(f"benchmark {name}: the images in {source} are not generated scenes; use `kind: held-out`")
    scenes = [Scene.from_json(json.loads(str(scene))) for _, scene in rows]
    every = list(range(len(scenes)))
    return Benchmark(
        name=name,
        split=settings.split,
        source=source,
        places=places,
        retrieval={
            "long": Texts([long_text(scene) for scene in scenes], every),
            "short": Texts([short_text(scene) for scene in scenes], every),
        },
        prompts=Prompts(shape_prompts(), [label(scene) for scene in scenes]),
        max_unseen_tokens=settings.max_unseen_tokens,
        about={"texts": "frames that no training caption uses, words that they do use"},
    )


def _held_out(name: str, settings: config.HeldOutBenchmark, paths: config.Paths, captioners: list[str]) -> Benchmark:
    """Raw captions as short texts; as long text of an image the one of its captions with the most tokens."""
    places, rows = _rows(paths.ingest, settings.split, "raw_caption")
    if not places:
        raise ValueError(
            f"benchmark {name}: no image is in the split {settings.split!r}; raise its share in params.yaml"
        )
    retrieval = {"short": Texts([str(caption) for _, caption in rows], list(range(len(rows))))}
    longest: dict[str, tuple[int, str]] = {}
    for captioner in captioners:
        for unit in unit_names(paths.captions / captioner, settings.split):
            table = read_captions(paths.captions / captioner, unit, ["key", "text", "tokens"])
            for key, text, tokens in zip(table["key"], table["text"], table["tokens"], strict=True):
                longest[key] = max(longest.get(key, (0, "")), (int(tokens), text))
    described = [(index, longest[key][1]) for index, (key, _) in enumerate(rows) if key in longest]
    if described:
        retrieval["long"] = Texts([text for _, text in described], [index for index, _ in described])
    return Benchmark(name, settings.split, paths.ingest, places, retrieval)
