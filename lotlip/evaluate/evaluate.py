"""Scores of one model on one benchmark: zero-shot retrieval in both directions, and classification by prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lotlip.data.text import SentenceEnds
from lotlip.data.tokenizer import used_tokens
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, Prompts
from lotlip.evaluate.ceiling import ceilings, repeated
from lotlip.evaluate.encoders import Encoder, UnreadableImage
from lotlip.evaluate.metrics import Scores, chance, class_features, classification, retrieval
from lotlip.evaluate.score_names import COUNTED_TEXTS, Metric
from lotlip.evaluate.sentence_scores import CHANGES, GROWING, counted_texts, sentence_scores

KS = (1, 5, 10)


def evaluate(encoder: Encoder, benchmark: Benchmark, images: Tensor) -> Scores:
    """Computes all scores of a model on a benchmark, by name: "long.text_to_image.r1", "classification.top1", …

    Args:
        encoder: the model.
        benchmark: the benchmark.
        images: the encoder's features of the benchmark's images, [I, D] or [I, P, D].
    """
    scores = Scores()
    for kind, texts in benchmark.retrieval.items():
        features, mask = encoder.texts(texts.texts)
        with_text, image = torch.tensor(texts.image).unique(return_inverse=True)  # not every image has a long text
        found = retrieval(images[with_text], features, image, KS, text_mask=mask)
        scores |= found.under(kind)
        if kind == "long":
            scores |= sentence_scores(encoder, texts, images, found, benchmark.sentence_texts)
    if benchmark.prompts:
        scores |= _classify(encoder, benchmark.prompts, images).under("classification")
    return scores


def image_features(encoder: Encoder, benchmark: Benchmark) -> Tensor:
    """Encodes a benchmark's images.

    Raises:
        ValueError: an image cannot be read or decoded; the message names it.
    """
    with naming_images(benchmark):
        return encoder.images(encoded_images(benchmark))


@contextmanager
def naming_images(benchmark: Benchmark) -> Iterator[None]:
    """Names the image of a benchmark that cannot be decoded; raises a ValueError."""
    try:
        yield
    except UnreadableImage as error:
        raise ValueError(f"benchmark {benchmark.name}: image {benchmark.images[error.number]}: {error}") from error


def encoded_images(benchmark: Benchmark) -> Iterator[bytes]:
    """Yields the encoded images of a benchmark in order, with one in memory at a time.

    Raises:
        ValueError: an image cannot be read.
    """
    return (benchmark.read(number) for number in range(len(benchmark.images)))


def _classify(encoder: Encoder, prompts: Prompts, images: Tensor) -> Scores:
    """Averages the features of each class's prompts or, with late interaction, their similarities."""
    sizes = [len(texts) for texts in prompts.classes]
    features, mask = encoder.texts([text for texts in prompts.classes for text in texts])
    labels = torch.tensor(prompts.labels)
    if mask is None:
        return classification(images, class_features(features.split(sizes)), labels)
    prompt_class = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return classification(images, features, labels, text_mask=mask, prompt_class=prompt_class)


def chances(benchmark: Benchmark) -> dict[str, float]:
    """Returns the expected score of guessing for every metric that is a fraction.

    HiMo@4 is a correlation, which guessing makes 0, so it is left out.
    """
    scores: dict[str, float] = {}
    for kind, texts in benchmark.retrieval.items():
        images = len(set(texts.image))
        # Exact if all images have the same number of texts; COCO with all captions has 25,010 of 5,000 images.
        matches = {"image_to_text": len(texts.texts) // images, "text_to_image": 1}
        scores |= {Metric(f"{kind}.{way}.r{k}"): chance(images, n, k) for way, n in matches.items() for k in KS}
    counted = counted_texts(benchmark.retrieval.get("long", ImageTexts([], [])), benchmark.sentence_texts)
    if len(counted.texts) > 1:
        images = len(set(counted.image))
        matches = {"image_to_text": len(counted.texts) // images, "text_to_image": 1}
        scores |= {Metric(f"prefixes.himo{k}"): 1 / math.factorial(k) for k in GROWING}
        scores |= {
            Metric(f"{change}.{way}.r1"): chance(images, n, 1) for change in CHANGES for way, n in matches.items()
        }
    if benchmark.prompts:
        classes = len(benchmark.prompts.classes)
        scores |= {Metric(f"classification.top{k}"): min(k / classes, 1.0) for k in (1, 5)}
    return scores


def limits(benchmark: Benchmark) -> tuple[dict[str, float], dict[str, int]]:
    """Computes how repeated texts and images limit the scores. Every image is read once.

    Returns:
        The ceiling of each recall, by the names of `evaluate`; and the number of texts of each kind and of images that
        repeat an earlier one: "repeated_short_texts", "repeated_images". Empty without retrieval.

    Raises:
        ValueError: an image cannot be read.
    """
    if not benchmark.retrieval:
        return {}, {}
    images = [hashlib.sha256(image).digest() for image in encoded_images(benchmark)]
    ceiling: dict[str, float] = {}
    repeats = {}
    for kind, texts in benchmark.retrieval.items():
        by_metric = ceilings(texts.texts, texts.image, images, KS)
        ceiling |= {Metric(f"{kind}.{metric}"): value for metric, value in by_metric.items()}
        repeats[f"repeated_{kind}_texts"] = repeated(texts.texts)
    return ceiling, {**repeats, "repeated_images": repeated(images)}


def unseen_share(
    benchmark: Benchmark,
    tokenizer: str,
    vocabulary: Sequence[int],
    others: Iterable[str] = (),
    sentence_ends: SentenceEnds = "released",
) -> float:
    """Computes the share of the word pieces of a benchmark's texts that occur in no training text.

    Scores on texts with untrained word pieces would measure noise.

    Args:
        benchmark: benchmark with its texts and prompts.
        tokenizer: name of the tokenizer.
        vocabulary: word pieces that occur in training texts.
        others: further texts that are scored.
        sentence_ends: how the model's tokenizer splits sentences; sentence ends are not word pieces to it.

    Raises:
        ValueError: the share is larger than the benchmark allows.
    """
    texts = [*others, *(text for kind in benchmark.retrieval.values() for text in kind.texts)]
    if benchmark.prompts:
        texts += [prompt for prompts in benchmark.prompts.classes for prompt in prompts]
    used = used_tokens(tokenizer, texts, sentence_ends)
    share = len(used - set(vocabulary)) / max(len(used), 1)
    limit = benchmark.max_unseen_tokens
    if limit is not None and share > limit:
        raise ValueError(
            f"benchmark {benchmark.name}: {share:.1%} of its word pieces occur in no training text, more than "
            f"max_unseen_tokens {limit:.1%}, so its scores would measure noise; train on more texts or raise the limit"
        )
    return share


def protocol(encoder: Encoder, benchmark: Benchmark) -> dict[str, str | int]:
    """Returns the settings that scores depend on, to be stored with them."""
    long = benchmark.retrieval.get("long")
    return {
        "images": len(benchmark.images),
        **{f"{kind}_texts": len(texts.texts) for kind, texts in benchmark.retrieval.items()},
        **({COUNTED_TEXTS: len(counted_texts(long, benchmark.sentence_texts).texts)} if long else {}),
        **benchmark.about,
        **encoder.protocol(),
    }
