"""Does a model use a long text to its end? Two tests on generated scenes, beyond the paper.

The first measures whether an image is closer to its text than to a text in which one detail of a small object is
changed, by the position of that object's sentence. The second measures R@1 by the number of sentences of the texts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lotlip.data.batches import in_batches
from lotlip.demo.questions import as_text, sentences, small_sentence
from lotlip.demo.world import COLOURS, POSITIONS, SHAPES, TEXTURES, Scene
from lotlip.evaluate.encoders import Encoder
from lotlip.evaluate.metrics import TOLERANCE, comparison, retrieval, summary

ATTRIBUTES = {"colour": tuple(COLOURS), "texture": TEXTURES, "shape": SHAPES, "position": tuple(POSITIONS)}
SCENES = 1000  # their intervals are narrow enough, and both tests have many texts for each scene
_BATCH = 64  # questions

TokenCounts = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Share:
    """A fraction from 0 to 1 and the bounds of its 95 % confidence interval over images."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class PositionAccuracy:
    """Accuracy when the changed sentence is the `position`-th of those on small objects, from 1.

    Attributes:
        tokens_before: mean number of word pieces before the sentence.
    """

    position: int
    tokens_before: float
    accuracy: Share


@dataclass(frozen=True)
class AttributeAccuracy:
    """Accuracy over all positions for the scenes in which this attribute was changed."""

    attribute: str
    scenes: int
    accuracy: Share


@dataclass(frozen=True)
class HardNegatives:
    """How often an image is closer to its text than to the changed text; chance is one half."""

    scenes: int
    accuracy: Share
    by_position: list[PositionAccuracy]
    by_attribute: list[AttributeAccuracy]


@dataclass(frozen=True)
class LengthRecall:
    """R@1 with texts truncated after this many sentences; shorter texts are complete.

    Attributes:
        images: number of images, each with one text.
        tokens: mean number of word pieces per text.
    """

    sentences: int
    images: int
    tokens: float
    image_to_text: Share
    text_to_image: Share


