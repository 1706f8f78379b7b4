"""Zero-shot retrieval and classification as pure functions of features; a tile of the similarities exists at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lotlip.objectives.similarity import cosine, late_interaction

# Cosines of equal features differ by this much at most, from the order in which a matrix product adds up.
TOLERANCE = 1e-6

TILE = 512  # images and texts that are compared at a time: what is left of a product is still in the cache
_OWN = 64  # images whose similarities to their own texts are looked up at a time
RESAMPLES = 1000
_DRAWS_AT_ONCE = 2**20  # of the bootstrap: 8 MB

# Some images, some texts → how alike they are when an image looks for its text and when a text looks for its image,
# [i, t] each; by cosine both are the same tensor.
Compare = Callable[[slice, slice], tuple[Tensor, Tensor]]


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
    chunk: int = TILE,
    text_mask: Tensor | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Recall at k, mean and median rank, both ways, by cosine similarity or late interaction.

    An image counts as found when any of its texts is among the first k. Among equal similarities the order is a fair
    draw, and the expected value over all draws is given: features that are all the same score exactly `chance`. Of
    several texts of an image, the rank is the first one's; the best possible rank is 1.

    Each similarity is computed once and serves both directions. Intervals say what other images might have given, among
    the same ones to choose from: images are drawn anew, each with all of its texts (`summary`).

    Args:
        image_features: [I, D], of any length; with `text_mask` those of the patches, [I, P, D].
        text_features: [T, D], of any length; T may be larger than I. With `text_mask` those of the tokens, [T, L, D].
        text_image: [T], the index of each text's image, 0 … I−1; every image has a text at least.
        ks: how many of the first ones count.
        chunk: images and texts that are compared at a time; changes memory and time, not the result.
        text_mask: bool, True at a text's tokens, [T, L]. With it similarity is FILIP's late interaction, each way by
            its own direction.
        resamples, seed: of the intervals.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions, and `….mean_rank`, all with intervals;
        `….median_rank`.

    Raises:
        ValueError: shapes or indices do not fit, an image has no text, or a feature is not finite.
    """
    _check_index(text_image, "text_image", "images", len(text_features), len(image_features))
    order = text_image.argsort(stable=True)  # texts of an image side by side
    compare = comparison(image_features, text_features, text_mask, "text_features", order.to(text_features.device))
    owner = text_image[order].to(image_features.device)
    by_image, by_text = _search_both_ways(compare, owner, chunk)
    found = Scores()
    for direction, places, image in (
        ("image_to_text", by_image, torch.arange(len(image_features))),
        ("text_to_image", by_text, owner.cpu()),
    ):
        outcomes = _outcomes(places, ks)
        median = Scores({"median_rank": outcomes["mean_rank"].quantile(0.5).item()})
        found |= (summary(outcomes, image, resamples, seed) | median).under(direction)
    return found


