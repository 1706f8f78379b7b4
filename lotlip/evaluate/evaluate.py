"""Scores of one model on one benchmark: zero-shot retrieval both ways, and classification by prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lotlip.data.text import SentenceEnds
from lotlip.data.tokenizer import used_tokens
from lotlip.evaluate.benchmarks import Benchmark, Prompts
from lotlip.evaluate.ceiling import ceilings, repeated
from lotlip.evaluate.encoders import Encoder, UnreadableImage
from lotlip.evaluate.metrics import Scores, chance, class_features, classification, retrieval
from lotlip.evaluate.score_names import Metric

KS = (1, 5, 10)


def evaluate(encoder: Encoder, benchmark: Benchmark, images: Tensor) -> Scores:
    """Every score of a model on a benchmark, by name: "long.text_to_image.r1", "classification.top1", …

    Args:
        encoder: the model.
        benchmark: what to ask.
        images: features of the benchmark's images as the encoder gives them, [I, D] or [I, P, D].
    """
    found = Scores()
    for kind, texts in benchmark.retrieval.items():
        features, mask = encoder.texts(texts.texts)
        asked, image = torch.tensor(texts.image).unique(return_inverse=True)  # not every image has a long text
        found |= retrieval(images[asked], features, image, KS, text_mask=mask).under(kind)
    if benchmark.prompts:
        found |= _classify(encoder, benchmark.prompts, images).under("classification")
    return found


def image_features(encoder: Encoder, benchmark: Benchmark) -> Tensor:
    """Features of a benchmark's images as the encoder gives them.

    Raises:
        ValueError: one cannot be read or decoded; it is named.
    """
    try:
        return encoder.images(images_of(benchmark))
    except UnreadableImage as error:
        raise ValueError(f"benchmark {benchmark.name}: image {benchmark.images[error.number]}: {error}") from error


def images_of(benchmark: Benchmark) -> Iterator[bytes]:
    """The encoded images of a benchmark, in order, one in memory at a time.

    Raises:
        ValueError: one cannot be read.
    """
    return (benchmark.read(number) for number in range(len(benchmark.images)))


def _classify(encoder: Encoder, prompts: Prompts, images: Tensor) -> Scores:
    """A class is the mean of its prompts' features or, with late interaction, of their similarities."""
    sizes = [len(texts) for texts in prompts.classes]
    features, mask = encoder.texts([text for texts in prompts.classes for text in texts])
    labels = torch.tensor(prompts.labels)
    if mask is None:
        return classification(images, class_features(features.split(sizes)), labels)
    prompt_class = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return classification(images, features, labels, text_mask=mask, prompt_class=prompt_class)


def chances(benchmark: Benchmark) -> dict[str, float]:
    """What guessing scores, for every metric that is a share."""
    scores: dict[str, float] = {}
    for kind, texts in benchmark.retrieval.items():
        images = len(set(texts.image))
        # exact where every image has as many texts, as in every benchmark here
        each = {"image_to_text": len(texts.texts) // images, "text_to_image": 1}
        scores |= {Metric(f"{kind}.{way}.r{k}"): chance(images, number, k) for way, number in each.items() for k in KS}
    if benchmark.prompts:
        classes = len(benchmark.prompts.classes)
        scores |= {Metric(f"classification.top{k}"): min(k / classes, 1.0) for k in (1, 5)}
    return scores


def limits(benchmark: Benchmark) -> tuple[dict[str, float], dict[str, int]]:
    """What repeated texts and images leave to be scored: every image is read once.

    Returns:
        The ceiling of each recall, by the names that `evaluate` gives the scores; and how many texts of each kind, and
        how many images, repeat an earlier one: "repeated_short_texts", "repeated_images". Nothing where there is no
        retrieval.

    Raises:
        ValueError: an image cannot be read.
    """
    if not benchmark.retrieval:
        return {}, {}
    images = [hashlib.sha256(image).digest() for image in images_of(benchmark)]
    ceiling: dict[str, float] = {}
    repeats = {}
    for kind, texts in benchmark.retrieval.items():
        found = ceilings(texts.texts, texts.image, images, KS)
        ceiling |= {Metric(f"{kind}.{metric}"): value for metric, value in found.items()}
        repeats[f"repeated_{kind}_texts"] = repeated(texts.texts)
    return ceiling, {**repeats, "repeated_images": repeated(images)}


def unseen_share(
    benchmark: Benchmark,
    tokenizer: str,
    vocabulary: Sequence[int],
    others: Iterable[str] = (),
    sentence_ends: SentenceEnds = "released",
) -> float:
    """Share of the word pieces of a benchmark's texts that no training text has: scores on such texts measure noise.

    Args:
        benchmark: with its texts and prompts.
        tokenizer: whose word pieces they are.
        vocabulary: word pieces that training texts have.
        others: what else is asked.
        sentence_ends: where the model's tokenizer ends a sentence; these characters are no word pieces to it.

    Raises:
        ValueError: it is more than the benchmark allows.
    """
    texts = [*others, *(text for kind in benchmark.retrieval.values() for text in kind.texts)]
    if benchmark.prompts:
        texts += [prompt for prompts in benchmark.prompts.classes for prompt in prompts]
    used = used_tokens(tokenizer, texts, sentence_ends)
    share = len(used - set(vocabulary)) / max(len(used), 1)
    limit = benchmark.max_unseen_tokens
    if limit is not None and share > limit:
        raise ValueError(
            f"benchmark {benchmark.name}: {share:.1%} of its word pieces are in no training text, more than "
            f"max_unseen_tokens {limit:.1%}: its scores would measure noise"
        )
    return share


def protocol(encoder: Encoder, benchmark: Benchmark) -> dict[str, str | int]:
    """How a score was measured, to be kept beside it: another size, length or preparation is another score."""
    return {
        "images": len(benchmark.images),
        **{f"{kind}_texts": len(found.texts) for kind, found in benchmark.retrieval.items()},
        **benchmark.about,
        **encoder.protocol(),
    }
