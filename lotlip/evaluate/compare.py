"""Several models on several benchmarks, side by side: a table for people, and everything that was measured as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lotlip.core.paths import Paths
from lotlip.data.index import UnitIndex, read_index
from lotlip.evaluate.benchmarks import Benchmark, open_benchmark
from lotlip.evaluate.ceiling import repeats_in_words
from lotlip.evaluate.config import PUBLISHED, PublishedBenchmarkConfig, SceneBenchmarkConfig
from lotlip.evaluate.encoders import Encoder
from lotlip.evaluate.evaluate import chances, evaluate, image_features, limits, protocol
from lotlip.evaluate.metrics import Scores
from lotlip.evaluate.reference import REFERENCE, SOURCE, Reference
from lotlip.evaluate.score_names import Metric

SCENES = "scenes"
# What a table shows of a benchmark, where it has it.
SHOWN = {
    Metric.LONG_IMAGE_TO_TEXT_R1: "long, i→t",
    Metric.LONG_TEXT_TO_IMAGE_R1: "long, t→i",
    Metric.SHORT_IMAGE_TO_TEXT_R1: "short, i→t",
    Metric.SHORT_TEXT_TO_IMAGE_R1: "short, t→i",
    Metric.CLASSIFICATION_TOP1: "top-1",
}


@dataclass(frozen=True)
class Result:
    """What a model scored on a benchmark, and how that was measured.

    Attributes:
        model: as it was asked for.
        benchmark: its name; a partial run's ends in "-partial".
        scores: all of them.
        chance: what guessing scores.
        ceiling: the best that repeated texts and images allow for each recall.
        protocol: all that decides the scores.
    """

    model: str
    benchmark: str
    scores: Scores
    chance: dict[str, float]
    ceiling: dict[str, float]
    protocol: dict[str, str | int]


def ask(name: str, data: Path, images: Path | None = None, partial: bool = False) -> Benchmark:
    """A benchmark by its name.

    Args:
        name: "scenes", or a published one, as of `PublishedBenchmarkConfig.kind`.
        data: its folder; of scenes what ingest left, whose test split is asked.
        images: where its images are, if not in `data`.
        partial: whether a part of a published one will do.

    Raises:
        ValueError: there is no such benchmark, or its folder is not as it must be.
    """
    if name in PUBLISHED:
        wanted = PublishedBenchmarkConfig(kind=name, folder=data, images=images, partial=partial)  # type: ignore[arg-type]
        return open_benchmark(name, wanted, Paths(), [])
    if name != SCENES:
        raise ValueError(f"there is no benchmark {name!r}; choose {SCENES}, {', '.join(PUBLISHED)}")
    if images or partial:
        raise ValueError(f"{SCENES} have their images with them, and any number will do: leave out images and partial")
    units = read_index(data, UnitIndex).units
    size = sum(unit.written for unit in units if unit.name.startswith("test/"))
    if not size:
        raise ValueError(f"{data} has no scene in its test split")
    settings = SceneBenchmarkConfig(kind="scenes", size=size)
    return open_benchmark(name, settings, Paths(ingest=data), [])


def compare(
    models: Iterable[tuple[str, Encoder]],
    benchmarks: Sequence[Benchmark],
    command: str,
    on_start: Callable[[str, str, int], object] = lambda model, benchmark, items: None,
) -> list[Result]:
    """Scores every model on every benchmark, a model after the other.

    Args:
        models: what to call them, and they themselves.
        benchmarks: what to ask.
        command: that measures the same again, for the protocol.
        on_start: told of a model and a benchmark, and how many images and texts will be encoded.

    Raises:
        ValueError: an image cannot be read.
    """
    results = []
    limit = {benchmark.name: limits(benchmark) for benchmark in benchmarks}
    for name, encoder in models:
        for benchmark in benchmarks:
            on_start(name, benchmark.name, _items(benchmark))
            scores = evaluate(encoder, benchmark, image_features(encoder, benchmark))
            ceiling, repeats = limit[benchmark.name]
            about = {"benchmark": benchmark.name, **protocol(encoder, benchmark), **repeats, "command": command}
            results.append(Result(name, benchmark.name, scores, chances(benchmark), ceiling, about))
    return results


def _items(benchmark: Benchmark) -> int:
    texts = sum(len(found.texts) for found in benchmark.retrieval.values())
    prompts = sum(len(found) for found in benchmark.prompts.classes) if benchmark.prompts else 0
    return len(benchmark.images) + texts + prompts


def to_json(results: Sequence[Result]) -> dict[str, Any]:
    """All of it, with what was published on the same benchmarks."""
    asked = {result.benchmark for result in results}
    published = {
        reference.model: {name: dict(scores) for name, scores in reference.scores.items() if name in asked}
        for reference in REFERENCE
    }
    return {
        "results": [
            {
                "model": result.model,
                "benchmark": result.benchmark,
                "scores": dict(result.scores.values),
                "intervals": {name: list(ends) for name, ends in result.scores.intervals.items()},
                "chance": result.chance,
                "ceiling": result.ceiling,
                "protocol": result.protocol,
            }
            for result in results
        ],
        "published": {"source": SOURCE, "models": {model: scores for model, scores in published.items() if scores}},
    }


def table(results: Sequence[Result], references: Sequence[Reference] = REFERENCE) -> list[str]:
    """One table as lines: a row for each model, then for what was published; columns by benchmark, in percent.

    Where repeated texts or images keep every model from 100 %, a row "best possible" follows the models.
    A partial run has its own name, so that no published score stands below it.
    """
    columns = list(
        dict.fromkeys((result.benchmark, name) for result in results for name in SHOWN if name in result.scores.values)
    )
    found = {(result.model, result.benchmark): result.scores for result in results}
    rows = [
        [model, *(_cell(found[model, benchmark], metric) for benchmark, metric in columns)]
        for model in dict.fromkeys(result.model for result in results)
    ]
    limits = {(result.benchmark, metric): value for result in results for metric, value in result.ceiling.items()}
    limited = [limits.get(column, 1.0) for column in columns]
    if min(limited, default=1.0) < 1:
        rows.append(["best possible", *("" if value == 1 else f"{100 * value:.1f}" for value in limited)])
    published = []
    for reference in references:
        scores = [reference.scores.get(benchmark, {}).get(metric) for benchmark, metric in columns]
        if any(score is not None for score in scores):
            shown = ["" if score is None else f"{100 * score:.1f}" for score in scores]
            published.append([f"{reference.model} (published)", *shown])
    heads = [
        ["", *_once([benchmark for benchmark, _ in columns])],
        ["model", *(SHOWN[metric] for _, metric in columns)],
    ]
    lines = _aligned([*heads, *rows, *published])
    lines.append("R@1 (i→t: image to text, t→i: text to image) and top-1 in percent; in brackets: 95 % confidence")
    lines += _repeats(results)
    return [*lines, f"(published): {SOURCE}"] if published else lines


def _repeats(results: Sequence[Result]) -> list[str]:
    """A line for each benchmark whose ceiling is below 100 %: what is repeated in it."""
    lines = {}
    for result in results:
        if min(result.ceiling.values(), default=1.0) < 1:
            lines[result.benchmark] = f"best possible: {result.benchmark} has {repeats_in_words(result.protocol)}"
    return list(lines.values())


def _cell(scores: Scores, metric: str) -> str:
    value = scores.values.get(metric)
    if value is None:
        return ""
    ends = scores.intervals.get(metric)
    around = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
    return f"{100 * value:.1f}{around}"


def _once(names: list[str]) -> list[str]:
    """A name stands above the first of its columns."""
    return [name if place == 0 or names[place - 1] != name else "" for place, name in enumerate(names)]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows with a line below the two of the head; names flush left, numbers below their heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines[:2], "  ".join("-" * width for width in widths), *lines[2:]]
