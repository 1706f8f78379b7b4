"""Does a model read to the end? Generated scenes, of which all is known, can ask for one detail anywhere in a text.

Beyond the paper. Two questions: whether an image is nearer to its text than to one in which a single small object is
told wrong, by where that object's sentence stands; and how well images and texts find each other by how many of a
text's sentences there are.
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
_QUESTIONS_AT_ONCE = 64

TokenCounts = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Share:
    """A share from 0 to 1, and the ends of its 95 % confidence interval over images."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class AtPosition:
    """Accuracy where the changed sentence is the `position`-th of those on small objects, from 1.

    Attributes:
        tokens_before: word pieces of the text before it, the mean.
    """

    position: int
    tokens_before: float
    accuracy: Share


@dataclass(frozen=True)
class OfAttribute:
    """Accuracy over all positions for the scenes in which this attribute was changed."""

    attribute: str
    scenes: int
    accuracy: Share


@dataclass(frozen=True)
class HardNegatives:
    """How often an image is nearer to its text than to the changed one; guessing gives one half."""

    scenes: int
    accuracy: Share
    by_position: list[AtPosition]
    by_attribute: list[OfAttribute]


@dataclass(frozen=True)
class AtLength:
    """R@1 with texts of this many sentences; texts that have fewer are whole.

    Attributes:
        tokens: word pieces of a text, the mean.
    """

    sentences: int
    tokens: float
    image_to_text: Share
    text_to_image: Share


@dataclass(frozen=True)
class Reading:
    """Both answers."""

    hard_negatives: HardNegatives
    lengths: list[AtLength]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """A scene's true texts and as many with one sentence that is false of it, the same one everywhere.

    Attributes:
        scene: its number.
        attribute: what the false sentence has wrong of a small object: a key of `ATTRIBUTES`.
        before: what the texts say before that sentence, shortest first; one for each of its positions.
        true, changed: texts in which it stands there, in truth and changed.
    """

    scene: int
    attribute: str
    before: list[str]
    true: list[str]
    changed: list[str]


@dataclass(frozen=True)
class Quiz:
    """What every model is asked, made once for all of them.

    Attributes:
        questions: see `questions`.
        before: word pieces of what stands before the sentence in question, by position the mean.
        cut: long texts that end after one sentence, two, …: one for each scene.
        tokens: word pieces of those, the mean.
    """

    questions: list[Question]
    before: list[float]
    cut: list[list[str]]
    tokens: list[float]


def make_quiz(scenes: Sequence[Scene], token_counts: TokenCounts) -> Quiz:
    """Asks of some scenes.

    Args:
        scenes: of a benchmark's images.
        token_counts: texts → word pieces of each, which say how far into a text a sentence stands.
    """
    asked = questions(scenes)
    before = zip(*[token_counts(question.before) for question in asked], strict=True)
    told = [sentences(scene) for scene in scenes]
    cut = [[as_text(some[:number]) for some in told] for number in range(1, max(map(len, told)) + 1)]
    return Quiz(asked, [fmean(counts) for counts in before], cut, [fmean(token_counts(texts)) for texts in cut])


def questions(scenes: Sequence[Scene], seed: int = 0) -> list[Question]:
    """One question for each of the scenes with the most small objects, so that every position asks of the same ones.

    The wrong value is one that nothing in the scene has, so nobody can take it for another object's. As many scenes
    have one attribute changed as another, as far as such values go: seven objects may have all textures. The frame of a
    sentence goes with its object, not with its position.

    Args:
        scenes: of a benchmark's images.
        seed: of the object and the value that are chosen.
    """
    most = max(len(scene.objects) for scene in scenes)
    chance = random.Random(seed)
    asked: Counter[str] = Counter()
    found = []
    for number, scene in enumerate(scenes):
        if len(scene.objects) < most:
            continue
        free = {
            attribute: [value for value in values if value not in _values(scene, attribute)]
            for attribute, values in ATTRIBUTES.items()
        }
        attribute = min((name for name, values in free.items() if values), key=asked.__getitem__)
        asked[attribute] += 1
        place = chance.randrange(most)
        change: dict[str, Any] = {attribute: chance.choice(free[attribute])}
        others = sentences(scene)
        first = len(others) - most  # of the small objects
        truth = others.pop(first + place)
        starts = [others[: first + position] for position in range(most)]
        true, changed = (
            [as_text([*start, sentence, *others[len(start) :]]) for start in starts]
            for sentence in (truth, small_sentence(place, replace(scene.objects[place], **change)))
        )
        found.append(Question(number, attribute, [as_text(start) for start in starts], true, changed))
    return found


