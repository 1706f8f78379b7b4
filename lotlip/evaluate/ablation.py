"""Evaluation of a trained ablation: each seed's benchmark scores, reading tests and attention scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from lotlip.core.files import atomic_write, weights_hash, write_json, write_record
from lotlip.data.statistics import text_statistics
from lotlip.data.tokenizer import token_counts
from lotlip.evaluate.attention_pictures import attention_pictures, small_jpeg
from lotlip.evaluate.attention_scores import attention_scores
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.conditioned import PatchFeatures, evaluate_conditioned, families, load_pooling, of_families
from lotlip.evaluate.conditioned import protocol as conditioned_protocol
from lotlip.evaluate.config import MAX_CONDITIONED_PAIRS
from lotlip.evaluate.encoders import CachedTextEncoder, LotlipEncoder, Runner
from lotlip.evaluate.evaluate import chances, evaluate, image_features, limits, protocol, unseen_share
from lotlip.evaluate.examples import retrieval_examples, shown_images
from lotlip.evaluate.flops import flops_by_context
from lotlip.evaluate.reading import evaluate_reading, make_reading_test
from lotlip.evaluate.records import NOT_DRAWN, BenchmarkScores, NotDrawn
from lotlip.evaluate.score_names import MAIN_METRICS
from lotlip.figures.charts import in_one_line
from lotlip.models.saving import load_model


@dataclass
class AblationResults:
    """The results of an ablation.

    Attributes:
        results: benchmark → results.
        parameters: part of the model → number of parameters.
        text_tower_flops: tokens per text → FLOPs of the text tower per text.
        texts: number of texts scored, over all seeds.
    """

    results: dict[str, BenchmarkScores] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    text_tower_flops: dict[int, int] = field(default_factory=dict)
    texts: int = 0


def summary(results: Mapping[str, BenchmarkScores]) -> dict[str, dict[str, float]]:
    """Returns benchmark → metric → rounded mean over seeds, of R@1 and top-1 only, for `dvc metrics show`.

    Args:
        results: see `AblationResults`.
    """
    means: dict[str, dict[str, float]] = {}
    for benchmark, result in results.items():
        seeds = list(result.seeds.values())
        main = [name for name in seeds[0] if name in MAIN_METRICS]
        means[benchmark] = {name: round(fmean(scores[name] for scores in seeds), 4) for name in main}
    return means


def measure(
    folder: Path,
    config: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    vocabulary: Sequence[int],
    about: Mapping[str, str],
    how: Runner,
    on_seed: Callable[[int], object] = lambda seed: None,
    max_conditioned_pairs: int = MAX_CONDITIONED_PAIRS,
    encode_images: Callable[[LotlipEncoder, Benchmark], Tensor] = image_features,
) -> AblationResults:
    """Scores every seed of an ablation on every benchmark.

    Args:
        folder: folder of the trained ablation.
        config: its training settings, with "seeds", "text", "image_tower" and, if it needs modules, "loss".
        benchmarks: the benchmarks to score it on.
        vocabulary: word pieces that occur in training texts.
        about: additional entries of the protocol, such as "command".
        how: device, precision and batch size.
        on_seed: called with each seed that is done.
        max_conditioned_pairs: see `EvaluateConfig`; used if `loss.conditioned` was.
        encode_images: returns the features of a benchmark's images by a frozen tower, as `image_features` does.

    Raises:
        ValueError: a benchmark's texts have more unseen word pieces than it allows, an image cannot be read, or a
            seed's weights of the pooling are missing or do not fit.
    """
    measured = AblationResults()
    tokenizer = config["text"]["tokenizer"]
    images: dict[str, Tensor] = {}
    token_ids: dict[str, np.ndarray] = {}  # all seeds have the same tokenizer
    pieces = partial(token_counts, tokenizer)
    loss = config.get("loss", {})
    conditioned = bool(loss.get("conditioned"))
    patches = PatchFeatures(shared=config["image_tower"]["frozen"])
    reading_tests = {b.name: make_reading_test(b.scenes, pieces) for b in benchmarks if b.scenes}
    for seed in config["seeds"]:
        seed_folder = folder / f"seed-{seed}"
        encoder = LotlipEncoder(*load_model(seed_folder), how, token_ids=token_ids)
        model = encoder.model
        pooling = load_pooling(seed_folder, loss, model) if conditioned else None
        measured.parameters = {
            name: sum(weight.numel() for weight in tower.parameters())
            for name, tower in (("text_tower", model.text), ("image_tower", model.image_tower))
        }
        measured.text_tower_flops = measured.text_tower_flops or flops_by_context(model.config)
        for benchmark in benchmarks:
            name, reading_test = benchmark.name, reading_tests.get(benchmark.name)
            cached = CachedTextEncoder(encoder)
            if not config["image_tower"]["frozen"]:
                images[name] = image_features(encoder, benchmark)
            elif name not in images:  # all seeds share a frozen tower
                images[name] = encode_images(encoder, benchmark)
            if name not in measured.results:
                changed = [t for question in reading_test.questions for t in question.changed] if reading_test else []
                unseen = unseen_share(benchmark, tokenizer, vocabulary, changed, encoder.tokenizer.sentence_ends)
                ceiling, repeats = limits(benchmark)
                chance, how_pooled = chances(benchmark), {}
                if pooling:
                    pooled = families(benchmark, max_conditioned_pairs)
                    chance, ceiling = (known | of_families(known, pooled) for known in (chance, ceiling))
                    how_pooled = conditioned_protocol(benchmark, max_conditioned_pairs)
                measured.results[name] = BenchmarkScores(
                    protocol={
                        "model": folder.as_posix(),
                        **protocol(encoder, benchmark),
                        **repeats,
                        **_text_lengths(benchmark, tokenizer),
                        "unseen_token_share": unseen,
                        **how_pooled,
                        **about,
                    },
                    chance=chance,
                    ceiling=ceiling,
                    examples=retrieval_examples(cached, benchmark, images[name]),
                )
            result, scores = measured.results[name], evaluate(cached, benchmark, images[name])
            if pooling and benchmark.retrieval:
                tokens = patches.of(encoder, benchmark)
                scores |= evaluate_conditioned(cached, benchmark, images[name], tokens, pooling, max_conditioned_pairs)
            result.seeds[seed] = dict(scores.values)
            result.intervals[seed] = dict(scores.intervals)
            result.attention[seed] = attention_scores(encoder, benchmark).to_json()
            result.weights_sha256[seed] = weights_hash(seed_folder)
            if reading_test:
                result.reading[seed] = evaluate_reading(cached, reading_test, images[name]).to_json()
            measured.texts += sum(len(texts.texts) for texts in benchmark.retrieval.values())
        on_seed(seed)
    return measured


def combine(parts: Iterable[AblationResults]) -> AblationResults:
    """Combines the results on several benchmarks."""
    combined = AblationResults()
    for part in parts:
        combined.results |= part.results
        combined.parameters, combined.text_tower_flops = part.parameters, part.text_tower_flops
        combined.texts += part.texts
    return combined


def _text_lengths(benchmark: Benchmark, tokenizer: str) -> dict[str, float]:
    """Mean numbers of sub-captions and word pieces of the texts of each kind (paper, Table 1)."""
    found = {kind: text_statistics(texts.texts, tokenizer) for kind, texts in benchmark.retrieval.items()}
    return {
        f"{kind}_{unit}_per_text": value
        for kind, statistics in found.items()
        for unit, value in (
            ("sub_captions", statistics.sub_captions_per_text),
            ("tokens", statistics.tokens_per_text),
        )
    }


def draw(
    folder: Path,
    config: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    how: Runner,
    out: Path,
    results: Mapping[str, BenchmarkScores] | None = None,
) -> NotDrawn:
    """Draws the first seed's figures. Call it after the scores are saved; figures that fail are listed and left out.

    Args:
        folder: folder of the trained ablation.
        config: its training settings, with "seeds".
        benchmarks: the benchmarks it was scored on.
        how: device, precision and batch size.
        out: output folder, written atomically: `<benchmark>-<name>.png`, the attention maps;
            `images/<benchmark>/<index>.jpg`, the images of the examples; and `not-drawn.json`, the failures, if any.
        results: see `AblationResults`, with the examples.

    Returns:
        Benchmark → figure that could not be drawn → reason.
    """
    encoder = LotlipEncoder(*load_model(folder / f"seed-{config['seeds'][0]}"), how)
    problems: NotDrawn = {}
    with atomic_write(out) as unfinished:
        unfinished.mkdir()
        for benchmark in benchmarks:
            failed: dict[str, str] = {}
            for name, png in attention_pictures(encoder, benchmark, failed.__setitem__).items():
                (unfinished / f"{benchmark.name}-{name}.png").write_bytes(png)
            result = (results or {}).get(benchmark.name)
            for number in shown_images(result.examples if result else {}):
                file = unfinished / "images" / benchmark.name / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    file.write_bytes(small_jpeg(benchmark, number))
                except ValueError as error:  # the image cannot be read or decoded
                    failed[f"image {benchmark.images[number]}"] = in_one_line(error)
            if failed:
                problems[benchmark.name] = failed
        if problems:
            write_json(unfinished / NOT_DRAWN, problems)
        write_record(unfinished, out)
    return problems
