"""Comparison of several models on several benchmarks, as a text table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lotlip.core.paths import Paths
from lotlip.data.index import UnitIndex, read_index
from lotlip.evaluate.benchmarks import Benchmark, open_benchmark
from lotlip.evaluate.ceiling import repeats_in_words
from lotlip.evaluate.conditioned import CANDIDATES, PatchFeatures, Pooling, evaluate_conditioned, families, of_families
from lotlip.evaluate.conditioned import protocol as conditioned_protocol
from lotlip.evaluate.config import (
    MAX_CONDITIONED_PAIRS,
    PUBLISHED,
    PublishedBenchmarkConfig,
    SceneBenchmarkConfig,
)
from lotlip.evaluate.encoders import CachedTextEncoder, Encoder, LotlipEncoder
from lotlip.evaluate.evaluate import chances, evaluate, image_features, limits, protocol
from lotlip.evaluate.metrics import Scores
from lotlip.evaluate.reference import REFERENCE, Reference, sources
from lotlip.evaluate.score_names import CONDITIONED, RERANKED, Metric
from lotlip.evaluate.sentence_scores import asked_texts

SCENES = "scenes"
# Metric → column heading in the table.
SHOWN = {
    Metric.LONG_IMAGE_TO_TEXT_R1: "long, i→t",
    Metric.LONG_TEXT_TO_IMAGE_R1: "long, t→i",
    Metric.SHORT_IMAGE_TO_TEXT_R1: "short, i→t",
    Metric.SHORT_TEXT_TO_IMAGE_R1: "short, t→i",
    Metric.CLASSIFICATION_TOP1: "top-1",
}
# Prefix of the scores in a row → how the row's name ends.
ROWS = {"": "", CONDITIONED: " (conditioned)", RERANKED: " (re-ranked)"}


@dataclass(frozen=True)
class Result:
    """The scores of a model on a benchmark.

    Attributes:
        model: name of the model, as given.
        benchmark: name of the benchmark; that of a partial run ends in "-partial".
        scores: all scores.
        chance: metric → the value expected from guessing.
        ceiling: recall → the best value that repeated texts and images allow.
        protocol: everything that determines the scores.
    """

    model: str
    benchmark: str
    scores: Scores
    chance: dict[str, float]
    ceiling: dict[str, float]
    protocol: dict[str, str | int]


def load_benchmark(name: str, data: Path, images: Path | None = None, partial: bool = False) -> Benchmark:
    """Opens a benchmark by its name.

    Args:
        name: "scenes", or the name of a published benchmark, see `PublishedBenchmarkConfig.kind`.
        data: its folder; for scenes, the output of ingest, whose test split is used.
        images: folder of its images, if not in `data`.
        partial: whether an incomplete published benchmark is accepted.

    Raises:
        ValueError: there is no such benchmark, or its folder is incomplete.
    """
    if name in PUBLISHED:
        settings = PublishedBenchmarkConfig(kind=name, folder=data, images=images, partial=partial)  # type: ignore[arg-type]
        return open_benchmark(name, settings, Paths(), [])
    if name != SCENES:
        raise ValueError(f"there is no benchmark {name!r}; choose from {SCENES}, {', '.join(PUBLISHED)}")
    if images or partial:
        raise ValueError(f"benchmark {SCENES} takes neither a folder of images nor a partial run; leave them out")
    units = read_index(data, UnitIndex).units
    size = sum(unit.written for unit in units if unit.name.startswith("test/"))
    if not size:
        raise ValueError(f"{data} has no scenes in its test split; run ingest with a larger test share")
    return open_benchmark(name, SceneBenchmarkConfig(kind="scenes", size=size), Paths(ingest=data), [])


def compare(
    models: Iterable[tuple[str, Encoder]],
    benchmarks: Sequence[Benchmark],
    command: str,
    on_start: Callable[[str, str, int], object] = lambda model, benchmark, items: None,
    poolings: Mapping[str, Pooling | str | None] = MappingProxyType({}),
    max_conditioned_pairs: int = MAX_CONDITIONED_PAIRS,
) -> list[Result]:
    """Scores every model on every benchmark, one model at a time.

    Args:
        models: name and encoder of each model.
        benchmarks: the benchmarks.
        command: command that reproduces the scores, for the protocol.
        on_start: called with model, benchmark, and the number of images and texts to encode.
        poolings: name of a model → the pooling it is scored with as well, or why it is not; see `saved_pooling`.
        max_conditioned_pairs: see `EvaluateConfig`.

    Raises:
        ValueError: an image cannot be read.
    """
    results = []
    limit = {benchmark.name: limits(benchmark) for benchmark in benchmarks}
    for name, encoder in models:
        for benchmark in benchmarks:
            pooling = poolings.get(name) if benchmark.retrieval else None
            on_start(name, benchmark.name, _items(benchmark, pooled=isinstance(pooling, Pooling)))
            cached, images = CachedTextEncoder(encoder), image_features(encoder, benchmark)
            scores, chance = evaluate(cached, benchmark, images), chances(benchmark)
            ceiling, repeats = limit[benchmark.name]
            how_pooled: dict[str, str | int] = {}
            if isinstance(pooling, Pooling) and isinstance(encoder, LotlipEncoder):
                patches = PatchFeatures(shared=False).of(encoder, benchmark)
                scores |= evaluate_conditioned(cached, benchmark, images, patches, pooling, max_conditioned_pairs)
                found = families(benchmark, max_conditioned_pairs)
                chance, ceiling = (known | of_families(known, found) for known in (chance, ceiling))
                how_pooled = conditioned_protocol(benchmark, max_conditioned_pairs)
            elif isinstance(pooling, str):
                how_pooled = {"not_conditioned": pooling}
            about = {
                "benchmark": benchmark.name,
                **protocol(encoder, benchmark),
                **repeats,
                **how_pooled,
                "command": command,
            }
            results.append(Result(name, benchmark.name, scores, chance, ceiling, about))
    return results


def _items(benchmark: Benchmark, pooled: bool) -> int:
    """Number of images and distinct texts to encode; images are encoded twice if their patches are pooled."""
    texts = {text for kind in benchmark.retrieval.values() for text in kind.texts}
    texts |= {prompt for prompts in (benchmark.prompts.classes if benchmark.prompts else ()) for prompt in prompts}
    if "long" in benchmark.retrieval:
        texts |= asked_texts(benchmark.retrieval["long"], benchmark.sentence_texts)
    return len(benchmark.images) * (2 if pooled else 1) + len(texts)


def to_json(results: Sequence[Result]) -> dict[str, Any]:
    """Converts the results to JSON types, with published scores on the same benchmarks."""
    names = {result.benchmark for result in results}
    shown = [reference for reference in REFERENCE if names & set(reference.scores)]
    published = {
        reference.model: {name: dict(scores) for name, scores in reference.scores.items() if name in names}
        for reference in shown
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
        "published": {"sources": {reference.model: reference.source for reference in shown}, "models": published},
    }


def table(results: Sequence[Result], references: Sequence[Reference] = REFERENCE) -> list[str]:
    """Formats a table in percent: a row per model, then published scores; a column per benchmark and metric.

    A model whose patches texts pool has a row for each way of retrieval; see `ROWS`. A row "best possible" follows the
    models if repeated texts or images make 100 % impossible. A partial run has its own name, so published scores are
    not shown for it.
    """
    columns = list(
        dict.fromkeys((result.benchmark, name) for result in results for name in SHOWN if name in result.scores.values)
    )
    scores_of = {(result.model, result.benchmark): result.scores for result in results}
    rows = [
        [f"{model}{ending}", *cells]
        for model in dict.fromkeys(result.model for result in results)
        for prefix, ending in ROWS.items()
        if any(cells := [_cell(scores_of[model, name], f"{prefix}{metric}") for name, metric in columns]) or not prefix
    ]
    limits = {(result.benchmark, metric): value for result in results for metric, value in result.ceiling.items()}
    limited = [limits.get(column, 1.0) for column in columns]
    if min(limited, default=1.0) < 1:
        rows.append(["best possible", *("" if value == 1 else f"{100 * value:.1f}" for value in limited)])
    published, shown_references = [], []
    for reference in references:
        scores = [reference.scores.get(benchmark, {}).get(metric) for benchmark, metric in columns]
        if any(score is not None for score in scores):
            shown = ["" if score is None else f"{100 * score:.1f}" for score in scores]
            published.append([f"{reference.model} (published)", *shown])
            shown_references.append(reference)
    header = [
        ["", *_once([benchmark for benchmark, _ in columns])],
        ["model", *(SHOWN[metric] for _, metric in columns)],
    ]
    lines = _aligned([*header, *rows, *published])
    lines.append(
        "R@1 (i→t: image to text, t→i: text to image) and top-1 in percent; brackets: 95 % confidence interval"
    )
    if any(row[0].endswith(ROWS[RERANKED]) for row in rows):
        lines.append(
            "(conditioned): image features that each text pools from the patches (FLAIR), of all pairs; (re-ranked): "
            f"of the best {CANDIDATES} candidates by the images' own features"
        )
    lines += _repeats(results) + _left_out(results)
    return [*lines, f"(published): {sources(shown_references)}"] if published else lines


def _repeats(results: Sequence[Result]) -> list[str]:
    """Names the repeated texts and images of each benchmark whose ceiling is below 100 %."""
    lines = {}
    for result in results:
        if min(result.ceiling.values(), default=1.0) < 1:
            lines[result.benchmark] = f"best possible: {result.benchmark} has {repeats_in_words(result.protocol)}"
    return list(lines.values())


def _left_out(results: Sequence[Result]) -> list[str]:
    """Says which models have no scores of pooled features on a benchmark, and why."""
    return [
        f"not conditioned: {result.model} on {result.benchmark}: {result.protocol['not_conditioned']}"
        for result in results
        if "not_conditioned" in result.protocol
    ]


def _cell(scores: Scores, metric: str) -> str:
    value = scores.values.get(metric)
    if value is None:
        return ""
    bounds = scores.intervals.get(metric)
    interval = f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else ""
    return f"{100 * value:.1f}{interval}"


def _once(names: list[str]) -> list[str]:
    """Blanks names that repeat the previous column's."""
    return [name if place == 0 or names[place - 1] != name else "" for place, name in enumerate(names)]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Aligns columns and adds a rule below the two header rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines[:2], "  ".join("-" * width for width in widths), *lines[2:]]
