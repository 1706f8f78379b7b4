"""Zero-shot retrieval and classification as pure functions of features or similarities, in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lotlip.objectives.similarity import cosine, late_interaction

# Upper bound of the difference between cosines of equal features, from the order of summation in matrix products.
TOLERANCE = 1e-6

TILE = 512  # images and texts per tile; a tile of similarities fits the cache
_OWN_CHUNK = 64  # images per chunk when similarities to their own texts are computed
RESAMPLES = 1000
_BOOTSTRAP_CHUNK = 2**20  # draws in memory at a time, 8 MB

# Images, texts → image→text similarities and text→image similarities, [i, t] each. With cosine similarity both are the
# same tensor.
Compare = Callable[[slice, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scores:
    """Scores with confidence intervals.

    Attributes:
        values: scores by name; fractions from 0 to 1, and ranks from 1.
        intervals: bounds of the 95 % confidence intervals by name, for scores that have one.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def under(self, prefix: str) -> Scores:
        """Prefixes all names with `prefix` and a dot."""
        values, intervals = (
            {f"{prefix}.{name}": value for name, value in by_name.items()} for by_name in (self.values, self.intervals)
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
    """Computes recall at k, mean and median rank in both directions, by cosine similarity or late interaction.

    An image counts as a hit if any of its texts is among the first k, and its rank is that of its first text. Ties are
    broken at random, and the expected value over all random orders is returned, so constant features score exactly
    `chance`. The best possible rank is 1.

    Each similarity is computed once for both directions. Intervals are bootstrap intervals over images, each with all
    of its texts (`summary`), against an unchanged gallery.

    Args:
        image_features: [I, D], of any norm; with `text_mask` features of patches, [I, P, D].
        text_features: [T, D], of any norm; T may be larger than I. With `text_mask` features of tokens, [T, L, D].
        text_image: [T], the index of each text's image, 0 … I−1; every image needs at least one text.
        ks: the values of k.
        chunk: images and texts per tile; affects memory and time, not the result.
        text_mask: bool, True at a text's tokens, [T, L]. If given, similarity is FILIP's late interaction, computed
            separately for each direction.
        resamples, seed: number of bootstrap samples and their seed.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions, and `….mean_rank`, all with intervals;
        `….median_rank`.

    Raises:
        ValueError: shapes or indices do not match, an image has no text, or a feature is not finite.
    """
    _check_index(text_image, "text_image", "images", len(text_features), len(image_features))
    order = text_image.argsort(stable=True)  # texts of the same image are adjacent
    compare = comparison(image_features, text_features, text_mask, "text_features", order.to(text_features.device))
    owner = text_image[order].to(image_features.device)
    by_image, by_text = _rank_both_directions(compare, owner, chunk)
    return _both_directions(by_image, by_text, owner.cpu(), ks, resamples, seed)


def retrieval_by_pairs(
    similarity: Tensor,
    text_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = TILE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Computes recall at k in both directions, as `retrieval` does, from the similarities of all pairs.

    Args:
        similarity: of images and texts, [I, T].
        text_image, ks, chunk, resamples, seed: see `retrieval`.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions, with intervals.

    Raises:
        ValueError: shapes or indices do not match, an image has no text, or a similarity is not finite.
    """
    _check_index(text_image, "text_image", "images", similarity.shape[1], len(similarity))
    _check_finite(similarity, "similarity")
    order = text_image.argsort(stable=True)

    def compare(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        tile = similarity[rows, order[columns]]  # a copy, because `_rank_both_directions` writes to it
        return tile, tile

    owner = text_image[order]
    by_image, by_text = _rank_both_directions(compare, owner, chunk)
    return _both_directions(by_image, by_text, owner, ks, resamples, seed, ranks=False)


@dataclass(frozen=True)
class Candidates:
    """The best candidates of each query by features, [Q, k] each, in any order.

    Attributes:
        index: the candidates.
        similarity: similarities of the queries and the candidates, by which these are ranked again.
    """

    index: Tensor
    similarity: Tensor


def best_candidates(image_features: Tensor, text_features: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Finds the best texts of each image, [I, k], and the best images of each text, [T, k], by cosine; k ≤ `top`."""
    images, texts = _normalised(image_features, "image_features"), _normalised(text_features, "text_features")

    def best(queries: Tensor, candidates: Tensor) -> Tensor:
        k = min(top, len(candidates))
        return torch.cat([cosine(part, candidates)[0].topk(k, dim=1).indices for part in queries.split(TILE)])

    return best(images, texts), best(texts, images)


def retrieval_by_candidates(
    texts_of_images: Candidates,
    images_of_texts: Candidates,
    text_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Computes recall at k in both directions, as `retrieval` does, if the best candidates are ranked again.

    A match that is not among a query's candidates is no hit.

    Args:
        texts_of_images: the texts that are ranked for each image.
        images_of_texts: the images that are ranked for each text.
        text_image, ks, resamples, seed: see `retrieval`.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions, with intervals.

    Raises:
        ValueError: shapes or indices do not match, a similarity is not finite, or a query has fewer candidates than
            the largest k although there are more.
    """
    images, texts = len(texts_of_images.index), len(images_of_texts.index)
    _check_index(text_image, "text_image", "images", texts, images)
    counts = []
    for name, candidates, number, own in (
        ("texts_of_images", texts_of_images, texts, text_image[texts_of_images.index] == torch.arange(images)[:, None]),
        ("images_of_texts", images_of_texts, images, images_of_texts.index == text_image[:, None]),
    ):
        _check_finite(candidates.similarity, name)
        if candidates.index.shape[1] < min(max(ks), number):
            raise ValueError(
                f"{name} has {candidates.index.shape[1]} of {number} candidates, too few for recall at {max(ks)}"
            )
        counts.append(_rank_candidates(candidates.similarity, own))
    by_image, by_text = counts
    return _both_directions(by_image, by_text, text_image, ks, resamples, seed, ranks=False)


def _rank_candidates(similarity: Tensor, own: Tensor) -> _RankCounts:
    """Counts ranks among candidates, [Q, k] each; `own` are the matches. Without a match all candidates are better."""
    best = similarity.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    better = (~own & (similarity > best + TOLERANCE)).sum(dim=1)
    not_worse = similarity >= best - TOLERANCE
    tied = (~own & not_worse).sum(dim=1) - better
    return _RankCounts(better.double(), (own & not_worse).sum(dim=1).double(), tied.double())


def _both_directions(
    by_image: _RankCounts,
    by_text: _RankCounts,
    text_image: Tensor,
    ks: Sequence[int],
    resamples: int,
    seed: int,
    ranks: bool = True,
) -> Scores:
    """Recall at k of both directions, with intervals; with `ranks` the mean and median rank too."""
    scores = Scores()
    for direction, counts, image in (
        ("image_to_text", by_image, torch.arange(len(by_image.better))),
        ("text_to_image", by_text, text_image),
    ):
        outcomes = _outcomes(counts, ks)
        median = Scores({"median_rank": outcomes["mean_rank"].quantile(0.5).item()}) if ranks else Scores()
        if not ranks:
            del outcomes["mean_rank"]
        scores |= (summary(outcomes, image, resamples, seed) | median).under(direction)
    return scores


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
    """Computes zero-shot top-1 and top-5 accuracy.

    Ties are broken at random, as in `retrieval`.

    Args:
        image_features: [I, D]; with `text_mask` features of patches, [I, P, D].
        class_features: [C, D], see `class_features`; with `text_mask` features of the tokens of all classes' prompts,
            [T, L, D].
        labels: [I], the index of each image's class.
        chunk: images per chunk.
        text_mask: bool, True at a prompt's tokens, [T, L]. If given, similarity is FILIP's late interaction,
            image→text.
        prompt_class: [T], the index of each prompt's class, 0 … C−1. If given, a class's similarity is the mean of its
            prompts' similarities, as in FILIP (arXiv 2111.07783); otherwise each row of `class_features` is a class.
        resamples, seed: number of bootstrap samples over images and their seed, see `summary`.

    Returns:
        `top1` and `top5` as fractions, with intervals.

    Raises:
        ValueError: shapes or labels do not match, or a feature is not finite.
    """
    classes = len(class_features) if prompt_class is None else int(prompt_class.max()) + 1
    if labels.shape != (len(image_features),):
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [{len(image_features)}], one per image")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels are in {int(labels.min())} … {int(labels.max())}, but classes are in 0 … {classes - 1}"
        )
    compare = comparison(image_features, class_features, text_mask, "class_features")
    if prompt_class is not None:
        _check_index(prompt_class, "prompt_class", "classes", len(class_features), classes)
    counts = []
    for start in range(0, len(labels), chunk):
        similarity = compare(slice(start, start + chunk), slice(None))[0]  # [chunk, C]
        if prompt_class is not None:
            similarity = _class_means(similarity, prompt_class)
        label = labels[start : start + chunk, None].to(similarity.device)
        counter = _RankCounter(similarity.gather(1, label)[:, 0])
        counter.add(similarity.scatter(1, label, -math.inf), slice(None), 1)
        counts.append(counter.counts(torch.ones(len(label))))
    outcomes = _outcomes(_RankCounts(*map(torch.cat, zip(*counts, strict=True))), (1, 5))
    named = {"top1": outcomes["r1"], "top5": outcomes["r5"]}
    return summary(named, torch.arange(len(labels)), resamples, seed)


def class_features(prompt_features: Sequence[Tensor]) -> Tensor:
    """Computes class features by prompt ensembling as in CLIP: the normalised mean of normalised prompt features.

    Args:
        prompt_features: for each class [P, D], a row per prompt; P may differ between classes.

    Returns:
        [C, D], L2-normalised.
    """
    means = [_normalised(prompts, "prompt_features").mean(dim=0) for prompts in prompt_features]
    return F.normalize(torch.stack(means), dim=-1)


def chance(images: int, texts_per_image: int, k: int) -> float:
    """Computes the expected image→text recall at k of guessing, if all images have the same number of texts.

    For text→image use `chance(images, 1, k)`, because each text has one image.
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
    """Returns a function that compares images with texts, by cosine or late interaction.

    Args:
        image_features, text_features, text_mask: see `retrieval`.
        text_name: name of the texts in error messages.
        order: order of the texts, [T].

    Raises:
        ValueError: shapes do not match, or a feature is not finite.
    """
    if text_mask is None:
        images, texts = _normalised(image_features, "image_features"), _normalised(text_features, text_name)[order]
        return lambda rows, columns: cosine(images[rows], texts[columns])
    if text_features.ndim != 3 or text_mask.shape != text_features.shape[:2]:
        raise ValueError(
            f"{text_name} {list(text_features.shape)} and text_mask {list(text_mask.shape)} do not match; "
            "late interaction needs [T, L, D] and [T, L]"
        )
    mask = text_mask[order]
    patches = _normalised(image_features, "image_features", "[I, P, D]")
    tokens = _normalised(text_features[order].masked_fill(~mask[..., None], 0), text_name, "[T, L, D]")
    return lambda rows, columns: late_interaction(patches[rows], tokens[columns], mask[columns])


def summary(outcomes: Mapping[str, Tensor], cluster: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Scores:
    """Computes means over queries, with 95 % confidence intervals by the percentile cluster bootstrap.

    Each bootstrap sample draws C clusters with replacement, each with all of its queries. Equal seeds draw equal
    samples, so the scores of two systems are on the same samples.

    Args:
        outcomes: name → one number per query, [Q].
        cluster: [Q], the cluster of each query, 0 … C−1.
        resamples: number of bootstrap samples; 0 for no intervals.
        seed: seed of the draws.

    Returns:
        A mean for each outcome, by the same names.
    """
    columns = torch.stack([*outcomes.values()], dim=1).double()  # [Q, names]
    queries = cluster.bincount()
    sums = columns.new_zeros(len(queries), columns.shape[1]).index_add_(0, cluster, columns)
    values, intervals = ratios(sums, queries, resamples, seed)
    return Scores(dict(zip(outcomes, values, strict=True)), dict(zip(outcomes, intervals, strict=bool(resamples))))


def ratios(
    numerators: Tensor, denominator: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[float], list[tuple[float, float]]]:
    """Computes ratios of sums over clusters, with 95 % confidence intervals by the percentile bootstrap.

    Args:
        numerators: each cluster's contribution to each ratio's numerator, [C, R].
        denominator: each cluster's contribution to the common denominator, [C].
        resamples, seed: see `summary`.

    Returns:
        The ratios and the bounds of their intervals; no intervals without resamples.
    """
    columns = torch.cat([numerators, denominator[:, None]], dim=1).double()

    def sample_ratios(counts: Tensor) -> Tensor:  # count of each cluster in each sample, [samples, C] → [samples, R]
        totals = counts.double() @ columns
        return totals[:, :-1] / totals[:, -1:]

    values = sample_ratios(torch.ones(1, len(denominator)))[0].tolist()
    if not resamples:
        return values, []
    samples = torch.cat([sample_ratios(counts) for counts in _bootstrap_counts(len(denominator), resamples, seed)])
    bounds = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T.tolist()
    return values, [(low, high) for low, high in bounds]


def _bootstrap_counts(clusters: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yields the count of each cluster in each bootstrap sample, [samples, C], in chunks."""
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _BOOTSTRAP_CHUNK // clusters)
    for done in range(0, resamples, chunk):
        samples = min(chunk, resamples - done)
        drawn = torch.randint(clusters, (samples, clusters), generator=generator)
        places = drawn + clusters * torch.arange(samples)[:, None]
        yield places.flatten().bincount(minlength=samples * clusters).view(samples, clusters)


class _RankCounts(NamedTuple):
    """Counts that determine the rank of each query's best match; [Q] each, on the CPU.

    Attributes:
        better: non-matches that are better than the best match.
        own: matches that tie with the best match, itself included.
        tied: non-matches that tie with the best match.
    """

    better: Tensor
    own: Tensor
    tied: Tensor


class _RankCounter:
    """Counts candidates that are better than each query's best match, and candidates that tie with it.

    Args:
        best: similarity of each query's best match, [Q].
    """

    def __init__(self, best: Tensor) -> None:
        self._best = best
        self._better, self._not_worse = torch.zeros_like(best).double(), torch.zeros_like(best).double()

    def add(self, similarity: Tensor, queries: slice, dim: int) -> None:
        """Adds a tile whose candidates are along `dim` and in which matches are −∞."""
        best = self._best[queries].unsqueeze(dim)
        # Comparisons as numbers, because torch compares to and sums bool tensors several times more slowly.
        truth = torch.empty_like(similarity)
        self._better[queries] += torch.gt(similarity, best + TOLERANCE, out=truth).sum(dim)
        self._not_worse[queries] += torch.ge(similarity, best - TOLERANCE, out=truth).sum(dim)

    def counts(self, own: Tensor) -> _RankCounts:
        """Returns the counts over all tiles; `own` is the number of matches that tie with the best match, [Q]."""
        return _RankCounts(self._better.cpu(), own.double().cpu(), (self._not_worse - self._better).cpu())


def _rank_both_directions(compare: Compare, owner: Tensor, chunk: int) -> tuple[_RankCounts, _RankCounts]:
    """Counts ranks for image→text and text→image.

    owner: [T], the index of each text's image, in ascending order.
    """
    ends = [0, *owner.bincount().cumsum(0).tolist()]  # an image's texts are ends[i]:ends[i + 1]
    images, texts = len(ends) - 1, len(owner)
    index = torch.arange(texts, device=owner.device)
    own_similarities = []
    for start in range(0, images, _OWN_CHUNK):
        stop = min(start + _OWN_CHUNK, images)
        own_texts = slice(ends[start], ends[stop])
        similarities = compare(slice(start, stop), own_texts)
        rows, columns = owner[own_texts] - start, index[own_texts] - own_texts.start
        own_similarities.append(torch.stack([similarity[rows, columns] for similarity in similarities]))
    to_text, to_image = torch.cat(own_similarities, dim=1)  # [T] each: similarity of each text and its image
    best = to_text.new_full((images,), -math.inf).scatter_reduce(0, owner, to_text, "amax")
    by_image, by_text = _RankCounter(best), _RankCounter(to_image)
    for left in range(0, texts, chunk):
        for top in range(0, images, chunk):
            image_tile, text_tile = slice(top, min(top + chunk, images)), slice(left, min(left + chunk, texts))
            similarities = compare(image_tile, text_tile)
            matches = slice(max(ends[image_tile.start], text_tile.start), min(ends[image_tile.stop], text_tile.stop))
            if matches.start < matches.stop:
                pairs = owner[matches] - top, index[matches] - left
                for similarity in similarities:
                    similarity[pairs] = -math.inf
            by_image.add(similarities[0], image_tile, 1)
            by_text.add(similarities[1], text_tile, 0)
    ties = (to_text >= best[owner] - TOLERANCE).double()
    own = torch.zeros_like(best).double().index_add_(0, owner, ties)
    return by_image.counts(own), by_text.counts(torch.ones(texts))


def _outcomes(counts: _RankCounts, ks: Sequence[int]) -> dict[str, Tensor]:
    """The expected "r<k>" and "mean_rank" over random orders of ties; [Q] each."""
    hits = {f"r{k}": _expected_hits(k - counts.better, counts.own, counts.tied) for k in ks}
    return {**hits, "mean_rank": 1 + counts.better + counts.tied / (counts.own + 1)}


def _class_means(prompts: Tensor, prompt_class: Tensor) -> Tensor:
    """Averages over each class's prompts, [I, T] → [I, C]."""
    prompt_class = prompt_class.to(prompts.device)
    count = prompt_class.bincount()
    return prompts.new_zeros(len(prompts), len(count)).index_add_(1, prompt_class, prompts) / count


def _check_index(index: Tensor, name: str, groups: str, rows: int, number: int) -> None:
    if index.shape != (rows,):
        raise ValueError(f"{name} has shape {list(index.shape)}; expected [{rows}], one per text")
    if not torch.equal(index.unique(), torch.arange(number, device=index.device)):
        raise ValueError(f"{name} must contain each of the {groups} 0 … {number - 1} at least once, and nothing else")


def _expected_hits(positions: Tensor, own: Tensor, tied: Tensor) -> Tensor:
    """Probability that a random order of `own` + `tied` items has one of `own` in the first `positions`; all [Q].

    It is 1 minus the hypergeometric probability of none, C(tied, positions) / C(own + tied, positions), as a product.
    """
    positions = positions.clamp(min=0)
    none = torch.ones_like(positions)
    for i in range(1, int(own.max()) + 1):
        factor = (tied - positions + i).clamp(min=0) / (tied + i)
        none = torch.where(own >= i, none * factor, none)
    return 1 - none


def _normalised(features: Tensor, name: str, shape: str = "[rows, D]") -> Tensor:
    """Normalises features in fp32. NaN is an error, because comparisons with NaN would silently count as hits."""
    if features.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {list(features.shape)}; expected {shape}")
    _check_finite(features, name)
    return F.normalize(features.detach().float(), dim=-1)


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values).flatten(1).all(dim=1)).sum())
        raise ValueError(f"{name}: {bad} of {len(values)} rows are not finite; check the model that produced them")
