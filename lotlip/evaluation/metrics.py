"""Zero-shot retrieval and classification as pure functions of features; a slab of the similarities exists at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lotlip.models.similarity import late_interaction

# Cosines of equal features differ by this much at most, from the order in which a matrix product adds up.
TOLERANCE = 1e-6

Rows = Callable[[slice], Tensor]  # some rows of a similarity matrix, [rows, G]


@dataclass(frozen=True)
class Scores:
    """What was measured.

    Attributes:
        values: by name; shares from 0 to 1, and ranks from 1.
        intervals: of those that have one, the ends of their 95 % confidence interval, by the same names.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def under(self, prefix: str) -> Scores:
        """The same with names that begin with `prefix` and a dot."""
        values, intervals = (
            {f"{prefix}.{name}": value for name, value in found.items()} for found in (self.values, self.intervals)
        )
        return Scores(values, intervals)  # type: ignore[arg-type]

    def __or__(self, other: Scores) -> Scores:
        return Scores({**self.values, **other.values}, {**self.intervals, **other.intervals})


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    text_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
    text_mask: Tensor | None = None,
) -> Scores:
    """Recall at k and median rank, both ways, by cosine similarity or late interaction.

    An image counts as found when any of its texts is among the first k. Among equal similarities the order is a fair
    draw, and the expected value over all draws is given: features that are all the same score exactly `chance`. Of
    several texts of an image, the rank is the first one's; the best possible rank is 1.

    Args:
        image_features: [I, D], of any length; with `text_mask` those of the patches, [I, P, D].
        text_features: [T, D], of any length; T may be larger than I. With `text_mask` those of the tokens, [T, L, D].
        text_image: [T], the index of each text's image, 0 … I−1; every image has a text at least.
        ks: how many of the first ones count.
        chunk: rows of the similarity matrix that exist at a time; changes memory, not the result.
        text_mask: bool, True at a text's tokens, [T, L]. With it similarity is FILIP's late interaction, each way by
            its own direction.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions, `image_to_text.median_rank` and
        `text_to_image.median_rank`.

    Raises:
        ValueError: shapes or indices do not fit, an image has no text, or a feature is not finite.
    """
    image_index = torch.arange(len(image_features), device=text_image.device)
    _check_index(text_image, "text_image", "images", len(text_features), len(image_features))
    image_to_text, text_to_image = _similarities(image_features, text_features, text_mask, "text_features")
    directions = {
        "image_to_text": _search(image_to_text, image_index, text_image, ks, chunk),
        "text_to_image": _search(text_to_image, text_image, image_index, ks, chunk),
    }
    return Scores(
        {f"{direction}.{name}": value for direction, found in directions.items() for name, value in found.items()}
    )


def classification(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    chunk: int = 1024,
    text_mask: Tensor | None = None,
    prompt_class: Tensor | None = None,
) -> Scores:
    """Zero-shot accuracy: the share of images whose class is the most similar one, or among the first five.

    Equal similarities are ordered by a fair draw, as in `retrieval`.

    Args:
        image_features: [I, D]; with `text_mask` those of the patches, [I, P, D].
        class_features: [C, D], as `class_features` makes them; with `text_mask` those of the tokens of every class's
            prompts, [T, L, D].
        labels: [I], the index of each image's class.
        chunk: images at a time.
        text_mask: bool, True at a prompt's tokens, [T, L]. With it similarity is FILIP's late interaction, image→text.
        prompt_class: [T], the index of each prompt's class, 0 … C−1. With it a class's similarity is the mean of its
            prompts' similarities, which is how FILIP ensembles (arXiv 2111.07783); without it each row of
            `class_features` is a class.

    Returns:
        `top1` and `top5` as fractions.

    Raises:
        ValueError: shapes or labels do not fit, or a feature is not finite.
    """
    classes = len(class_features) if prompt_class is None else int(prompt_class.max()) + 1
    if labels.shape != (len(image_features),):
        raise ValueError(f"labels has shape {list(labels.shape)}; it needs [{len(image_features)}], one per image")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels lie between {int(labels.min())} and {int(labels.max())}, classes in 0 … {classes - 1}"
        )
    similarity, _ = _similarities(image_features, class_features, text_mask, "class_features")
    if prompt_class is not None:
        _check_index(prompt_class, "prompt_class", "classes", len(class_features), classes)
        similarity = _class_means(similarity, prompt_class)
    found = _search(similarity, labels, torch.arange(classes, device=labels.device), (1, 5), chunk)
    return Scores({"top1": found["r1"], "top5": found["r5"]})


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


def _similarities(
    image_features: Tensor, text_features: Tensor, text_mask: Tensor | None, text_name: str
) -> tuple[Rows, Rows]:
    """The matrices in which an image looks for its text, [I, T], and a text for its image, [T, I].

    Late interaction computes both directions and each gives one away: to keep both would take both matrices whole.
    """
    if text_mask is None:
        images, texts = _normalised(image_features, "image_features"), _normalised(text_features, text_name)
        return lambda rows: images[rows] @ texts.T, lambda rows: texts[rows] @ images.T
    mask = text_mask
    if text_features.ndim != 3 or mask.shape != text_features.shape[:2]:
        raise ValueError(
            f"{text_name} {list(text_features.shape)} and text_mask {list(mask.shape)} do not fit; late interaction "
            "needs [T, L, D] and [T, L]"
        )
    patches = _normalised(image_features, "image_features", "[I, P, D]")
    tokens = _normalised(text_features.masked_fill(~mask[..., None], 0), text_name, "[T, L, D]")
    return (
        lambda rows: late_interaction(patches[rows], tokens, mask)[0],
        lambda rows: late_interaction(patches, tokens[rows], mask[rows])[1].T,
    )


def _class_means(similarity: Rows, prompt_class: Tensor) -> Rows:
    """[I, C] from [I, T]: the mean over each class's prompts."""

    def means(rows: slice) -> Tensor:
        prompts = similarity(rows)
        own_class = prompt_class.to(prompts.device)
        count = own_class.bincount()
        return prompts.new_zeros(len(prompts), len(count)).index_add_(1, own_class, prompts) / count

    return means


def _check_index(index: Tensor, name: str, groups: str, rows: int, number: int) -> None:
    if index.shape != (rows,):
        raise ValueError(f"{name} has shape {list(index.shape)}; it needs [{rows}], one per text")
    if not torch.equal(index.unique(), torch.arange(number, device=index.device)):
        raise ValueError(f"{name} must name each of the {groups} 0 … {number - 1} at least once, and no other")


def _search(
    similarities: Rows, query_group: Tensor, gallery_group: Tensor, ks: Sequence[int], chunk: int
) -> dict[str, float]:
    """Recall at each k and the median rank of the first gallery item that is of the query's group.

    similarities gives rows of [Q, G]; query_group [Q] and gallery_group [G] say what belongs together.
    """
    counts = []
    for start in range(0, len(query_group), chunk):
        rows = slice(start, start + chunk)
        similarity = similarities(rows)  # [chunk, G]
        own = (query_group[rows, None] == gallery_group).to(similarity.device)  # [chunk, G]
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


def _normalised(features: Tensor, name: str, shape: str = "[rows, D]") -> Tensor:
    """Features of length 1 in fp32. NaN would win every comparison unseen, so it is refused here."""
    if features.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {list(features.shape)}; it needs {shape}")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).flatten(1).all(dim=1)).sum())
        raise ValueError(f"{name}: {bad} of {len(features)} rows are not finite; the model that made them is broken")
    return F.normalize(features.float(), dim=-1)
