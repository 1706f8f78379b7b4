"""Scores of a model's attention: on the objects that a text names, and over the sub-captions of a long text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotlip.data.batches import in_batches
from lotlip.demo.questions import object_texts, salient_words
from lotlip.demo.world import Scene, SceneObject
from lotlip.evaluate.attention import (
    image_relevance_maps,
    normalised_entropy,
    phrase_mask,
    sub_caption_shares,
    sub_captions,
    text_attention,
)
from lotlip.evaluate.attention_pictures import disc_in_crop
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.evaluate.metrics import Scores, ratios

IMAGES = 200  # enough for intervals of a few percent, and takes seconds
_SAMPLES_PER_SIDE = 16  # sampling points per side of a patch, to measure how much of it an object covers


@dataclass(frozen=True)
class AttentionScores:
    """Attention scores on one benchmark.

    Attributes:
        scores: scores by name; see `object_scores` and `text_scores`.
        left_out: what could not be measured ("images", "texts") → reason.
    """

    scores: Scores
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Converts the scores to JSON types: "values", "intervals" and "left_out"."""
        intervals = {name: list(ends) for name, ends in self.scores.intervals.items()}
        return {"values": dict(self.scores.values), "intervals": intervals, "left_out": self.left_out}


def attention_scores(encoder: LotlipEncoder, benchmark: Benchmark) -> AttentionScores:
    """Computes all attention scores that are possible on a benchmark's first images."""
    scores, left_out = Scores(), {}
    try:
        if benchmark.scenes:
            scores |= object_scores(encoder, benchmark)
        else:
            left_out["images"] = "the positions of objects in these images are unknown"
    except ValueError as error:
        left_out["images"] = str(error)
    try:
        if "long" in benchmark.retrieval:
            scores |= text_scores(encoder, benchmark)
        else:
            left_out["texts"] = "there are no long texts"
    except ValueError as error:
        left_out["texts"] = str(error)
    return AttentionScores(scores, left_out)


# --- scenes -------------------------------------------------------------------------------------------------------


def object_scores(encoder: LotlipEncoder, benchmark: Benchmark, images: int = IMAGES) -> Scores:
    """Measures the share of patch relevance that falls on the object that a text names.

    Args:
        encoder: the model.
        benchmark: a benchmark of scenes.
        images: number of scenes, from the first.

    Returns:
        Shares of relevance, averaged over the small objects of a scene and over scenes: `on_named_object`;
        `on_object_not_named`, on the same objects when the text names another small object of the scene; and
        `named_object_area`, which is chance. For the salient object: `on_salient_object` and `salient_object_area`.
        Ratios of these, with a confidence interval over scenes: `on_named_object_over_chance`,
        `on_named_object_over_not_named` and `on_salient_object_over_chance`.

    Raises:
        ValueError: see `relevance_maps`.
    """
    scenes = benchmark.scenes[:images]
    texts = [object_texts(scene) for scene in scenes]
    maps = image_relevance_maps(encoder, map(benchmark.read, range(len(scenes))), texts)
    crop = encoder.model.image_tower.spec.crop
    rows = torch.stack([on_objects(scene, each, crop) for scene, each in zip(scenes, maps, strict=True)]).double()
    names = (
        "on_named_object", "on_object_not_named", "named_object_area", "on_salient_object", "salient_object_area",
    )  # fmt: skip
    columns = dict(zip(names, rows.T, strict=True))
    parts = {
        "on_named_object_over_chance": ("on_named_object", "named_object_area"),
        "on_named_object_over_not_named": ("on_named_object", "on_object_not_named"),
        "on_salient_object_over_chance": ("on_salient_object", "salient_object_area"),
    }
    over = {name: ratio(columns[numerator], columns[denominator]) for name, (numerator, denominator) in parts.items()}
    return Scores(
        {name: column.mean().item() for name, column in columns.items()}
        | {name: value for name, (value, _) in over.items()},
        {name: interval for name, (_, interval) in over.items()},
    )


def on_objects(scene: Scene, maps: Tensor, crop: float = 1.0) -> Tensor:
    """Computes the shares of relevance on the objects of one scene.

    Args:
        scene: a scene with n small objects, n ≥ 2.
        maps: relevance for the text of the salient object, then of each small one, [1 + n, G, G'].
        crop: share of the scene's sides that the model sees, from the centre.

    Returns:
        [5]: averaged over small objects, the share on the object when the text names it, the share on it when the text
        names another small one, and its area; the share on the salient object when it is named, and its area.
    """
    objects = coverage((scene.salient, *scene.objects), tuple(maps.shape[1:]), crop)
    share = maps.flatten(1) @ objects.flatten(1).T  # [text, object]
    area = objects.mean(dim=(1, 2))
    small = share[1:, 1:]
    named = small.diagonal()
    not_named = (small.sum(dim=0) - named) / (len(small) - 1)
    return torch.stack([named.mean(), not_named.mean(), area[1:].mean(), share[0, 0], area[0]])


