"""Scores of one model on one benchmark: zero-shot retrieval both ways, and classification by prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lotlip.data.images import decode_rgb, image_transform
from lotlip.data.tokenizer import TextTokenizer, used_tokens
from lotlip.embedding import in_batches
from lotlip.evaluation.benchmarks import Benchmark, Prompts
from lotlip.evaluation.metrics import chance, class_features, classification, retrieval
from lotlip.models.lotlip import LotlipModel

KS = (1, 5, 10)


def evaluate(
    model: LotlipModel, tokenizer: TextTokenizer, benchmark: Benchmark, images: Tensor, batch_size: int
) -> dict[str, float]:
    """Every score of a model on a benchmark, by name: "long.text_to_image.r1", "classification.top1", …

    Args:
        model: with the text tower to score.
        tokenizer: its own.
        benchmark: what to ask.
        images: the benchmark's images as `encode_images` gives them, [I, D] or, with late interaction, [I, P, D].
        batch_size: texts encoded at a time.
    """
    scores: dict[str, float] = {}
    for kind, texts in benchmark.retrieval.items():
        features, mask = encode_texts(model, tokenizer, texts.texts, batch_size)
        asked, image = torch.tensor(texts.image).unique(return_inverse=True)  # not every image has a long text
        found = retrieval(images[asked], features, image, KS, text_mask=mask)
        scores |= {f"{kind}.{name}": value for name, value in found.items()}
    if benchmark.prompts:
        found = _classify(model, tokenizer, benchmark.prompts, images, batch_size)
        scores |= {f"classification.{name}": value for name, value in found.items()}
    return scores


def _classify(
    model: LotlipModel, tokenizer: TextTokenizer, prompts: Prompts, images: Tensor, batch_size: int
) -> dict[str, float]:
    """A class is the mean of its prompts' features or, with late interaction, of their similarities."""
    sizes = [len(texts) for texts in prompts.classes]
    features, mask = encode_texts(model, tokenizer, [text for texts in prompts.classes for text in texts], batch_size)
    labels = torch.tensor(prompts.labels)
    if mask is None:
        return classification(images, class_features(features.split(sizes)), labels)
    prompt_class = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return classification(images, features, labels, text_mask=mask, prompt_class=prompt_class)


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
        "similarity": model.config.similarity,
        "text_preparation": "sub-captions joined by [SEP], cut at the context length",
        **benchmark.about,
    }


def encode_images(model: LotlipModel, benchmark: Benchmark, batch_size: int) -> Tensor:
    """Normalised features of a benchmark's images, [I, D]; with late interaction those of their patches, [I, P, D]."""
    spec = model.image_tower.spec
    transform = image_transform(spec.image_size, spec.mean, spec.std)
    by_patches = model.config.similarity == "late-interaction"
    encode = model.encode_image_patches if by_patches else model.encode_image
    with torch.inference_mode():
        return torch.cat(
            [
                encode(torch.from_numpy(np.stack([transform(decode_rgb(image)) for image in batch])))
                for batch in in_batches(benchmark.images(), batch_size)
            ]
        )


def encode_texts(
    model: LotlipModel, tokenizer: TextTokenizer, texts: Sequence[str], batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """What evaluation compares with images, for short and long text alike (paper, section 4).

    Returns:
        Normalised features of [CLS], [T, D], and None; with late interaction those of all tokens, [T, L, D], and which
        are no padding, [T, L].
    """
    by_tokens = model.config.similarity == "late-interaction"
    rows: list[Tensor] = []
    with torch.inference_mode():
        for batch in in_batches(texts, batch_size):
            ids, lengths = map(torch.from_numpy, tokenizer(batch))
            if by_tokens:
                tokens, mask = model.encode_text_tokens(ids, lengths)
                rows += [own[real] for own, real in zip(tokens, mask, strict=True)]
            else:
                rows.append(model.encode_text(ids, lengths)[:, 0])
    if not by_tokens:
        return torch.cat(rows), None
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence(rows, batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]