def classification(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    chunk: int = TILE,
    text_mask: Tensor | None = None,
    prompt_class: Tensor | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
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
        resamples, seed: of the intervals, as in `summary`; images are drawn anew.

    Returns:
        `top1` and `top5` as fractions, with intervals.

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
    compare = comparison(image_features, class_features, text_mask, "class_features")
    if prompt_class is not None:
        _check_index(prompt_class, "prompt_class", "classes", len(class_features), classes)
    found = []
    for start in range(0, len(labels), chunk):
        similarity = compare(slice(start, start + chunk), slice(None))[0]  # [chunk, C]
        if prompt_class is not None:
            similarity = _class_means(similarity, prompt_class)
        label = labels[start : start + chunk, None].to(similarity.device)
        tally = _Tally(similarity.gather(1, label)[:, 0])
        tally.count(similarity.scatter(1, label, -math.inf), slice(None), 1)
        found.append(tally.places(torch.ones(len(label))))
    outcomes = _outcomes(_Places(*map(torch.cat, zip(*found, strict=True))), (1, 5))
    named = {"top1": outcomes["r1"], "top5": outcomes["r5"]}
    return summary(named, torch.arange(len(labels)), resamples, seed)


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


def comparison(
    image_features: Tensor,
    text_features: Tensor,
    text_mask: Tensor | None,
    text_name: str,
    order: Tensor | slice = slice(None),
) -> Compare:
    """What compares some images with some texts, by cosine or late interaction.

    Args:
        image_features, text_features, text_mask: as of `retrieval`.
        text_name: what an error calls the texts.
        order: texts are numbered in this order, [T].

    Raises:
        ValueError: shapes do not fit, or a feature is not finite.
    """
    if text_mask is None:
        images, texts = _normalised(image_features, "image_features"), _normalised(text_features, text_name)[order]
        return lambda rows, columns: cosine(images[rows], texts[columns])
    if text_features.ndim != 3 or text_mask.shape != text_features.shape[:2]:
        raise ValueError(
            f"{text_name} {list(text_features.shape)} and text_mask {list(text_mask.shape)} do not fit; "
            "late interaction needs [T, L, D] and [T, L]"
        )
    mask = text_mask[order]
    patches = _normalised(image_features, "image_features", "[I, P, D]")
    tokens = _normalised(text_features[order].masked_fill(~mask[..., None], 0), text_name, "[T, L, D]")
    return lambda rows, columns: late_interaction(patches[rows], tokens[columns], mask[columns])


def summary(outcomes: Mapping[str, Tensor], cluster: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Scores:
    """Means over queries, with 95 % confidence intervals by the percentile bootstrap.

    What belongs together is drawn together: a sample is as many clusters as there are, with replacement, each with all
    of its queries. Equal seeds draw equal samples, so two systems' scores are on the same ones.

    Args:
        outcomes: by name, one number for each query, [Q].
        cluster: [Q], 0 … C−1: which queries belong together.
        resamples: how many samples are drawn; with none there are no intervals.
        seed: of the draws.

    Returns:
        a mean for each outcome, by the same names.
    """
    columns = torch.stack([*outcomes.values()], dim=1).double()  # [Q, names]
    queries = cluster.bincount()
    sums = columns.new_zeros(len(queries), columns.shape[1]).index_add_(0, cluster, columns)
    values, ends = ratios(sums, queries, resamples, seed)
    return Scores(dict(zip(outcomes, values, strict=True)), dict(zip(outcomes, ends, strict=bool(resamples))))


def ratios(
    above: Tensor, below: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[float], list[tuple[float, float]]]:
    """Ratios of sums over the same clusters, with their 95 % confidence intervals by the percentile bootstrap.

    Args:
        above: what each cluster adds to each ratio's numerator, [C, R].
        below: what it adds to the denominator of all, [C].
        resamples, seed: as of `summary`.

    Returns:
        each ratio, and the ends of each interval; no intervals with no resamples.
    """
    columns = torch.cat([above, below[:, None]], dim=1).double()

    def found(counts: Tensor) -> Tensor:  # how often each cluster is in each sample, [samples, C] → [samples, R]
        totals = counts.double() @ columns
        return totals[:, :-1] / totals[:, -1:]

    values = found(torch.ones(1, len(below)))[0].tolist()
    if not resamples:
        return values, []
    drawn = torch.cat([found(counts) for counts in _samples(len(below), resamples, seed)])
    ends = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T.tolist()
    return values, [(low, high) for low, high in ends]


def _samples(clusters: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each cluster is in each of some samples, [samples, C], until there are all."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _DRAWS_AT_ONCE // clusters)
    for done in range(0, resamples, at_once):
        samples = min(at_once, resamples - done)
        drawn = torch.randint(clusters, (samples, clusters), generator=generator)
        places = drawn + clusters * torch.arange(samples)[:, None]
        yield places.flatten().bincount(minlength=samples * clusters).view(samples, clusters)


class _Places(NamedTuple):
    """Where each query finds the first of its own; [Q] each, on the CPU.

    Attributes:
        ahead: others that are better than the best of its own.
        own: of its own, those that are as good as the best of them.
        others: others that are as good.
    """

    ahead: Tensor
    own: Tensor
    others: Tensor


class _Tally:
    """Counts what is better than the best of each query's own, and what is as good.

    Args:
        best: similarity of each query to the best of its own, [Q].
    """

    def __init__(self, best: Tensor) -> None:
        self._best = best
        self._better, self._good = torch.zeros_like(best).double(), torch.zeros_like(best).double()

    def count(self, similarity: Tensor, queries: slice, dim: int) -> None:
        """Takes in a tile in which a query's own are −∞; its gallery lies along `dim`."""
        best = self._best[queries].unsqueeze(dim)
        # As numbers, not as truth values: torch compares and counts those several times more slowly.
        truth = torch.empty_like(similarity)
        self._better[queries] += torch.gt(similarity, best + TOLERANCE, out=truth).sum(dim)
        self._good[queries] += torch.ge(similarity, best - TOLERANCE, out=truth).sum(dim)

    def places(self, own: Tensor) -> _Places:
        """Of all tiles together; `own` is how many of its own are as good as the best, [Q]."""
        return _Places(self._better.cpu(), own.double().cpu(), (self._good - self._better).cpu())


def _search_both_ways(compare: Compare, owner: Tensor, chunk: int) -> tuple[_Places, _Places]:
    """Where images find their texts, and texts their images.

    owner is each text's image, [T], in rising order.
    """
    ends = [0, *owner.bincount().cumsum(0).tolist()]  # an image's texts are ends[i]:ends[i + 1]
    images, texts = len(ends) - 1, len(owner)
    place = torch.arange(texts, device=owner.device)
    owns = []
    for start in range(0, images, _OWN):
        stop = min(start + _OWN, images)
        mine = slice(ends[start], ends[stop])
        found = compare(slice(start, stop), mine)
        rows, columns = owner[mine] - start, place[mine] - mine.start
        owns.append(torch.stack([similarity[rows, columns] for similarity in found]))
    to_text, to_image = torch.cat(owns, dim=1)  # [T] each: similarity of each text and its image
    best = to_text.new_full((images,), -math.inf).scatter_reduce(0, owner, to_text, "amax")
    by_image, by_text = _Tally(best), _Tally(to_image)
    for left in range(0, texts, chunk):
        for top in range(0, images, chunk):
            tile, across = slice(top, min(top + chunk, images)), slice(left, min(left + chunk, texts))
            found = compare(tile, across)
            together = slice(max(ends[tile.start], across.start), min(ends[tile.stop], across.stop))
            if together.start < together.stop:
                pairs = owner[together] - top, place[together] - left
                for similarity in found:
                    similarity[pairs] = -math.inf
            by_image.count(found[0], tile, 1)
            by_text.count(found[1], across, 0)
    as_good = (to_text >= best[owner] - TOLERANCE).double()
    own = torch.zeros_like(best).double().index_add_(0, owner, as_good)
    return by_image.places(own), by_text.places(torch.ones(texts))


def _outcomes(places: _Places, ks: Sequence[int]) -> dict[str, Tensor]:
    """What `summary` averages: "r<k>" and "mean_rank", expected over fair draws; [Q] each."""
    hits = {f"r{k}": _expected_hits(k - places.ahead, places.own, places.others) for k in ks}
    return {**hits, "mean_rank": 1 + places.ahead + places.others / (places.own + 1)}


def _class_means(prompts: Tensor, prompt_class: Tensor) -> Tensor:
    """[I, C] from [I, T]: the mean over each class's prompts."""
    own_class = prompt_class.to(prompts.device)
    count = own_class.bincount()
    return prompts.new_zeros(len(prompts), len(count)).index_add_(1, own_class, prompts) / count


def _check_index(index: Tensor, name: str, groups: str, rows: int, number: int) -> None:
    if index.shape != (rows,):
        raise ValueError(f"{name} has shape {list(index.shape)}; it needs [{rows}], one per text")
    if not torch.equal(index.unique(), torch.arange(number, device=index.device)):
        raise ValueError(f"{name} must name each of the {groups} 0 … {number - 1} at least once, and no other")


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
    return F.normalize(features.detach().float(), dim=-1)
