"""Texts that query held-out scenes: sentences that no training caption has, made of words that training captions have.

Short texts and the prompts for shapes use only words of short captions, so that a model trained only on those knows
every word; long texts use words of long captions. Each scene has its own choice of frames. With the same frame in all
texts, a model's luck with that frame would be part of its score, and seeds would differ by it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import lotlip.demo.world as scenes
from lotlip.demo.world import PLACES, TIMES, Scene, SceneObject, with_articles

SHAPES = scenes.SHAPES

_SETTING_FRAMES = (
    "This is a picture {place} {time}",
    "This picture was taken {time} {place}",
    "This image shows a view {place} {time}",
    "You see a view {place} {time}",
)
_SALIENT_FRAMES = (
    "The main object is the {words}",
    "In the center there is a {words}",
    "The main focus is the {words}",
    "The center has a {words}",
)
_SMALL_FRAMES = (
    "The {position} has a {texture} {colour} {shape}",
    "One {texture} {colour} {shape} is at the {position}",
    "At the {position} is one {texture} {colour} {shape}",
    "At the {position} stands a {texture} {colour} {shape}",
    "The {colour} {shape} at the {position} is {texture}",
    "At the {position} a {texture} {colour} {shape} is placed",
    "One {colour} {shape} at the {position} is {texture}",
    "The {position} shows a {texture} {colour} {shape}",
)
_SHORT_FRAMES = (
    "this image is of the {colour} {texture} {shape} {time} {place}",
    "a picture of one {texture} {colour} {shape} {place} {time}",
    "this is the {colour} {texture} {shape} {place} {time}",
    "the image of a {texture} {colour} {shape} {time} {place}",
    "a view of the {colour} {texture} {shape} {place} {time}",
    "this photo is of a {texture} {colour} {shape} {time} {place}",
    "one photo of the {colour} {texture} {shape} {place} {time}",
    "the view is of one {texture} {colour} {shape} {time} {place}",
)
_SHAPE_PROMPTS = (
    "a picture of one {shape}",
    "this is the {shape}",
    "the image of a {shape}",
    "a view of the {shape}",
    "this photo is of a {shape}",
)


def long_text(scene: Scene) -> str:
    """Describes a whole scene, one sentence per object; under 125 word pieces of bert-base-uncased."""
    return as_text(sentences(scene))


def as_text(parts: Iterable[str]) -> str:
    """Joins sentences into a text."""
    return ". ".join(parts) + "."


def sentences(scene: Scene) -> list[str]:
    """The sentences of a long text: one about the setting, then `object_texts`."""
    frame = _choice(scene, "setting").choice(_SETTING_FRAMES)
    return [frame.format(place=PLACES[scene.setting.place], time=TIMES[scene.setting.time]), *object_texts(scene)]


def object_texts(scene: Scene) -> list[str]:
    """The sentences of a long text that describe one object each: the salient one, then the small ones in order."""
    frame = _choice(scene, "salient").choice(_SALIENT_FRAMES)
    return [
        with_articles(frame.format(words=salient_words(scene))),
        *(small_sentence(scene, number) for number in range(len(scene.objects))),
    ]


def salient_words(scene: Scene) -> str:
    """The words of a long text that describe the salient object."""
    salient = scene.salient
    return f"{salient.size} {salient.texture} {salient.colour} {salient.shape}"


def small_sentence(scene: Scene, number: int, thing: SceneObject | None = None) -> str:
    """The sentence about a small object of a scene, or about `thing` with the same wording."""
    frame = _choice(scene, f"object {number}").choice(_SMALL_FRAMES)
    thing = thing or scene.objects[number]
    position = f"{thing.position} side" if thing.position in ("left", "right") else thing.position
    words = {"texture": thing.texture, "colour": thing.colour, "shape": thing.shape}
    return with_articles(frame.format(position=position, **words))


def short_text(scene: Scene) -> str:
    """Names only the salient object and the setting."""
    salient, setting = scene.salient, scene.setting
    frame = _choice(scene, "short").choice(_SHORT_FRAMES)
    words = {"colour": salient.colour, "texture": salient.texture, "shape": salient.shape}
    return with_articles(frame.format(place=PLACES[setting.place], time=TIMES[setting.time], **words))


def _choice(scene: Scene, part: str) -> random.Random:
    """The random numbers that choose the wording of a part of a scene's texts; equal scenes have equal texts."""
    return random.Random(f"{scene.key}/{part}")


def shape_prompts() -> list[list[str]]:
    """For each of `SHAPES`, in order, the prompts over which features are averaged."""
    return [[with_articles(frame.format(shape=shape)) for frame in _SHAPE_PROMPTS] for shape in SHAPES]


def label(scene: Scene) -> int:
    """The salient object's shape, as its index in `SHAPES`."""
    return SHAPES.index(scene.salient.shape)
