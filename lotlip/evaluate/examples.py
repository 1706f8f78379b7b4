"""Example retrievals: the texts whose image is ranked first by the widest margin, or is ranked lowest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import Encoder
from lotlip.evaluate.metrics import TILE, TOLERANCE, comparison

EXAMPLES = 3  # number of the best, and of the worst
TOP_IMAGES = 3  # top-ranked images kept for each text
MAX_CHARACTERS = 600  # longer texts are truncated


def retrieval_examples(encoder: Encoder, benchmark: Benchmark, images: Tensor) -> dict[str, Any]:
    """Selects the best and worst text → image retrievals for each kind of text.

    Args:
        encoder: the model.
        benchmark: the benchmark.
        images: the encoder's features of the benchmark's images, [I, D] or [I, P, D].

    Returns:
        Kind of text → "best" and "worst" → a list of "text", "image" (index of its image), "rank" (of that image; the
        mean rank among ties) and "found" (indices of the top-ranked images), as JSON types. No text or image is
        repeated.
    """
    return {kind: _of_kind(encoder, benchmark, images, kind) for kind in benchmark.retrieval}


def _of_kind(encoder: Encoder, benchmark: Benchmark, images: Tensor, kind: str) -> dict[str, Any]:
    texts = benchmark.retrieval[kind]
    features, mask = encoder.texts(texts.texts)
    with_text, owner = torch.tensor(texts.image).unique(return_inverse=True)
    compare = comparison(images[with_text], features, mask, "text_features")
    ranks, margins, top = [], [], []
    for start in range(0, len(owner), TILE):
        columns = slice(start, start + TILE)
        similarity = compare(slice(None), columns)[1].cpu()  # [I, t]
        target = similarity.gather(0, owner[None, columns])  # [1, t]
        top.append(similarity.topk(min(TOP_IMAGES, len(with_text)), dim=0).indices.T)
        others = similarity.scatter(0, owner[None, columns], -torch.inf)
        better = (others > target + TOLERANCE).sum(dim=0)
        equal = (others >= target - TOLERANCE).sum(dim=0) - better
        ranks.append(1 + better + equal / 2)
        margins.append(target[0] - others.amax(dim=0))
    rank, margin, first = torch.cat(ranks).tolist(), torch.cat(margins).tolist(), torch.cat(top)

    def example(place: int) -> dict[str, Any]:
        text = texts.texts[place]
        return {
            "text": text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…",
            "image": texts.image[place],
            "rank": rank[place],
            "found": with_text[first[place]].tolist(),
        }

    best_first = sorted(range(len(rank)), key=lambda place: (rank[place], -margin[place], place))
    best = _distinct(best_first, benchmark, kind, set())
    worst = _distinct(
        (place for place in reversed(best_first) if rank[place] > 1), benchmark, kind, {texts.image[p] for p in best}
    )
    return {"best": [example(place) for place in best], "worst": [example(place) for place in worst]}


def _distinct(places: Iterable[int], benchmark: Benchmark, kind: str, images: set[int]) -> list[int]:
    """Selects the first `EXAMPLES` distinct texts of distinct images that are not in `images`."""
    texts = benchmark.retrieval[kind]
    chosen: list[int] = []
    seen: set[str] = set()
    for place in places:
        if texts.image[place] not in images and texts.texts[place] not in seen:
            chosen.append(place)
            seen.add(texts.texts[place])
            images.add(texts.image[place])
        if len(chosen) == EXAMPLES:
            break
    return chosen


def shown_images(examples: dict[str, Any]) -> list[int]:
    """Returns the sorted indices of all images in the examples of `retrieval_examples`."""
    flat = [one for kind in examples.values() for group in kind.values() for one in group]
    return sorted({number for one in flat for number in (one["image"], *one["found"])})