def _values(scene: Scene, attribute: str) -> set[str]:
    """That any object of the scene has."""
    return {getattr(thing, attribute) for thing in (scene.salient, *scene.objects)}


def read_to_the_end(encoder: Encoder, quiz: Quiz, images: Tensor) -> Reading:
    """Asks a model both.

    Args:
        encoder: the model.
        quiz: what to ask.
        images: features of the quiz's images as the encoder gives them, [I, D] or [I, P, D].
    """
    return Reading(hard_negatives(encoder, quiz, images), recall_by_length(encoder, quiz, images))


def hard_negatives(encoder: Encoder, quiz: Quiz, images: Tensor) -> HardNegatives:
    """The share of images that are nearer to the true text than to the changed one; equally near counts half.

    Args:
        encoder, quiz, images: as of `read_to_the_end`.
    """
    asked = quiz.questions
    batches = in_batches(asked, _QUESTIONS_AT_ONCE)
    right = torch.cat([_right(encoder, some, images) for some in batches])  # [Q, positions]
    by_position = [
        AtPosition(number + 1, tokens, _share(right[:, number])) for number, tokens in enumerate(quiz.before)
    ]
    by_attribute = []
    for attribute in ATTRIBUTES:
        rows = [number for number, question in enumerate(asked) if question.attribute == attribute]
        if rows:
            by_attribute.append(OfAttribute(attribute, len(rows), _share(right[rows].mean(dim=1))))
    return HardNegatives(len(asked), _share(right.mean(dim=1)), by_position, by_attribute)


def _right(encoder: Encoder, asked: Sequence[Question], images: Tensor) -> Tensor:
    """1 where the true text is nearer, 0 where the changed one is, else one half; [Q, positions]."""
    positions = len(asked[0].true)
    features, mask = encoder.texts([text for question in asked for text in (*question.true, *question.changed)])
    compare = comparison(images[[question.scene for question in asked]], features, mask, "text_features")
    rows = []
    for number in range(len(asked)):
        own = slice(2 * positions * number, 2 * positions * (number + 1))
        true, changed = compare(slice(number, number + 1), own)[0].view(2, positions)
        ahead = true - changed
        rows.append((ahead > TOLERANCE).float() + (ahead.abs() <= TOLERANCE).float() / 2)
    return torch.stack(rows).cpu()


def recall_by_length(encoder: Encoder, quiz: Quiz, images: Tensor) -> list[AtLength]:
    """R@1 both ways when long texts end after one sentence, two, … up to all.

    Args:
        encoder, quiz, images: as of `read_to_the_end`.
    """
    rows = {text: row for row, text in enumerate(dict.fromkeys(text for texts in quiz.cut for text in texts))}
    features, mask = encoder.texts(list(rows))  # once each: many first sentences are equal, and whole texts come again
    found = []
    for number, (texts, tokens) in enumerate(zip(quiz.cut, quiz.tokens, strict=True), start=1):
        own = torch.tensor([rows[text] for text in texts], device=features.device)
        own_mask = None if mask is None else mask[own]
        scores = retrieval(images, features[own], torch.arange(len(images)), (1,), text_mask=own_mask)
        to_text, to_image = (
            Share(scores.values[name], scores.intervals[name]) for name in ("image_to_text.r1", "text_to_image.r1")
        )
        found.append(AtLength(number, tokens, to_text, to_image))
    return found


def _share(outcome: Tensor) -> Share:
    """The mean over images."""
    found = summary({"share": outcome}, torch.arange(len(outcome)))
    return Share(found.values["share"], found.intervals["share"])
