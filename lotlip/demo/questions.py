"""Texts that query held-out scenes: sentences that no training caption has, made of words that training captions have.

Short texts and the prompts for shapes use only words of short captions, so that a model trained only on those knows
every word; long texts use words of long captions.
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
    """Describes a whole scene, one sentence per object; under 125 word pieces of bert-base-uncased."""
    return as_text(sentences(scene))


def as_text(parts: Iterable[str]) -> str:
    """Joins sentences into a text."""
    return ". ".join(parts) + "."


def sentences(scene: Scene) -> list[str]:
    """The sentences of a long text: one about the setting, then `object_texts`."""
    setting = scene.setting
    return [f"This is a picture {PLACES[setting.place]} {TIMES[setting.time]}", *object_texts(scene)]


def object_texts(scene: Scene) -> list[str]:
    """The sentences of a long text that describe one object each: the salient one, then the small ones in order."""
    return [
        f"The main object is the {salient_words(scene)}",
        *(small_sentence(number, thing) for number, thing in enumerate(scene.objects)),
    ]


def salient_words(scene: Scene) -> str:
    """The words of a long text that describe the salient object."""
    salient = scene.salient
    return f"{salient.size} {salient.texture} {salient.colour} {salient.shape}"


def small_sentence(number: int, thing: SceneObject) -> str:
    """A sentence about a small object; `number` selects its frame, cyclically."""
    frame = _SMALL_FRAMES[number % len(_SMALL_FRAMES)]
    position = f"{thing.position} side" if thing.position in ("left", "right") else thing.position
    words = {"texture": thing.texture, "colour": thing.colour, "shape": thing.shape}
    return with_articles(frame.format(position=position, **words))


def short_text(scene: Scene) -> str:
    """Names only the salient object and the setting."""
    salient, setting = scene.salient, scene.setting
    return (
        f"this image is of the {salient.colour} {salient.texture} {salient.shape} "
        f"{TIMES[setting.time]} {PLACES[setting.place]}"
    )


def shape_prompts() -> list[list[str]]:
    """For each of `SHAPES`, in order, the prompts over which features are averaged."""
    return [[with_articles(frame.format(shape=shape)) for frame in _SHAPE_PROMPTS] for shape in SHAPES]


def label(scene: Scene) -> int:
    """The salient object's shape, as its index in `SHAPES`."""
    return SHAPES.index(scene.salient.shape)
