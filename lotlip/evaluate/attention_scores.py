"""Where a model's attention goes, in numbers: on the objects that a text names, and over a long text's sub-captions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotlip.data.batches import in_batches
from lotlip.demo.questions import object_texts, salient_words
from lotlip.demo.world import Scene, SceneObject
from lotlip.evaluate.attention import maps_of, spread, sub_caption_shares, sub_captions, text_attention, where_words
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.evaluate.metrics import Scores, ratios

IMAGES = 200  # enough for intervals of a few percent, and done in seconds
_FINENESS = 16  # points by which a patch's side is sampled to see how much of it an object covers


@dataclass(frozen=True)
class AttentionScores:
    """What was measured.

    Attributes:
        scores: by name; see `object_scores` and `text_scores`.
        left_out: what could not be measured ("images", "texts") → why, for a person.
    """

    scores: Scores
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON types: "values", "intervals" and "left_out"."""
        intervals = {name: list(ends) for name, ends in self.scores.intervals.items()}
        return {"values": dict(self.scores.values), "intervals": intervals, "left_out": self.left_out}


def attention_scores(encoder: LotlipEncoder, benchmark: Benchmark) -> AttentionScores:
    """All that can be measured on a benchmark's first images."""
    scores, left_out = Scores(), {}
    try:
        if benchmark.scenes:
            scores |= object_scores(encoder, benchmark)
        else:
            left_out["images"] = "where the objects are in these images is not known"
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
    """How much of the relevance of a scene's patches falls on the one object that a text names.

    Args:
        encoder: of the model.
        benchmark: of scenes.
        images: how many of its first scenes are asked for.

    Returns:
        Shares of relevance, the mean over scenes of the mean over their small objects: `on_named_object`;
        `on_object_not_named`, on the same objects when the text names another small one of the scene; and
        `named_object_area`, which is chance. Of the salient object: `on_salient_object` and `salient_object_area`. As
        ratios of these, with a confidence interval over scenes: `on_named_object_over_chance`,
        `on_named_object_over_not_named` and `on_salient_object_over_chance`.

    Raises:
        ValueError: as of `relevance_maps`.
    """
    scenes = benchmark.scenes[:images]
    texts = [object_texts(scene) for scene in scenes]
    maps = maps_of(encoder, map(benchmark.read, range(len(scenes))), texts)
    found = torch.stack([on_objects(scene, each) for scene, each in zip(scenes, maps, strict=True)]).double()
    names = (
        "on_named_object", "on_object_not_named", "named_object_area", "on_salient_object", "salient_object_area",
    )  # fmt: skip
    columns = dict(zip(names, found.T, strict=True))
    parts = {
        "on_named_object_over_chance": ("on_named_object", "named_object_area"),
        "on_named_object_over_not_named": ("on_named_object", "on_object_not_named"),
        "on_salient_object_over_chance": ("on_salient_object", "salient_object_area"),
    }
    measured = {name: ratio(columns[above], columns[below]) for name, (above, below) in parts.items()}
    return Scores(
        {name: column.mean().item() for name, column in columns.items()}
        | {name: value for name, (value, _) in measured.items()},
        {name: interval for name, (_, interval) in measured.items()},
    )


def on_objects(scene: Scene, maps: Tensor) -> Tensor:
    """What falls where in one scene.

    Args:
        scene: with n small objects, two at least.
        maps: for the text of the salient object, then of each small one, [1 + n, G, G'].

    Returns:
        [5]: the share on a small object that the text names, on it when the text names another small one, and its
        area, the means over small objects; the share on the salient object when it is named, and its area.
    """
    objects = coverage((scene.salient, *scene.objects), tuple(maps.shape[1:]))
    share = maps.flatten(1) @ objects.flatten(1).T  # [text, object]
    area = objects.mean(dim=(1, 2))
    small = share[1:, 1:]
    own = small.diagonal()
    others = (small.sum(dim=0) - own) / (len(small) - 1)
    return torch.stack([own.mean(), others.mean(), area[1:].mean(), share[0, 0], area[0]])