@dataclass(frozen=True)
class ReadingScores:
    """The results of both tests."""

    hard_negatives: HardNegatives
    lengths: list[LengthRecall]

    def to_json(self) -> dict[str, Any]:
        """Converts the results to JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """A scene's true texts, and the same texts with one changed sentence, with the sentence at each position.

    Attributes:
        scene: index of the scene.
        attribute: the changed attribute of a small object, a key of `ATTRIBUTES`.
        before: the text before the sentence, for each of its positions.
        true, changed: the texts with the true and the changed sentence, for each of its positions.
    """

    scene: int
    attribute: str
    before: list[str]
    true: list[str]
    changed: list[str]


@dataclass(frozen=True)
class ReadingTest:
    """The texts of both tests, the same for all models.

    Attributes:
        questions: see `questions`.
        before: mean number of word pieces before the sentence in question, by position.
        truncated: long texts truncated after one sentence, two, …; one for each scene.
        tokens: mean number of word pieces of these texts.
    """

    questions: list[Question]
    before: list[float]
    truncated: list[list[str]]
    tokens: list[float]


def make_reading_test(scenes: Sequence[Scene], token_counts: TokenCounts, most_scenes: int = SCENES) -> ReadingTest:
    """Builds the texts of both tests.

    Args:
        scenes: the scenes of a benchmark's images.
        token_counts: texts → number of word pieces of each.
        most_scenes: largest number of scenes, from the first.
    """
    scenes = scenes[:most_scenes]
    asked = questions(scenes)
    before = zip(*[token_counts(question.before) for question in asked], strict=True)
    by_scene = [sentences(scene) for scene in scenes]
    most = max(map(len, by_scene))
    truncated = [[as_text(parts[:number]) for parts in by_scene] for number in range(1, most + 1)]
    tokens = [fmean(token_counts(texts)) for texts in truncated]
    return ReadingTest(asked, [fmean(counts) for counts in before], truncated, tokens)


def questions(scenes: Sequence[Scene], seed: int = 0) -> list[Question]:
    """Builds a question for each scene with the maximum number of small objects, so that all have all positions.

    The changed value does not occur elsewhere in the scene, so it cannot be confused with another object's. Attributes
    are balanced over scenes, as far as unused values exist: seven objects may have all textures. A sentence keeps the
    wording of its object at every position.

    Args:
        scenes: the scenes of a benchmark's images.
        seed: seed for the choice of objects and values.
    """
    most = max(len(scene.objects) for scene in scenes)
    rng = random.Random(seed)
    uses: Counter[str] = Counter()
    result = []
    for number, scene in enumerate(scenes):
        if len(scene.objects) < most:
            continue
        unused = {
            attribute: [value for value in values if value not in _values(scene, attribute)]
            for attribute, values in ATTRIBUTES.items()
        }
        attribute = min((name for name, values in unused.items() if values), key=uses.__getitem__)
        uses[attribute] += 1
        place = rng.randrange(most)
        change: dict[str, Any] = {attribute: rng.choice(unused[attribute])}
        others = sentences(scene)
        first = len(others) - most  # index of the first sentence on a small object
        truth = others.pop(first + place)
        starts = [others[: first + position] for position in range(most)]
        true, changed = (
            [as_text([*start, sentence, *others[len(start) :]]) for start in starts]
            for sentence in (truth, small_sentence(scene, place, replace(scene.objects[place], **change)))
        )
        result.append(Question(number, attribute, [as_text(start) for start in starts], true, changed))
    return result


def _values(scene: Scene, attribute: str) -> set[str]:
    """The values of an attribute in a scene."""
    return {getattr(thing, attribute) for thing in (scene.salient, *scene.objects)}


def evaluate_reading(encoder: Encoder, test: ReadingTest, images: Tensor) -> ReadingScores:
    """Runs both tests on a model.

    Args:
        encoder: the model.
        test: the texts.
        images: the encoder's features of the benchmark's images, [I, D] or [I, P, D]; those of `test` are the first.
    """
    images = images[: len(test.truncated[0])]
    return ReadingScores(hard_negatives(encoder, test, images), recall_by_length(encoder, test, images))


def hard_negatives(encoder: Encoder, test: ReadingTest, images: Tensor) -> HardNegatives:
    """Measures the share of images that are closer to the true text than to the changed one; ties count half.

    Args:
        encoder, test, images: see `evaluate_reading`.
    """
    batches = in_batches(test.questions, _BATCH)
    correct = torch.cat([_correct(encoder, batch, images) for batch in batches])  # [Q, positions]
    by_position = [
        PositionAccuracy(number + 1, tokens, _share(correct[:, number])) for number, tokens in enumerate(test.before)
    ]
    by_attribute = []
    for attribute in ATTRIBUTES:
        rows = [number for number, question in enumerate(test.questions) if question.attribute == attribute]
        if rows:
            by_attribute.append(AttributeAccuracy(attribute, len(rows), _share(correct[rows].mean(dim=1))))
    return HardNegatives(len(test.questions), _share(correct.mean(dim=1)), by_position, by_attribute)


def _correct(encoder: Encoder, batch: Sequence[Question], images: Tensor) -> Tensor:
    """1 if the true text is closer, 0 if the changed one is, one half for ties; [Q, positions]."""
    positions = len(batch[0].true)
    features, mask = encoder.texts([text for question in batch for text in (*question.true, *question.changed)])
    compare = comparison(images[[question.scene for question in batch]], features, mask, "text_features")
    rows = []
    for number in range(len(batch)):
        columns = slice(2 * positions * number, 2 * positions * (number + 1))
        true, changed = compare(slice(number, number + 1), columns)[0].view(2, positions)
        margin = true - changed
        rows.append((margin > TOLERANCE).float() + (margin.abs() <= TOLERANCE).float() / 2)
    return torch.stack(rows).cpu()


def recall_by_length(encoder: Encoder, test: ReadingTest, images: Tensor) -> list[LengthRecall]:
    """Measures R@1 in both directions with long texts truncated after one sentence, two, … up to all.

    Args:
        encoder, test, images: see `evaluate_reading`.
    """
    rows = {text: row for row, text in enumerate(dict.fromkeys(text for texts in test.truncated for text in texts))}
    features, mask = encoder.texts(list(rows))  # each distinct text is encoded once
    recalls = []
    for number, (texts, tokens) in enumerate(zip(test.truncated, test.tokens, strict=True), start=1):
        index = torch.tensor([rows[text] for text in texts], device=features.device)
        text_mask = None if mask is None else mask[index]
        scores = retrieval(images, features[index], torch.arange(len(images)), (1,), text_mask=text_mask)
        to_text, to_image = (
            Share(scores.values[name], scores.intervals[name]) for name in ("image_to_text.r1", "text_to_image.r1")
        )
        recalls.append(LengthRecall(number, len(images), tokens, to_text, to_image))
    return recalls


def _share(outcome: Tensor) -> Share:
    """The mean over images with its interval."""
    scores = summary({"share": outcome}, torch.arange(len(outcome)))
    return Share(scores.values["share"], scores.intervals["share"])
