"""Zero-shot retrieval and classification as pure functions of features; a slab of the similarities exists at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Cosines of equal features differ by this much at most, from the order in which a matrix product adds up.
TOLERANCE = 1e-6


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    text_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall at k and median rank, both ways, by cosine similarity.

    An image counts as found when any of its texts is among the first k. Among equal similarities the order is a fair
    draw, and the expected value over all draws is given: features that are all the same score exactly `chance`. Of
    several texts of an image, the rank is the first one's; the best possible rank is 1.

    Args:
        image_features: [I, D], of any length.
        text_features: [T, D], of any length; T may be larger than I.
        text_image: [T], the index of each text's image, 0 … I−1; every image has a text at least.
        ks: how many of the first ones count.
        chunk: rows of the similarity matrix that exist at a time; changes memory, not the result.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions, `image_to_text.median_rank` and
        `text_to_image.median_rank`.

    Raises:
        ValueError: shapes or indices do not fit, an image has no text, or a feature is not finite.
    """
    images = len(image_features)
    if text_image.shape != (len(text_features),):
        raise ValueError(
            f"text_image has shape {list(text_image.shape)}; it needs [{len(text_features)}], one per text"
        )
    image_index = torch.arange(images, device=text_image.device)
    if not torch.equal(text_image.unique(), image_index):
        raise ValueError(f"text_image must name each of the images 0 … {images - 1} at least once, and no other")
    images_, texts = _normalised(image_features, "image_features"), _normalised(text_features, "text_features")
    directions = {
        "image_to_text": _search(images_, texts, image_index, text_image, ks, chunk),
        "text_to_image": _search(texts, images_, text_image, image_index, ks, chunk),
    }
    return {f"{direction}.{name}": value for direction, found in directions.items() for name, value in found.items()}


def classification(
    image_features: Tensor, class_features: Tensor, labels: Tensor, chunk: int = 1024
) -> dict[str, float]:
    """Zero-shot accuracy: the share of images whose class is the most similar one, or among the first five.

    Equal similarities are ordered by a fair draw, as in `retrieval`.

    Args:
        image_features: [I, D].
        class_features: [C, D], as `class_features` makes them.
        labels: [I], the index of each image's class.
        chunk: images at a time.

    Returns:
        `top1` and `top5` as fractions.

    Raises:
        ValueError: shapes or labels do not fit, or a feature is not finite.
    """
    classes = len(class_features)
    if labels.shape != (len(image_features),):
        raise ValueError(f"labels has shape {list(labels.shape)}; it needs [{len(image_features)}], one per image")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels lie between {int(labels.min())} and {int(labels.max())}, classes in 0 … {classes - 1}"
        )
    images = _normalised(image_features, "image_features")
    prompts = _normalised(class_features, "class_features")
    found = _search(images, prompts, labels, torch.arange(classes, device=labels.device), (1, 5), chunk)
    return {"top1": found["r1"], "top5": found["r5"]}


def class_features(prompt_features: Sequence[Tensor]) -> Tensor:
    """A feature for each class: the mean of its normalised prompts' features, normalised again (CLIP's ensembling).

    Args:
        prompt_features: for each class [P, D], a row per prompt; P may differ between classes.

    Returns:
        [C, D], L2-normalised.
    """
    means = [_normalised(prompts, "prompt_features").mean(dim=0) for prompts in prompt_features]
    return F.normalize(torch.stack(means), dim=-1)


def chance(images: int, texts_per_image: int, k: int) -> float:
    """The expected image→text recall at k of guessing; exact when every image has as many texts.

    Guessing text→image is `chance(images, 1, k)`: each text has one image.
    """
    texts = images * texts_per_image
    return 1 - math.comb(texts - texts_per_image, k) / math.comb(texts, k) if k < texts else 1.0


def _search(
    queries: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor, ks: Sequence[int], chunk: int
) -> dict[str, float]:
    """Recall at each k and the median rank of the first gallery item that is of the query's group.

    queries [Q, D] and gallery [G, D] are normalised; query_group [Q] and gallery_group [G] say what belongs together.
    """
    counts = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ gallery.T  # [chunk, G]
        own = (query_group[start : start + chunk, None] == gallery_group).to(similarity.device)  # [chunk, G]
        best = similarity.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)  # [chunk, 1]
        better = similarity > best + TOLERANCE
        equal = (similarity >= best - TOLERANCE) & ~better
        # none of the own ones is better than the best of them
        counts.append(torch.stack([better.sum(1), (equal & own).sum(1), (equal & ~own).sum(1)]).cpu())
    ahead, own_equal, others_equal = torch.cat(counts, dim=1).double()  # [Q] each
    recall = {f"r{k}": _expected_hits(k - ahead, own_equal, others_equal).mean().item() for k in ks}
    rank = 1 + ahead + others_equal / (own_equal + 1)  # [Q], expected over fair draws
    return {**recall, "median_rank": rank.quantile(0.5).item()}


def _expected_hits(places: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Chance that a fair shuffle of `own` + `others` equals puts one of `own` on the first `places`; all [Q].

    One minus the hypergeometric chance of none, C(others, places) / C(own + others, places), as a product.
    """
    places = places.clamp(min=0)
    none = torch.ones_like(places)
    for i in range(1, int(own.max()) + 1):
        factor = (others - places + i).clamp(min=0) / (others + i)
        none = torch.where(own >= i, none * factor, none)
    return 1 - none


def _normalised(features: Tensor, name: str) -> Tensor:
    """Rows of length 1 in fp32. NaN would win every comparison unseen, so it is refused here."""
    if features.ndim != 2:
        raise ValueError(f"{name} has shape {list(features.shape)}; it needs [rows, D]")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        raise ValueError(f"{name}: {bad} of {len(features)} rows are not finite; the model that made them is broken")
    return F.normalize(features.float(), dim=-1)
