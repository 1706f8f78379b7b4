"""A benchmark of held-out images of the data set."""

from __future__ import annotations

from lotlip.core.paths import Paths
from lotlip.data.partitions import read_captions, unit_names
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, split_images, version_of
from lotlip.evaluate.config import HeldOutBenchmarkConfig


def held_out_benchmark(name: str, settings: HeldOutBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Opens the benchmark: short captions are short texts, and the longest caption of an image is its long text.

    Raises:
        ValueError: the split is empty.
    """
    keys, raw, read = split_images(paths.ingest, settings.split, "short_caption")
    if not keys:
        raise ValueError(
            f"benchmark {name}: the split {settings.split!r} has no images; raise its share in params.yaml"
        )
    retrieval = {"short": ImageTexts([str(caption) for caption in raw], list(range(len(keys))))}
    longest: dict[str, tuple[int, str]] = {}
    for captioner in captioners:
        for unit in unit_names(paths.captions / captioner, settings.split):
            table = read_captions(paths.captions / captioner, unit, ["key", "text", "tokens"])
            for key, text, tokens in zip(table["key"], table["text"], table["tokens"], strict=True):
                longest[key] = max(longest.get(key, (0, "")), (int(tokens), text))
    described = [(index, longest[key][1]) for index, key in enumerate(keys) if key in longest]
    if described:
        retrieval["long"] = ImageTexts([text for _, text in described], [index for index, _ in described])
    about = {"split": settings.split, "version": version_of(keys, retrieval)}
    return Benchmark(name, keys, read, retrieval, about=about)
