"""Example retrievals: the texts whose picture a model finds most surely, and those whose picture it ranks lowest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import Encoder
from lotlip.evaluate.metrics import TILE, TOLERANCE, comparison

EXAMPLES = 3  # of the best, and of the worst
FOUND = 3  # first images of each text
LONGEST = 600  # characters of a text that are kept


def retrieval_examples(encoder: Encoder, benchmark: Benchmark, images: Tensor) -> dict[str, Any]:
    """The best and the worst retrievals of images by a text, for each kind of text.

    Args:
        encoder: of the model.
        benchmark: whose texts search its images.
        images: features of the benchmark's images as the encoder gives them, [I, D] or [I, P, D].

    Returns:
        Kind of text → "best" and "worst" → a list of "text", "image" (number of its image), "rank" (of that image; the
        middle one where images are equally similar) and "found" (numbers of the first images), as plain JSON types. No
        text and no image is in it twice.
    """
    return {kind: _of_kind(encoder, benchmark, images, kind) for kind in benchmark.retrieval}


def _of_kind(encoder: Encoder, benchmark: Benchmark, images: Tensor, kind: str) -> dict[str, Any]:
    texts = benchmark.retrieval[kind]
    features, mask = encoder.texts(texts.texts)
    asked, owner = torch.tensor(texts.image).unique(return_inverse=True)
    compare = comparison(images[asked], features, mask, "text_features")
    ranks, margins, found = [], [], []
    for start in range(0, len(owner), TILE):
        columns = slice(start, start + TILE)
        similarity = compare(slice(None), columns)[1].cpu()  # [I, t]
        own = similarity.gather(0, owner[None, columns])  # [1, t]
        found.append(similarity.topk(min(FOUND, len(asked)), dim=0).indices.T)
        others = similarity.scatter(0, owner[None, columns], -torch.inf)
        ahead = (others > own + TOLERANCE).sum(dim=0)
        equal = (others >= own - TOLERANCE).sum(dim=0) - ahead
        ranks.append(1 + ahead + equal / 2)
        margins.append(own[0] - others.amax(dim=0))
    rank, margin, first = torch.cat(ranks).tolist(), torch.cat(margins).tolist(), torch.cat(found)

    def example(place: int) -> dict[str, Any]:
        text = texts.texts[place]
        return {
            "text": text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…",
            "image": texts.image[place],
            "rank": rank[place],
            "found": asked[first[place]].tolist(),
        }

    best_first = sorted(range(len(rank)), key=lambda place: (rank[place], -margin[place], place))
    best = _distinct(best_first, benchmark, kind, set())
    worst = _distinct(
        (place for place in reversed(best_first) if rank[place] > 1), benchmark, kind, {texts.image[p] for p in best}
    )
    return {"best": [example(place) for place in best], "worst": [example(place) for place in worst]}


def _distinct(places: Iterable[int], benchmark: Benchmark, kind: str, images: set[int]) -> list[int]:
    """The first few texts that differ from each other, of images that are not in `images`."""
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
    """Numbers of all images in what `retrieval_examples` gives, sorted."""
    every = [one for kind in examples.values() for group in kind.values() for one in group]
    return sorted({number for one in every for number in (one["image"], *one["found"])})