def coverage(things: Iterable[SceneObject], grid: tuple[int, ...]) -> Tensor:
    """The share of each patch that lies in the circle around each object: [N, G, G'], 0 … 1.

    An even map has the object's area for its share on it, so that is chance.
    """
    rows, columns = ((torch.arange(size * _FINENESS) + 0.5) / (size * _FINENESS) for size in grid)
    discs = torch.tensor([thing.disc for thing in things])[..., None, None]  # [N, 3, 1, 1]
    x, y, radius = discs.unbind(dim=1)
    inside = ((columns - x) ** 2 + (rows[:, None] - y) ** 2 <= radius**2).float()
    return torch.nn.functional.avg_pool2d(inside, _FINENESS)


def ratio(above: Tensor, below: Tensor) -> tuple[float, tuple[float, float]]:
    """The ratio of two means over the same scenes, [S] each, and its 95 % confidence interval over scenes."""
    (value,), ((low, high),) = ratios(above[:, None], below)
    return value, (low, high)


# --- texts --------------------------------------------------------------------------------------------------------


def text_scores(encoder: LotlipEncoder, benchmark: Benchmark, texts: int = IMAGES) -> Scores:
    """How evenly [CLS] and the corner tokens read the first long texts.

    Returns:
        `cls_entropy`, `corner1_entropy`, … over sub-captions, 1 where all have equal shares, and `length_entropy`, what
        it would be if each token had the same share; of scenes also the share of attention on the words of the salient
        object, `cls_on_salient_words`, `corner1_on_salient_words`, …, and `salient_words_length`, their share of the
        tokens. Means over texts of two sub-captions or more. Nothing where there is no such text.

    Raises:
        ValueError: as of `text_attention`.
    """
    model, tokenizer, asked = encoder.model, encoder.tokenizer, benchmark.retrieval["long"]
    tokens = 1 + model.config.corner_tokens + model.config.register_tokens
    columns: dict[str, list[Tensor]] = {}
    numbered = zip(asked.texts[:texts], asked.image[:texts], strict=True)
    for batch in in_batches(numbered, 50):
        ids, lengths = (torch.from_numpy(made).to(model.device) for made in tokenizer([text for text, _ in batch]))
        attention, number = text_attention(model, ids, lengths), sub_captions(model, ids, lengths)
        shares, by_length = sub_caption_shares(attention, number)
        count = number.amax(dim=1) + 1
        several = count > 1
        found = _by_reader(spread(shares, count), "entropy") | {"length_entropy": spread(by_length, count)}
        if benchmark.scenes:
            phrases = [tokenizer.encode([salient_words(benchmark.scenes[image])])[0][tokens:-1] for _, image in batch]
            words = [
                where_words(torch.tensor(phrase, device=row.device), row)
                for phrase, row in zip(phrases, ids, strict=True)
            ]
            salient = torch.stack(words)[:, None].float()  # [B, 1, L]
            found |= _by_reader((attention * salient).sum(dim=-1), "on_salient_words")
            found["salient_words_length"] = salient[:, 0].sum(dim=-1) / (number >= 0).sum(dim=-1)
        for name, values in found.items():
            columns.setdefault(name, []).append(values[several].double())
    means = {name: torch.cat(values) for name, values in columns.items()}
    return Scores({name: values.mean().item() for name, values in means.items() if len(values)})


def readers(number: int) -> list[str]:
    """What those are called that read a text: [CLS] and the corner tokens, `number` in all."""
    return ["cls", *(f"corner{corner}" for corner in range(1, number))]


def _by_reader(values: Tensor, what: str) -> dict[str, Tensor]:
    """Columns of [B, 1 + m], by name."""
    return {f"{reader}_{what}": column for reader, column in zip(readers(values.shape[1]), values.T, strict=True)}
