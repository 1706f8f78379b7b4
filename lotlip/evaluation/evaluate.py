"""Scores of one model on one benchmark: zero-shot retrieval both ways, and classification by prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lotlip.data.images import decode_rgb, image_transform
from lotlip.data.tokenizer import TextTokenizer, used_tokens
from lotlip.evaluation.benchmarks import Benchmark
from lotlip.evaluation.metrics import chance, class_features, classification, retrieval
from lotlip.models.image_tower import ImageTower
from lotlip.models.lotlip import LotlipModel

KS = (1, 5, 10)
T = TypeVar("T")


def evaluate(
    model: LotlipModel, tokenizer: TextTokenizer, benchmark: Benchmark, images: Tensor, batch_size: int
) -> dict[str, float]:
    """Every score of a model on a benchmark, by name: "long.text_to_image.r1", "classification.top1", …

    Args:
        model: with the text tower to score.
        tokenizer: its own.
        benchmark: what to ask.
        images: features of the benchmark's images by the model's image tower, [I, D].
        batch_size: texts encoded at a time.
    """
    scores: dict[str, float] = {}
    for kind, texts in benchmark.retrieval.items():
        features = encode_texts(model, tokenizer, texts.texts, batch_size)
        asked, image = torch.tensor(texts.image).unique(return_inverse=True)  # not every image has a long text
        found = retrieval(images[asked], features, image, KS)
        scores |= {f"{kind}.{name}": value for name, value in found.items()}
    if benchmark.prompts:
        classes = benchmark.prompts.classes
        features = encode_texts(model, tokenizer, [prompt for prompts in classes for prompt in prompts], batch_size)
        by_class = class_features(features.split([len(prompts) for prompts in classes]))
        found = classification(images, by_class, torch.tensor(benchmark.prompts.labels))
        scores |= {f"classification.{name}": value for name, value in found.items()}
    return scores


def chances(benchmark: Benchmark) -> dict[str, float]:
    """What guessing scores, for every metric that is a share."""
    scores = {
        f"{kind}.{way}.r{k}": chance(len(set(texts.image)), 1, k)
        for kind, texts in benchmark.retrieval.items()
        for way in ("image_to_text", "text_to_image")
        for k in KS
    }
    if benchmark.prompts:
        classes = len(benchmark.prompts.classes)
        scores |= {f"classification.top{k}": min(k / classes, 1.0) for k in (1, 5)}
    return scores


def unseen_share(benchmark: Benchmark, tokenizer: str, vocabulary: Sequence[int]) -> float:
    """Share of the word pieces of a benchmark's texts that no training text has: scores on such texts measure noise.

    Raises:
        ValueError: it is more than the benchmark allows.
    """
    texts = [text for kind in benchmark.retrieval.values() for text in kind.texts]
    if benchmark.prompts:
        texts += [prompt for prompts in benchmark.prompts.classes for prompt in prompts]
    used = used_tokens(tokenizer, texts)
    share = len(used - set(vocabulary)) / max(len(used), 1)
    limit = benchmark.max_unseen_tokens
    if limit is not None and share > limit:
        raise ValueError(
            f"benchmark {benchmark.name}: {share:.1%} of its word pieces are in no training text, more than "
            f"max_unseen_tokens {limit:.1%}: its scores would measure noise"
        )
    return share


def protocol(model: LotlipModel, benchmark: Benchmark) -> dict[str, str | int]:
    """How a score was measured, to be kept beside it: another size, length or preparation is another score."""
    return {
        "split": benchmark.split,
        "images": len(benchmark.places),
        **{f"{kind}_texts": len(found.texts) for kind, found in benchmark.retrieval.items()},
        "context_length": model.config.context_length,
        "image_size": model.image_tower.spec.image_size,
        "resize": "shorter side bicubic, centre crop",
        "precision": str(model.dtype).removeprefix("torch."),
        "text_feature": "[CLS]",
        "text_preparation": "sub-captions joined by [SEP], cut at the context length",
        **benchmark.about,
    }


def encode_images(tower: ImageTower, benchmark: Benchmark, batch_size: int) -> Tensor:
    """Features of a benchmark's images, [I, D], not normalised."""
    spec = tower.spec
    transform = image_transform(spec.image_size, spec.mean, spec.std)

    def encode(batch: list[bytes]) -> Tensor:
        return tower(torch.from_numpy(np.stack([transform(decode_rgb(image)) for image in batch])))

    return _in_batches(benchmark.images(), encode, batch_size)


def encode_texts(model: LotlipModel, tokenizer: TextTokenizer, texts: Sequence[str], batch_size: int) -> Tensor:
    """[CLS] features of texts, [T, D]: what evaluation uses, for short and long text alike (paper, section 4)."""

    def encode(batch: list[str]) -> Tensor:
        ids, lengths = tokenizer(batch)
        return model.get_text_features(torch.from_numpy(ids), torch.from_numpy(lengths))

    return _in_batches(iter(texts), encode, batch_size)


def _in_batches(items: Iterator[T], encode: Callable[[list[T]], Tensor], batch_size: int) -> Tensor:
    rows = []
    with torch.inference_mode():
        while batch := list(islice(items, batch_size)):
            rows.append(encode(batch))
    return torch.cat(rows)
