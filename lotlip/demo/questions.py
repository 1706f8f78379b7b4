"""What held-out scenes are asked by: sentences that no training caption has, made of words that training captions have.

Short texts and the prompts for shapes keep to the words of short captions, so that a model trained on those alone knows
every word; the words of long texts are those of long captions.
"""

from __future__ import annotations

from collections.abc import Iterable

import lotlip.demo.world as scenes
from lotlip.demo.world import PLACES, TIMES, Scene, SceneObject, with_articles

SHAPES = scenes.SHAPES

_SMALL_FRAMES = (
    "The {position} has a {texture} {colour} {shape}",
    "One {texture} {colour} {shape} is at the {position}",
    "At the {position} you see a {texture} {colour} {shape}",
)
_SHAPE_PROMPTS = (
    "a picture of one {shape}",
    "this is the {shape}",
    "the image of a {shape}",
    "a view of the {shape}",
    "this photo is of a {shape}",
)


def long_text(scene: Scene) -> str:
    """Describes all of a scene, a sentence for each thing; under 125 word pieces of bert-base-uncased."""
    return as_text(sentences(scene))


def as_text(told: Iterable[str]) -> str:
    """Sentences one after another."""
    return ". ".join(told) + "."


def sentences(scene: Scene) -> list[str]:
    """Of a long text: one on the setting, then `object_texts`."""
    setting = scene.setting
    return [f"This is a picture {PLACES[setting.place]} {TIMES[setting.time]}", *object_texts(scene)]


def object_texts(scene: Scene) -> list[str]:
    """The sentences of a long text that name one object each: the salient one, then the small ones in their order."""
    return [
        f"The main object is the {salient_words(scene)}",
        *(small_sentence(number, thing) for number, thing in enumerate(scene.objects)),
    ]


def salient_words(scene: Scene) -> str:
    """The words of a long text that are the salient object's."""
    salient = scene.salient
    return f"{salient.size} {salient.texture} {salient.colour} {salient.shape}"


def small_sentence(number: int, thing: SceneObject) -> str:
    """A sentence on a small object; `number` chooses its frame, in turns."""
    frame = _SMALL_FRAMES[number % len(_SMALL_FRAMES)]
    position = f"{thing.position} side" if thing.position in ("left", "right") else thing.position
    words = {"texture": thing.texture, "colour": thing.colour, "shape": thing.shape}
    return with_articles(frame.format(position=position, **words))


def short_text(scene: Scene) -> str:
    """Names the salient object and the setting, and nothing else."""
    salient, setting = scene.salient, scene.setting
    return (
        f"this image is of the {salient.colour} {salient.texture} {salient.shape} "
        f"{TIMES[setting.time]} {PLACES[setting.place]}"
    )


def shape_prompts() -> list[list[str]]:
    """For each of `SHAPES`, in order, the prompts whose features are averaged."""
    return [[with_articles(frame.format(shape=shape)) for frame in _SHAPE_PROMPTS] for shape in SHAPES]


def label(scene: Scene) -> int:
    """The salient object's shape, as its place in `SHAPES`."""
    return SHAPES.index(scene.salient.shape)
