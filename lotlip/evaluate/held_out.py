"""A benchmark of the data set's own held-out images."""

from __future__ import annotations

from lotlip.core.paths import Paths
from lotlip.data.partitions import read_captions, unit_names
from lotlip.evaluate.benchmarks import Benchmark, Texts, images_of, version_of
from lotlip.evaluate.config import HeldOutBenchmarkConfig


def held_out_benchmark(name: str, settings: HeldOutBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Short captions as short texts; as long text of an image the one of its captions with the most tokens.

    Raises:
        ValueError: no image is in the split.
    """
    keys, raw, read = images_of(paths.ingest, settings.split, "short_caption")
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
    about = {"split": settings.split, "version": version_of(keys, retrieval)}
    return Benchmark(name, keys, read, retrieval, about=about)