def coverage(things: Iterable[SceneObject], grid: tuple[int, ...], crop: float = 1.0) -> Tensor:
    """Computes the fraction of each patch that lies in the circle around each object, [N, G, G'], 0 … 1.

    The mean is the object's area, which is the share that a uniform map has on it.
    """
    rows, columns = ((torch.arange(size * _SAMPLES_PER_SIDE) + 0.5) / (size * _SAMPLES_PER_SIDE) for size in grid)
    discs = torch.tensor([disc_in_crop(thing.disc, crop) for thing in things])[..., None, None]  # [N, 3, 1, 1]
    x, y, radius = discs.unbind(dim=1)
    inside = ((columns - x) ** 2 + (rows[:, None] - y) ** 2 <= radius**2).float()
    return torch.nn.functional.avg_pool2d(inside, _SAMPLES_PER_SIDE)


def ratio(numerator: Tensor, denominator: Tensor) -> tuple[float, tuple[float, float]]:
    """Computes the ratio of two means over the same scenes, [S] each, and its 95 % confidence interval."""
    (value,), ((low, high),) = ratios(numerator[:, None], denominator)
    return value, (low, high)


# --- texts --------------------------------------------------------------------------------------------------------


def text_scores(encoder: LotlipEncoder, benchmark: Benchmark, texts: int = IMAGES) -> Scores:
    """Measures how evenly [CLS] and the corner tokens attend to the first long texts.

    Returns:
        `cls_entropy`, `corner1_entropy`, …: entropy over sub-captions, 1 when all have equal shares; and
        `length_entropy`, the entropy of uniform attention over tokens. For scenes also `cls_on_salient_words`,
        `corner1_on_salient_words`, …: the share of attention on the words of the salient object; and
        `salient_words_length`, their share of the tokens. Means over texts with at least two sub-captions; empty if
        there is no such text.

    Raises:
        ValueError: see `text_attention`.
    """
    model, tokenizer, long_texts = encoder.model, encoder.tokenizer, benchmark.retrieval["long"]
    tokens = 1 + model.config.corner_tokens + model.config.register_tokens
    columns: dict[str, list[Tensor]] = {}
    numbered = zip(long_texts.texts[:texts], long_texts.image[:texts], strict=True)
    for batch in in_batches(numbered, 50):
        ids, lengths = (torch.from_numpy(array).to(model.device) for array in tokenizer([text for text, _ in batch]))
        attention, number = text_attention(model, ids, lengths), sub_captions(model, ids, lengths)
        shares, by_length = sub_caption_shares(attention, number)
        count = number.amax(dim=1) + 1
        several = count > 1
        values_by_name = _by_reader(normalised_entropy(shares, count), "entropy")
        values_by_name["length_entropy"] = normalised_entropy(by_length, count)
        if benchmark.scenes:
            phrases = [tokenizer.encode([salient_words(benchmark.scenes[image])])[0][tokens:-1] for _, image in batch]
            words = [
                phrase_mask(torch.tensor(phrase, device=row.device), row)
                for phrase, row in zip(phrases, ids, strict=True)
            ]
            salient = torch.stack(words)[:, None].float()  # [B, 1, L]
            values_by_name |= _by_reader((attention * salient).sum(dim=-1), "on_salient_words")
            values_by_name["salient_words_length"] = salient[:, 0].sum(dim=-1) / (number >= 0).sum(dim=-1)
        for name, values in values_by_name.items():
            columns.setdefault(name, []).append(values[several].double())
    means = {name: torch.cat(values) for name, values in columns.items()}
    return Scores({name: values.mean().item() for name, values in means.items() if len(values)})


def readers(number: int) -> list[str]:
    """Returns the names of the first `number` tokens that attend to a text: [CLS] and the corner tokens."""
    return ["cls", *(f"corner{corner}" for corner in range(1, number))]


def _by_reader(values: Tensor, what: str) -> dict[str, Tensor]:
    """Splits [B, 1 + m] into named columns."""
    return {f"{reader}_{what}": column for reader, column in zip(readers(values.shape[1]), values.T, strict=True)}
