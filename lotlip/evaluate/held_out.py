"""A benchmark of held-out images of the data set."""

from __future__ import annotations

import random
from collections.abc import Callable

from lotlip.core.paths import Paths
from lotlip.data.partitions import read_captions, unit_names
from lotlip.data.text import join_sub_captions, sample_long_text
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, split_images, version_of
from lotlip.evaluate.config import HeldOutBenchmarkConfig

Described = dict[str, tuple[int, str, list[str]]]  # captioner → number of tokens, text and sub-captions


def held_out_benchmark(name: str, settings: HeldOutBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Opens the benchmark. Short captions are short texts; long captions, or windows of them, are long texts.

    Raises:
        ValueError: the split is empty or smaller than `settings.size`, or there are no captions to draw windows from.
    """
    keys, raw, read = split_images(paths.ingest, settings.split, "short_caption")
    if not keys:
        raise ValueError(
            f"benchmark {name}: the split {settings.split!r} has no images; raise its share in params.yaml"
        )
    if len(keys) < (settings.size or 0):
        raise ValueError(
            f"benchmark {name}: the split {settings.split!r} has {len(keys)} images, but "
            f"evaluate.benchmarks.{name}.size is {settings.size}; lower it, or raise the split's share in params.yaml"
        )
    keys, raw = keys[: settings.size], raw[: settings.size]
    retrieval = {"short": ImageTexts([str(caption) for caption in raw], list(range(len(keys))))}
    captions = _captions(settings.split, paths, captioners)
    long_text = _longest if settings.sub_captions is None else _window_of(settings.sub_captions)
    described = [(index, long_text(key, captions[key])) for index, key in enumerate(keys) if key in captions]
    if settings.sub_captions is not None and not described:
        raise ValueError(
            f"benchmark {name}: no captioner has described an image of the split {settings.split!r}, so it has no long "
            f"texts; caption the split, or remove evaluate.benchmarks.{name}.sub_captions"
        )
    if described:
        retrieval["long"] = ImageTexts([text for _, text in described], [index for index, _ in described])
    about = {"split": settings.split, "version": version_of(keys, retrieval)}
    return Benchmark(name, keys, read, retrieval, about=about)


def _captions(split: str, paths: Paths, captioners: list[str]) -> dict[str, Described]:
    """Key → the image's captions."""
    found: dict[str, Described] = {}
    for captioner in captioners:
        for unit in unit_names(paths.captions / captioner, split):
            table = read_captions(paths.captions / captioner, unit, ["key", "text", "sub_captions", "tokens"])
            for key, text, parts, tokens in zip(*(table[column] for column in table), strict=True):
                found.setdefault(key, {})[captioner] = (int(tokens), text, parts)
    return found


def _longest(key: str, captions: Described) -> str:
    """The caption with most tokens; of several, the last in alphabetical order."""
    return max((tokens, text) for tokens, text, _ in captions.values())[1]


def _window_of(length: int) -> Callable[[str, Described], str]:
    """Draws windows as training does (paper, Figs. 2 and 5), one for each image, by its key and its captioners."""

    def window(key: str, captions: Described) -> str:
        parts = {captioner: sub_captions for captioner, (_, _, sub_captions) in captions.items()}
        return join_sub_captions(sample_long_text(parts, "window", length, random.Random(key))) + "."

    return window
