"""Captions scenes from their graphs in three styles: those of InstructBLIP, LLaVA and ShareGPT4V."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lotlip.caption.config import SceneCaptionerConfig as CaptionerConfig
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.text import join_sub_captions, split_sub_captions
from lotlip.demo.world import (
    COLOURS,
    PLACES,
    POSITIONS,
    SHAPES,
    TEXTURES,
    TIMES,
    Scene,
    SceneObject,
    Setting,
    with_articles,
)

# Changes whenever the wording below changes.
REVISION = "scenes-1"

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_PATTERNS = {
    "plain": "a plain surface",
    "striped": "stripes",
    "dotted": "dots",
    "checked": "checks",
    "bordered": "a border",
}
_SIDES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
_PARTS = {
    "top left": "in the upper left part",
    "top": "near the top",
    "top right": "in the upper right part",
    "left": "on the left side",
    "right": "on the right side",
    "bottom left": "in the lower left part",
    "bottom": "near the bottom",
    "bottom right": "in the lower right part",
}
_RELATIONS = {
    "top left": "to the top left of",
    "top": "directly above",
    "top right": "to the top right of",
    "left": "to the left of",
    "right": "to the right of",
    "bottom left": "to the bottom left of",
    "bottom": "directly below",
    "bottom right": "to the bottom right of",
}
_CORNERS = {
    "top left": "in the top left corner",
    "top": "along the top edge",
    "top right": "in the top right corner",
    "left": "along the left edge",
    "right": "along the right edge",
    "bottom left": "in the bottom left corner",
    "bottom": "along the bottom edge",
    "bottom right": "in the bottom right corner",
}


@dataclass(frozen=True)
class _Style:
    """A caption style: one sentence per part of `opening`, then the small objects, then one per part of `closing`.

    Attributes:
        opening, closing: parts of the caption, each with the sentences to choose from.
        objects: sentences for a small object.
        most_objects: maximum number of small objects that are described.
        objects_at_once: objects per sentence. With two, sentences are as long as real captioners' (24 word pieces in
            Table 1), and a window of three reaches the positions that a full description will need.
    """

    opening: tuple[tuple[str, ...], ...]
    objects: tuple[str, ...]
    closing: tuple[tuple[str, ...], ...] = ()
    most_objects: int = 8
    objects_at_once: int = 1


_STYLES = {
    "instructblip": _Style(
        opening=(
            (
                "the image shows a {size} {colour} {shape} {place} {time}",
                "in the image there is a {texture} {colour} {shape} {place}",
                "the picture is of a {size} {texture} {shape} {place} {time}",
                "a {size} {colour} {texture} {shape} is shown {time}",
            ),
        ),
        objects=(
            "there is a {colour} {shape} {side}",
            "there is also a {texture} {colour} {shape} {side}",
            "a {size} {colour} {shape} is {side}",
            "{side} is a {colour} {shape}",
        ),
        most_objects=4,
    ),
    "llava": _Style(
        opening=(
            ("the scene is set {place} {time}", "the background shows that it is {time} {place}"),
            (
                "the image features a {size} {colour} {shape} with {pattern} in the center",
                "the main object of the image is a {size} {texture} {colour} {shape}",
                "the main focus of the scene is the {size} {colour} {shape}, which has {pattern}",
            ),
        ),
        objects=(
            "there is a {size} {colour} {shape} with {pattern} {part} of the image",
            "another object, a {texture} {colour} {shape}, is visible {part}",
            "additionally, a {size} {texture} {colour} {shape} can be seen {part} of the scene",
            "a {colour} {shape} with {pattern} is located {relation} the main object",
        ),
        closing=(("in total, there are {count} other objects around it",),),
        objects_at_once=2,
    ),
    "sharegpt4v": _Style(
        opening=(
            ("the image captures a view {place}", "this scene takes place {place}"),
            ("it was taken {time}", "the light shows that this picture was taken {time}"),
            (
                "at the center of the image is a {size} {colour} {shape}",
                "the main object, a {size} {colour} {shape}, stands out in the center of the view",
            ),
            ("the surface of the {shape} is {texture}", "the {shape} has {pattern}", "this {shape} is {texture}"),
        ),
        objects=(
            "{corner} of the image, there is a {size} {texture} {colour} {shape}",
            "a {size} {colour} {shape} that is {texture} is positioned {corner}",
            "{relation} the main object, you can see a {colour} {shape} with {pattern}",
            "{side}, a {texture} {colour} {shape} is placed",
            "the {size} {colour} {shape} {corner} is {texture}",
        ),
        closing=(
            (
                "the main object is surrounded by {count} objects of different shapes and colors",
                "around the main object, {count} objects are placed against the background",
            ),
        ),
        objects_at_once=2,
    ),
}


class SceneCaptioner:
    """Stands in for a multimodal LLM: long captions in one of three styles, with omissions and errors.

    Attributes:
        revision: of the wording.
        prompt: that the captioner claims to answer.
    """

    revision = REVISION
    prompt = "Describe this image in detail."

    def __init__(
        self,
        name: str,
        config: CaptionerConfig,
        count_tokens: Callable[[str], int],
        _: object = None,  # how to work: there is nothing to choose
    ) -> None:
        self.name = name
        self.config = config
        self.count_tokens = count_tokens
        words = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.about = {**config.model_dump(mode="json", exclude={"path"}), "revision": REVISION, "module": words}

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption for each record, in order; a record without a scene graph is a failure.

        A caption depends only on the seed, the captioner's name and the record's key, not on other records.
        """
        for record in records:
            yield self._caption(record)

    def _caption(self, record: ImageRecord) -> Caption | Failure:
        if record.scene is None:
            reason = f"{self.name} needs a scene graph, which this image does not have; use another kind of captioner"
            return Failure(key=record.key, where=record.key, reason=reason, kind="missing")
        rng = random.Random(f"{self.config.seed}/{self.name}/{record.key}")
        sentences = self._sentences(Scene.from_json(record.scene), rng)
        text = join_sub_captions(sentences) + "."
        return Caption(
            key=record.key,
            captioner=self.name,
            text=text,
            sub_captions=split_sub_captions(text),
            tokens=self.count_tokens(text),
            finish_reason="stop",
            revision=self.revision,
            prompt=self.prompt,
        )

    def _sentences(self, scene: Scene, rng: random.Random) -> list[str]:
        style = _STYLES[self.config.style]
        setting = self._perceived_setting(scene.setting, rng)
        salient = self._perceived_object(scene.salient, rng)
        small = [self._perceived_object(thing, rng) for thing in scene.objects if rng.random() >= self.config.omission]
        rng.shuffle(small)
        small = small[: style.most_objects]
        common = {
            "place": PLACES[setting.place],
            "time": TIMES[setting.time],
            "count": _NUMBERS[len(scene.objects)],
        }
        opening = [[_clause(rng.choice(frames), salient, common)] for frames in style.opening]
        clauses = [_clause(rng.choice(style.objects), thing, common) for thing in small]
        step = style.objects_at_once
        middle = [clauses[start : start + step] for start in range(0, len(clauses), step)]
        closing = [[_clause(rng.choice(frames), salient, common)] for frames in style.closing]
        return [_sentence(parts) for parts in (*opening, *middle, *closing)]

    def _perceived_setting(self, setting: Setting, rng: random.Random) -> Setting:
        return replace(
            setting,
            place=self._perceived(setting.place, list(PLACES), rng),
            time=self._perceived(setting.time, list(TIMES), rng),
        )

    def _perceived_object(self, thing: SceneObject, rng: random.Random) -> SceneObject:
        position = thing.position
        if position in POSITIONS:  # the salient object is never mistaken for one at the edge
            position = self._perceived(position, list(POSITIONS), rng)
        return replace(
            thing,
            position=position,
            shape=self._perceived(thing.shape, list(SHAPES), rng),
            colour=self._perceived(thing.colour, list(COLOURS), rng),
            texture=self._perceived(thing.texture, list(TEXTURES), rng),
        )

    def _perceived(self, truth: str, names: list[str], rng: random.Random) -> str:
        """The value that the captioner perceives: with probability `config.error` a wrong one."""
        if rng.random() >= self.config.error:
            return truth
        return rng.choice([name for name in names if name != truth])


def _clause(frame: str, thing: SceneObject, common: dict[str, str]) -> str:
    words = {"shape": thing.shape, "colour": thing.colour, "texture": thing.texture, "size": thing.size, **common}
    words["pattern"] = _PATTERNS[thing.texture]
    if thing.position in POSITIONS:
        words["side"], words["part"] = _SIDES[thing.position], _PARTS[thing.position]
        words["relation"], words["corner"] = _RELATIONS[thing.position], _CORNERS[thing.position]
    return with_articles(frame.format(**words))


def _sentence(clauses: list[str]) -> str:
    text = ", and ".join(clauses)
    return text[0].upper() + text[1:]
