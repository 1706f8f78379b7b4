"""Retrieval with image features that each text pools from the patches (FLAIR, arXiv 2412.03561).

Beside the image's own feature, which an embedding index needs, an ablation with `loss.conditioned` is scored with the
pooled features of all pairs of images and texts, and with those of the best candidates only: the best `CANDIDATES`
texts of each image and images of each text by the own feature are ranked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotlip.data.weights import check_finite, read_weights
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts
from lotlip.evaluate.config import MAX_CONDITIONED_PAIRS
from lotlip.evaluate.encoders import Encoder, LotlipEncoder
from lotlip.evaluate.evaluate import KS, encoded_images, naming_images
from lotlip.evaluate.metrics import Candidates, Scores, best_candidates, retrieval_by_candidates, retrieval_by_pairs
from lotlip.evaluate.score_names import CONDITIONED, RERANKED, Metric
from lotlip.models.lotlip import LotlipModel
from lotlip.models.vision.image_tower import load_weights
from lotlip.objectives.conditioned import ConditionedPooling, TextQueries, conditioned_scores
from lotlip.pretrain.records import OBJECTIVE

HEADS = "provenance.pretraining.loss.conditioned.heads"  # where a model's configuration has them
CANDIDATES = 100  # that are ranked again for each image and each text
KEPT_BYTES = 2**30  # patches that are kept for further seeds; those of 5,000 images of a ViT-B/16 would take 3 GB
_VALUES_ON_GPU = 2**26  # elements of pooled features at a time, 256 MB


class Pooling:
    """The pooling that was trained with a model. It computes in fp32, without gradients.

    Args:
        module: its projection and weights.
        heads: attention heads.
        device: where it computes.
    """

    def __init__(self, module: ConditionedPooling, heads: int, device: torch.device | str = "cpu") -> None:
        self._module, self._heads, self._device = module.to(device).eval(), heads, device
        with torch.inference_mode():
            self._weights = self._module.weights()
        self._blocks = {"values_at_once": _VALUES_ON_GPU} if self._weights.is_cuda else {}

    def queries(self, texts: Tensor) -> TextQueries:
        """Prepares normalised texts, [T, D]."""
        with torch.inference_mode():
            return TextQueries.of(texts.to(self._device), self._weights, self._heads)

    def project(self, patches: Tensor) -> Tensor:
        """Projects patches, [B, P, C] → [B, P, D]."""
        with torch.inference_mode():
            return self._module.project(patches.to(self._device))

    def scores(self, tokens: Tensor, texts: TextQueries) -> Tensor:
        """Cosines of texts and the features that they pool from projected patches [B, P, D]; [B, T] on the CPU."""
        with torch.inference_mode():
            return conditioned_scores(tokens, texts, self._weights, **self._blocks).cpu()


def load_pooling(folder: Path, loss: Mapping[str, Any], model: LotlipModel) -> Pooling:
    """Loads the pooling that was trained with a model.

    Args:
        folder: folder of the model.
        loss: settings of the loss that it was trained with, with "conditioned".
        model: the model.

    Raises:
        ValueError: the file of weights is missing or damaged, has other weights than the settings need, or has weights
            that are not finite.
    """
    heads = loss["conditioned"]["heads"]
    module = ConditionedPooling(model.image_tower.token_width, model.config.embed_dim, heads)
    path = folder / OBJECTIVE
    found = read_weights(path)
    if loss.get("masks") is not None:  # SmartCLIP's network, which retrieval does not use
        found = {name: value for name, value in found.items() if not name.startswith("objective.masks.")}
    try:
        load_weights(nn.ModuleDict({"objective": nn.ModuleDict({"conditioned": module})}), found, path)
    except ValueError as error:
        raise ValueError(f"{error}; restore the files of one model, or train the ablation again") from error
    check_finite(found.items(), path)
    return Pooling(module, heads, model.device)


def saved_pooling(encoder: Encoder) -> Pooling | str | None:
    """Loads the pooling that was trained with a model, by the settings in the model's own configuration.

    Returns:
        The pooling; the reason why a model that was trained with one cannot use it; or None for any other model.

    Raises:
        ValueError: see `load_pooling`.
    """
    if not isinstance(encoder, LotlipEncoder) or encoder.folder is None:
        return None
    path = encoder.folder / OBJECTIVE
    loss = _training_loss(encoder.model.config.provenance)
    conditioned = loss.get("conditioned")
    if not path.is_file():
        return f"it was trained with loss.conditioned, but {path} is missing" if conditioned else None
    if not conditioned and not any(name.startswith("objective.conditioned.") for name in read_weights(path)):
        return None
    heads = conditioned.get("heads") if isinstance(conditioned, Mapping) else None
    if type(heads) is not int or heads < 1:  # True is an int too
        return f"the heads of its pooling are unknown: its config.json has no {HEADS}"
    return load_pooling(encoder.folder, loss, encoder.model)


def _training_loss(provenance: Any) -> Mapping[str, Any]:
    """Returns the settings of the loss in a model's provenance, which may be of another project; empty without any."""
    found = provenance
    for key in ("pretraining", "loss"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


class PatchFeatures:
    """Features of the patches of benchmarks' images, computed once for all seeds if these share a frozen image tower.

    Args:
        shared: whether all seeds share the tower.
        most_bytes: features that are kept; the others are computed again for each seed.
    """

    def __init__(self, shared: bool, most_bytes: int = KEPT_BYTES) -> None:
        self._left = most_bytes if shared else 0
        self._kept: dict[str, list[Tensor]] = {}

    def of(self, encoder: LotlipEncoder, benchmark: Benchmark) -> Iterator[Tensor]:
        """Yields the features of all images in order, in batches, [B, P, C], not normalised.

        Raises:
            ValueError: an image cannot be read or decoded; the message names it.
        """
        if benchmark.name in self._kept:
            yield from self._kept[benchmark.name]
            return
        batches: list[Tensor] = []
        size = 0
        with naming_images(benchmark):
            for batch in encoder.patches(encoded_images(benchmark)):
                size += batch.nbytes
                if size <= self._left:
                    batches.append(batch)
                else:
                    batches.clear()
                yield batch
        if size <= self._left:
            self._kept[benchmark.name] = batches
            self._left -= size


def families(benchmark: Benchmark, most_pairs: int = MAX_CONDITIONED_PAIRS) -> dict[str, str]:
    """Returns which scores a benchmark has: first part of their names, such as "conditioned-long" → kind of text."""
    return {
        f"{prefix}{kind}": kind
        for prefix in (CONDITIONED, RERANKED)
        for kind, texts in benchmark.retrieval.items()
        if prefix == RERANKED or _pairs(texts) <= most_pairs
    }


def of_families(by_metric: Mapping[str, float], found: Mapping[str, str]) -> dict[str, float]:
    """Chances or ceilings of conditioned scores, which are those of the same recall with the images' own features.

    Args:
        by_metric: chances or ceilings of all other scores.
        found: see `families`.
    """
    return {
        Metric(f"{family}.{way}.r{k}"): by_metric[f"{kind}.{way}.r{k}"]
        for family, kind in found.items()
        for way in ("image_to_text", "text_to_image")
        for k in KS
    }


def protocol(benchmark: Benchmark, most_pairs: int = MAX_CONDITIONED_PAIRS) -> dict[str, str | int]:
    """Returns the settings that conditioned scores depend on, and why some are left out; empty without retrieval."""
    if not benchmark.retrieval:
        return {}
    left_out = [
        f"{kind} text has {_pairs(texts):,} pairs"
        for kind, texts in benchmark.retrieval.items()
        if f"{CONDITIONED}{kind}" not in families(benchmark, most_pairs)
    ]
    reason = f"{' and '.join(left_out)}, more than max_conditioned_pairs, {most_pairs:,}; only re-ranked"
    settings: dict[str, str | int] = {"reranked_candidates": CANDIDATES}
    return settings | ({"not_conditioned": reason} if left_out else {})


def _pairs(texts: ImageTexts) -> int:
    """Number of pairs of a text and an image that has a text."""
    return len(texts.texts) * len(set(texts.image))


def evaluate_conditioned(
    encoder: Encoder,
    benchmark: Benchmark,
    images: Tensor,
    patches: Iterable[Tensor],
    pooling: Pooling,
    most_pairs: int = MAX_CONDITIONED_PAIRS,
    candidates: int = CANDIDATES,
) -> Scores:
    """Computes recall with pooled features: "conditioned-long.text_to_image.r1", "reranked-long.text_to_image.r1", …

    Args:
        encoder: the model.
        benchmark: the benchmark.
        images: the model's features of the benchmark's images, [I, D].
        patches: features of the patches of all images in order, in batches, [B, P, C]; see `PatchFeatures`.
        pooling: the pooling that was trained with the model.
        most_pairs: largest number of pairs of one kind of text that are all scored.
        candidates: number of candidates that are ranked again.
    """
    asked = {
        kind: _PooledPairs(texts, images, encoder.texts(texts.texts)[0], pooling, most_pairs, candidates)
        for kind, texts in benchmark.retrieval.items()
    }
    if not asked:
        return Scores()
    first = 0
    for batch in patches:
        tokens = pooling.project(batch)
        for pairs in asked.values():
            pairs.add(first, tokens)
        first += len(batch)
    scores = Scores()
    for kind, pairs in asked.items():
        if pairs.similarity is not None:
            scores |= retrieval_by_pairs(pairs.similarity, pairs.owner, KS).under(f"{CONDITIONED}{kind}")
        scores |= retrieval_by_candidates(*pairs.candidates(), pairs.owner, KS).under(f"{RERANKED}{kind}")
    return scores


class _PooledPairs:
    """Similarities of one kind of text and pooled features: of all pairs, or of the candidates if there are too many.

    Args:
        texts: the texts.
        images: features of all images, [N, D], of which I have texts.
        features: features of the texts, [T, D].
        pooling, most_pairs, candidates: see `evaluate_conditioned`.

    Attributes:
        owner: number of each text's image among the I, [T].
        similarity: of all pairs, [I, T]; None if there are too many.
    """

    def __init__(
        self, texts: ImageTexts, images: Tensor, features: Tensor, pooling: Pooling, most_pairs: int, candidates: int
    ) -> None:
        with_text, self.owner = torch.tensor(texts.image).unique(return_inverse=True)
        self._row = {image: row for row, image in enumerate(with_text.tolist())}
        self._pooling, self._queries = pooling, pooling.queries(features)
        self._texts, self._images = best_candidates(images[with_text], features, candidates)  # [I, k], [T, k']
        self.similarity: Tensor | None = None
        if _pairs(texts) <= most_pairs:
            self.similarity = torch.empty(len(with_text), len(features))
            return
        self._to_text, self._to_image = (torch.empty(index.shape) for index in (self._texts, self._images))
        # the places of each image among the texts' candidates are order[ends[row] : ends[row + 1]]
        listed = self._images.flatten()
        self._order = listed.argsort(stable=True)
        self._ends = [0, *listed.bincount(minlength=len(with_text)).cumsum(0).tolist()]

    def add(self, first: int, tokens: Tensor) -> None:
        """Scores a batch of images, by their projected patches [B, P, D]; `first` is the number of the first one."""
        rows = {place: self._row[first + place] for place in range(len(tokens)) if first + place in self._row}
        if self.similarity is None:
            for place, row in rows.items():
                self._add_candidates(row, tokens[place : place + 1])
        elif rows:
            self.similarity[[*rows.values()]] = self._pooling.scores(tokens[[*rows]], self._queries)

    def _add_candidates(self, row: int, image: Tensor) -> None:
        """Scores an image with its own candidates, and with the texts whose candidate it is."""
        places = self._order[self._ends[row] : self._ends[row + 1]]
        texts = torch.cat([self._texts[row], places // self._images.shape[1]])
        scores = self._pooling.scores(image, self._queries.part(texts.to(image.device)))[0]
        self._to_text[row], self._to_image.view(-1)[places] = scores.split([self._texts.shape[1], len(places)])

    def candidates(self) -> tuple[Candidates, Candidates]:
        """Returns the candidates of each image and of each text, after all images were added."""
        if self.similarity is not None:
            self._to_text = self.similarity.gather(1, self._texts)
            self._to_image = self.similarity.T.gather(1, self._images)
        return Candidates(self._texts, self._to_text), Candidates(self._images, self._to_image)
