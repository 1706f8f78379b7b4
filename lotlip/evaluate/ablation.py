"""All that is measured of a trained ablation: its seeds' scores, how far they read, where their attention goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from lotlip.core.files import atomic_write, weights_hash, write_json, write_record
from lotlip.data.tokenizer import token_counts
from lotlip.evaluate.attention_pictures import attention_pictures, small_jpeg
from lotlip.evaluate.attention_scores import attention_scores
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import EachTextOnce, LotlipEncoder, Runner
from lotlip.evaluate.evaluate import chances, evaluate, image_features, limits, protocol, unseen_share
from lotlip.evaluate.examples import retrieval_examples, shown_images
from lotlip.evaluate.flops import flops_by_context
from lotlip.evaluate.reading import make_quiz, read_to_the_end
from lotlip.evaluate.records import NOT_DRAWN, BenchmarkScores, NotDrawn
from lotlip.evaluate.score_names import MAIN_METRICS
from lotlip.figures.charts import in_one_line
from lotlip.models.saving import load_model


@dataclass
class Measured:
    """What was found.

    Attributes:
        results: benchmark → results.
        parameters: part of the model → number of parameters.
        text_tower_flops: tokens of a text → floating-point operations of the text tower on it.
        texts: that were scored, over all seeds.
    """

    results: dict[str, BenchmarkScores] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    text_tower_flops: dict[int, int] = field(default_factory=dict)
    texts: int = 0


def summary(results: Mapping[str, BenchmarkScores]) -> dict[str, dict[str, float]]:
    """Benchmark → metric → the mean over seeds, rounded, of R@1 and top-1 alone: what `dvc metrics show` shows.

    Args:
        results: as of `Measured`.
    """
    found: dict[str, dict[str, float]] = {}
    for benchmark, result in results.items():
        seeds = list(result.seeds.values())
        main = [name for name in seeds[0] if name in MAIN_METRICS]
        found[benchmark] = {name: round(fmean(scores[name] for scores in seeds), 4) for name in main}
    return found


def measure(
    folder: Path,
    config: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    vocabulary: Sequence[int],
    about: Mapping[str, str],
    how: Runner,
    on_seed: Callable[[int], object] = lambda seed: None,
) -> Measured:
    """Scores every seed of an ablation on every benchmark.

    Args:
        folder: of the trained ablation.
        config: it was trained with: "seeds", "text" and "image_tower".
        benchmarks: what to ask.
        vocabulary: word pieces that training texts have.
        about: what else the protocol says, such as "command".
        how: device, precision and batch size.
        on_seed: told of each seed that is done.

    Raises:
        ValueError: a benchmark's texts have more unseen word pieces than it allows, or an image cannot be read.
    """
    found = Measured()
    tokenizer = config["text"]["tokenizer"]
    images: dict[str, Tensor] = {}
    pieces = partial(token_counts, tokenizer)
    quizzes = {benchmark.name: make_quiz(benchmark.scenes, pieces) for benchmark in benchmarks if benchmark.scenes}
    for seed in config["seeds"]:
        own = folder / f"seed-{seed}"
        encoder = LotlipEncoder(*load_model(own), how)
        model = encoder.model
        found.parameters = {
            name: sum(weight.numel() for weight in tower.parameters())
            for name, tower in (("text_tower", model.text), ("image_tower", model.image_tower))
        }
        found.text_tower_flops = found.text_tower_flops or flops_by_context(model.config)
        for benchmark in benchmarks:
            name, quiz, asked = benchmark.name, quizzes.get(benchmark.name), EachTextOnce(encoder)
            if name not in images or not config["image_tower"]["frozen"]:  # all seeds share a frozen tower
                images[name] = image_features(encoder, benchmark)
            if name not in found.results:
                false = [text for question in quiz.questions for text in question.changed] if quiz else []
                unseen = unseen_share(benchmark, tokenizer, vocabulary, false, encoder.tokenizer.sentence_ends)
                ceiling, repeats = limits(benchmark)
                found.results[name] = BenchmarkScores(
                    protocol={
                        "model": folder.as_posix(),
                        **protocol(encoder, benchmark),
                        **repeats,
                        "unseen_token_share": unseen,
                        **about,
                    },
                    chance=chances(benchmark),
                    ceiling=ceiling,
                    examples=retrieval_examples(asked, benchmark, images[name]),
                )
            result, scores = found.results[name], evaluate(asked, benchmark, images[name])
            result.seeds[seed] = dict(scores.values)
            result.intervals[seed] = dict(scores.intervals)
            result.attention[seed] = attention_scores(encoder, benchmark).to_json()
            result.weights_sha256[seed] = weights_hash(own)
            if quiz:
                result.reading[seed] = read_to_the_end(asked, quiz, images[name]).to_json()
            found.texts += sum(len(asked.texts) for asked in benchmark.retrieval.values())
        on_seed(seed)
    return found


def draw(
    folder: Path,
    config: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    how: Runner,
    out: Path,
    results: Mapping[str, BenchmarkScores] | None = None,
) -> NotDrawn:
    """Draws the first seed's pictures, after its scores are safe: a picture that fails is named and left out.

    Args:
        folder: of the trained ablation.
        config: it was trained with: "seeds".
        benchmarks: that it was scored on.
        how: device, precision and batch size.
        out: folder that is written whole: `<benchmark>-<name>.png`, where attention goes; `images/<benchmark>/<number>
            .jpg`, the images of the examples; and `not-drawn.json` where something could not be drawn.
        results: as of `Measured`, with the examples.

    Returns:
        Benchmark → what could not be drawn → why.
    """
    encoder = LotlipEncoder(*load_model(folder / f"seed-{config['seeds'][0]}"), how)
    problems: NotDrawn = {}
    with atomic_write(out) as unfinished:
        unfinished.mkdir()
        for benchmark in benchmarks:
            failed: dict[str, str] = {}
            for name, png in attention_pictures(encoder, benchmark, failed.__setitem__).items():
                (unfinished / f"{benchmark.name}-{name}.png").write_bytes(png)
            found = (results or {}).get(benchmark.name)
            for number in shown_images(found.examples if found else {}):
                file = unfinished / "images" / benchmark.name / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    file.write_bytes(small_jpeg(benchmark, number))
                except ValueError as error:  # it cannot be read or decoded
                    failed[f"image {benchmark.images[number]}"] = in_one_line(error)
            if failed:
                problems[benchmark.name] = failed
        if problems:
            write_json(unfinished / NOT_DRAWN, problems)
        write_record(unfinished, out)
    return problems
