"""The demo's world: pictures drawn from a seed, with their scene graphs and web-like short captions."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon", "ring", "flower", "arrow", "house",
)  # fmt: skip
COLOURS: dict[str, Colour] = {
    "red": (222, 45, 48),
    "orange": (247, 138, 32),
    "yellow": (252, 217, 54),
    "green": (52, 160, 72),
    "blue": (42, 98, 214),
    "purple": (132, 62, 172),
    "pink": (250, 150, 190),
    "brown": (124, 76, 44),
    "white": (248, 248, 244),
    "black": (36, 36, 40),
}
TEXTURES = ("plain", "striped", "dotted", "checked", "bordered")
PLACES = {
    "meadow": "in the meadow",
    "beach": "on the beach",
    "desert": "in the desert",
    "snow": "in the snow",
    "forest": "in the forest",
    "sea": "over the sea",
    "mountains": "in the mountains",
    "city": "in the city",
}
TIMES = {"day": "on a sunny day", "sunset": "at sunset", "night": "at night"}
# Positions of small objects: the centres of their cells, as fractions of the picture's side.
POSITIONS: dict[str, Point] = {
    "top left": (0.14, 0.14),
    "top": (0.5, 0.13),
    "top right": (0.86, 0.14),
    "left": (0.135, 0.5),
    "right": (0.865, 0.5),
    "bottom left": (0.14, 0.86),
    "bottom": (0.5, 0.87),
    "bottom right": (0.86, 0.86),
}
# Radius as a fraction of the picture's side.
SALIENT_SIZES = {"big": 0.2, "huge": 0.255}
SMALL_SIZES = {"tiny": 0.085, "small": 0.12}
_RADII = SALIENT_SIZES | SMALL_SIZES
_VARIANTS = 4
SMALL_OBJECTS = (3, 6)  # fewest and most, by default


@dataclass(frozen=True)
class SceneObject:
    """One object in a scene.

    Attributes:
        shape, colour, texture, size, position: names in the tables above; the salient object's position is "center".
        x, y: its centre from the top left, as fractions of the picture's side.
        tilt: degrees, counterclockwise.
    """

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    x: float
    y: float
    tilt: float

    @property
    def disc(self) -> tuple[float, float, float]:
        """Centre and radius of the circle around it, as fractions of the picture's side."""
        return self.x, self.y, _RADII[self.size]


@dataclass(frozen=True)
class Setting:
    """The background; `variant` only changes how it is drawn."""

    place: str
    time: str
    variant: int


@dataclass(frozen=True)
class Scene:
    """A scene graph: a setting, one large salient object and 2–8 small ones, all of different shapes."""

    setting: Setting
    salient: SceneObject
    objects: tuple[SceneObject, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        objects = [dict(vars(thing)) for thing in self.objects]
        return {"setting": dict(vars(self.setting)), "salient": dict(vars(self.salient)), "objects": objects}

    @cached_property
    def key(self) -> str:
        """A string that only equal scenes share; it seeds the wording of texts."""
        return json.dumps(self.to_json(), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scene:
        """The inverse of `to_json`."""
        return cls(
            setting=Setting(**data["setting"]),
            salient=SceneObject(**data["salient"]),
            objects=tuple(SceneObject(**thing) for thing in data["objects"]),
        )


# --- random scenes ------------------------------------------------------------------------------------------------


def generate_scene(seed: int, split: str, number: int, small_objects: tuple[int, int] = SMALL_OBJECTS) -> Scene:
    """Draws the scene graph of one picture; it depends only on the arguments.

    Args:
        seed, split, number: select the picture.
        small_objects: fewest and most small objects.
    """
    rng = random.Random(f"{seed}/{split}/{number}")
    setting = Setting(rng.choice(list(PLACES)), rng.choice(list(TIMES)), rng.randrange(_VARIANTS))
    count = rng.randint(*small_objects)
    # All shapes differ, so that a name alone ("the star") identifies an object.
    shapes = rng.sample(SHAPES, 1 + count)
    salient = _random_object(rng, shapes[0], list(SALIENT_SIZES), "center", (0.5, 0.5))
    places = rng.sample(list(POSITIONS.items()), count)
    objects = [
        _random_object(rng, shape, list(SMALL_SIZES), position, centre)
        for shape, (position, centre) in zip(shapes[1:], places, strict=True)
    ]
    return Scene(setting, salient, tuple(objects))


def _random_object(rng: random.Random, shape: str, sizes: list[str], position: str, centre: Point) -> SceneObject:
    return SceneObject(
        shape=shape,
        colour=rng.choice(list(COLOURS)),
        texture=rng.choice(TEXTURES),
        size=rng.choice(sizes),
        position=position,
        x=round(centre[0] + rng.uniform(-0.015, 0.015), 3),
        y=round(centre[1] + rng.uniform(-0.015, 0.015), 3),
        tilt=round(rng.uniform(-14, 14), 1),
    )


# --- short captions -------------------------------------------------------------------------------------------------

_RAW_FRAMES = (
    "{phrase}",
    "a {phrase}",
    "one {phrase}",
    "the {phrase}",
    "a photo of a {phrase}",
    "photo of {phrase}",
    "a picture of the {phrase}",
    "image of one {phrase}",
    "view of a {phrase}",
    "this is a {phrase}",
)


def short_caption(scene: Scene, rng: random.Random) -> str:
    """A short caption as on the web: it names only the salient object and the setting, often incompletely.

    One in five is the bare shape, so that prompts with only a shape are close to the training texts.
    """
    thing, setting = scene.salient, scene.setting
    if rng.random() < 0.2:
        return with_articles(rng.choice(_RAW_FRAMES).format(phrase=thing.shape))
    adjectives = [word for word, share in ((thing.size, 0.2), (thing.colour, 0.8)) if rng.random() < share]
    if rng.random() < 0.6:
        adjectives.insert(rng.randint(0, len(adjectives)), thing.texture)
    phrase = " ".join([*adjectives, thing.shape])
    where = [words for words in (PLACES[setting.place], TIMES[setting.time]) if rng.random() < 0.5]
    return " ".join([with_articles(rng.choice(_RAW_FRAMES).format(phrase=phrase)), *where])


def with_articles(text: str) -> str:
    """Turns "a" into "an" before a vowel.

    >>> with_articles("a photo of a orange star")
    'a photo of an orange star'
    """
    words = text.split(" ")
    for place, (word, following) in enumerate(pairwise(words)):
        if word in ("a", "A") and following[:1] in "aeio" and following != "one":
            words[place] = word + "n"
    return " ".join(words)


# --- drawing ------------------------------------------------------------------------------------------------------


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draws a scene as an RGB picture of `size` × `size` pixels; the composition does not depend on the size."""
    # Supersampling is Pillow's cheapest way to smooth edges.
    scale = 3 if size <= 128 else 2
    picture = _backdrop(scene.setting, size * scale).copy()
    for thing in (scene.salient, *scene.objects):
        _draw_object(picture, thing, size * scale)
    return picture.reduce(scale)


def _draw_object(picture: Image.Image, thing: SceneObject, side: int) -> None:
    radius = _RADII[thing.size] * side
    half = math.ceil(radius * 1.15)
    contours = [
        [(half + x, half + y) for x, y in _turned(contour, thing.tilt, radius)] for contour in _CONTOURS[thing.shape]
    ]
    mask = Image.new("L", (2 * half, 2 * half))
    draw = ImageDraw.Draw(mask)
    for number, contour in enumerate(contours):
        draw.polygon(contour, fill=0 if number else 255)  # contours after the outline are holes
    left, top = round(thing.x * side) - half, round(thing.y * side) - half
    drop = max(round(radius * 0.1), 1)
    picture.paste((12, 14, 28), (left + drop, top + drop), mask.point(_SHADOW))
    picture.paste(_texture(thing, contours, half, radius), (left, top), mask)
    line = ImageDraw.Draw(picture)
    width = max(round(side / 110), 1)
    for contour in contours:
        points = [(left + x, top + y) for x, y in contour]
        line.line([*points, points[0], points[1]], fill=_outline(thing.colour), width=width, joint="curve")


_SHADOW = [level * 2 // 5 for level in range(256)]


def _texture(thing: SceneObject, contours: list[list[Point]], half: int, radius: float) -> Image.Image:
    tile = Image.new("RGB", (2 * half, 2 * half), COLOURS[thing.colour])
    draw = ImageDraw.Draw(tile)
    ink = (52, 56, 78) if thing.colour in ("white", "yellow") else (255, 255, 255)
    step = radius * (0.42 if thing.size in SALIENT_SIZES else 0.62)
    ends = math.ceil(half / step)
    grid = [(half + i * step, half + j * step, i + j) for i in range(-ends, ends + 1) for j in range(-ends, ends + 1)]
    if thing.texture == "striped":
        for i in range(-2 * ends, 2 * ends + 1):
            x = half + i * step * 1.1
            draw.line([(x - half, 2 * half), (x + half, 0)], fill=ink, width=round(step * 0.36))
    elif thing.texture == "dotted":
        dot = step * 0.3
        for x, y, _ in grid:
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=ink)
    elif thing.texture == "checked":
        for x, y, number in grid:
            if number % 2:
                draw.rectangle((x - step / 2, y - step / 2, x + step / 2, y + step / 2), fill=ink)
    elif thing.texture == "bordered":
        for contour in contours:
            draw.line([*contour, contour[0], contour[1]], fill=ink, width=round(radius * 0.36), joint="curve")
    return tile


def _outline(colour: str) -> Colour:
    red, green, blue = COLOURS[colour]
    return (130, 130, 140) if colour == "black" else (red * 45 // 100, green * 45 // 100, blue * 45 // 100)


def _turned(contour: list[Point], degrees: float, radius: float) -> list[Point]:
    cosine, sine = radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
    return [(x * cosine + y * sine, y * cosine - x * sine) for x, y in contour]


def _polar(radii: list[float], start: float = -90.0) -> list[Point]:
    angles = [math.radians(start + 360 * number / len(radii)) for number in range(len(radii))]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * number / 40 for number in range(40)]
    return [
        (
            math.sin(angle) ** 3,
            -(13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 16,
        )
        for angle in angles
    ]


def _moon() -> list[Point]:
    outer = [(math.cos(angle) - 0.05, math.sin(angle)) for angle in np.linspace(-1.0, -5.28, 32)]
    (x, top), (_, bottom) = outer[0], outer[-1]
    inner = [
        (x - 0.62 * math.cos(angle), bottom * math.sin(angle)) for angle in np.linspace(math.pi / 2, -math.pi / 2, 24)
    ]
    return [(float(x), float(y)) for x, y in [*outer, *inner[1:-1]]] if top < bottom else []


# Outlines within the unit circle, y down; a second outline is a hole.
_CONTOURS: dict[str, list[list[Point]]] = {
    "circle": [_polar([0.95] * 40)],
    "square": [_polar([1.1] * 4, start=-45)],
    "triangle": [[(0, -0.95), (1.0, 0.8), (-1.0, 0.8)]],
    "star": [_polar([1.1, 0.46] * 5)],
    "heart": [_heart()],
    "diamond": [[(0, -1.1), (0.72, 0), (0, 1.1), (-0.72, 0)]],
    "cross": [
        [
            (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
            (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
        ]
    ],
    "moon": [_moon()],
    "ring": [_polar([1.0] * 40), _polar([0.46] * 32)],
    "flower": [_polar([0.78 + 0.28 * math.cos(math.pi * number / 6) for number in range(60)])],
    "arrow": [[(1.1, 0), (0.2, -0.85), (0.2, -0.36), (-1.0, -0.36), (-1.0, 0.36), (0.2, 0.36), (0.2, 0.85)]],
    "house": [[(0, -1.05), (1.05, -0.15), (0.74, -0.15), (0.74, 0.9), (-0.74, 0.9), (-0.74, -0.15), (-1.05, -0.15)]],
}  # fmt: skip

# --- settings -----------------------------------------------------------------------------------------------------

_SKY: dict[str, tuple[Colour, Colour]] = {
    "day": ((96, 168, 236), (214, 236, 250)),
    "sunset": ((92, 66, 140), (255, 170, 104)),
    "night": ((12, 16, 44), (52, 62, 112)),
}
_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.68, 0.62), "night": (0.32, 0.36, 0.54)}


@lru_cache(maxsize=128)
def _backdrop(setting: Setting, side: int) -> Image.Image:
    canvas = _Canvas(setting, side)
    getattr(canvas, setting.place)()
    return canvas.picture


class _Canvas:
    """A picture of a setting: the sky for its time, then one drawing method per place."""

    def __init__(self, setting: Setting, side: int) -> None:
        self.side = side
        self.light = _LIGHT[setting.time]
        self.rng = random.Random(f"{setting.place}/{setting.time}/{setting.variant}")
        self.picture = self._sky(setting.time)
        self.draw = ImageDraw.Draw(self.picture)
        if setting.time == "night":
            for _ in range(26):
                self.dot(self.rng.random(), self.rng.uniform(0, 0.55), 0.006, (225, 228, 250))
        if setting.time == "sunset":
            x = self.rng.uniform(0.25, 0.75)
            for radius, colour in ((0.2, (255, 186, 112)), (0.15, (255, 206, 128)), (0.1, (255, 230, 160))):
                self.dot(x, 0.6, radius, colour)
        if setting.time == "day":
            for _ in range(3):
                self.cloud(self.rng.random(), self.rng.uniform(0.06, 0.42))

    def _sky(self, time: str) -> Image.Image:
        above, horizon = (np.array(colour, dtype=np.float32) for colour in _SKY[time])
        share = np.clip(np.linspace(0, 1.5, self.side, dtype=np.float32), 0, 1)[:, None]
        column = (above + (horizon - above) * share).round().astype(np.uint8)
        return Image.fromarray(np.repeat(column[:, None], self.side, axis=1))

    def lit(self, colour: Colour) -> Colour:
        red, green, blue = (round(part * light) for part, light in zip(colour, self.light, strict=True))
        return red, green, blue

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        box = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse([edge * self.side for edge in box], fill=colour)

    def cloud(self, x: float, y: float) -> None:
        for shift, radius in ((-0.07, 0.035), (0.0, 0.055), (0.07, 0.04)):
            self.dot(x + shift, y - radius / 2, radius, (240, 247, 253))

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=self.lit(colour))

    def hills(self, y: float, height: float, colour: Colour) -> None:
        phase, waves = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(0.7, 1.3)
        ridge = [(x / 32, y - height * math.sin(phase + waves * 2 * math.pi * x / 32)) for x in range(33)]
        self.polygon([*ridge, (1, 1), (0, 1)], colour)

    def flat(self, y: float, colour: Colour) -> None:
        self.polygon([(0, y), (1, y), (1, 1), (0, 1)], colour)

    def pines(self, y: float, height: float, count: int, colour: Colour) -> None:
        for number in range(count):
            x = (number + self.rng.uniform(0.2, 0.8)) / count
            tip, half = y - height * self.rng.uniform(0.75, 1.15), height * 0.3
            self.polygon([(x, tip), (x + half, y), (x - half, y)], colour)
            self.polygon([(x, tip), (x + half * 0.7, y - height * 0.4), (x - half * 0.7, y - height * 0.4)], colour)

    def meadow(self) -> None:
        self.hills(0.6, 0.05, (138, 196, 92))
        self.hills(0.7, 0.04, (112, 180, 76))
        for _ in range(40):
            colour = self.rng.choice([(252, 236, 120), (250, 250, 250), (240, 160, 190)])
            self.dot(self.rng.random(), self.rng.uniform(0.76, 1), 0.008, self.lit(colour))

    def beach(self) -> None:
        self.flat(0.56, (64, 152, 200))
        for y in (0.6, 0.64):
            self.flat(y, (84, 172, 212) if y == 0.6 else (112, 192, 220))
        self.hills(0.72, 0.015, (250, 250, 246))
        self.hills(0.735, 0.015, (240, 220, 168))

    def desert(self) -> None:
        self.hills(0.6, 0.06, (232, 190, 120))
        self.hills(0.7, 0.05, (220, 172, 98))
        self.hills(0.84, 0.04, (206, 154, 84))

    def snow(self) -> None:
        self.pines(0.62, 0.13, 9, (104, 138, 138))
        self.hills(0.63, 0.04, (226, 236, 246))
        self.hills(0.76, 0.04, (242, 247, 252))
        for _ in range(60):
            self.dot(self.rng.random(), self.rng.random(), 0.007, (250, 252, 255))

    def forest(self) -> None:
        self.pines(0.68, 0.36, 10, (70, 124, 92))
        self.flat(0.66, (70, 124, 92))
        self.pines(0.84, 0.4, 8, (44, 98, 66))
        self.flat(0.82, (44, 98, 66))

    def sea(self) -> None:
        self.flat(0.54, (40, 116, 176))
        for row in range(7):
            y = 0.58 + row * row * 0.009
            for _ in range(5):
                x, length = self.rng.random(), 0.05 + row * 0.012
                self.polygon([(x - length, y), (x, y - 0.008), (x + length, y), (x, y + 0.008)], (112, 178, 220))

    def mountains(self) -> None:
        for x in (0.12, 0.88, 0.36, 0.66):
            x += self.rng.uniform(-0.05, 0.05)
            tip, half = self.rng.uniform(0.26, 0.4), self.rng.uniform(0.26, 0.34)
            self.polygon([(x, tip), (x + half, 0.75), (x - half, 0.75)], (118, 124, 146))
            self.polygon([(x, tip), (x + half, 0.75), (x + half * 0.2, 0.75)], (98, 104, 128))
            edge = 0.3 * half, tip + 0.3 * (0.75 - tip)
            low = edge[1] - 0.035
            self.polygon([(x, tip), (x + edge[0], edge[1]), (x, low), (x - edge[0], edge[1])], (240, 244, 250))
        self.hills(0.76, 0.03, (104, 150, 96))

    def city(self) -> None:
        for colour, count, low, high in (((150, 164, 186), 9, 0.24, 0.46), ((100, 112, 138), 7, 0.44, 0.64)):
            for number in range(count):
                x, y, half = (number + 0.5) / count, self.rng.uniform(low, high), 0.42 / count
                self.polygon([(x - half, y), (x + half, y), (x + half, 0.85), (x - half, 0.85)], colour)
                self._windows(x, y, half)
        self.flat(0.82, (108, 112, 120))

    def _windows(self, x: float, y: float, half: float) -> None:
        for row in range(int((0.8 - y) / 0.055)):
            for column in (-0.5, 0.1):
                if self.rng.random() < 0.6:
                    left, top = x + column * half, y + 0.025 + row * 0.055
                    box = (left, top, left + 0.4 * half, top + 0.024)
                    self.draw.rectangle([edge * self.side for edge in box], fill=(250, 226, 150))


# --- labels -------------------------------------------------------------------------------------------------------

_OF_SALIENT = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "size": tuple(SALIENT_SIZES)}
_OF_SMALL = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "position": tuple(POSITIONS)}


def attribute_classes() -> dict[str, dict[str, int]]:
    """Group of labels → name of each label → its number of classes, in the order of `attribute_labels`."""
    setting = {"place": {"place": len(PLACES)}, "time": {"time": len(TIMES)}}
    salient = {f"salient {attribute}": {attribute: len(names)} for attribute, names in _OF_SALIENT.items()}
    small = {f"small {attribute}": dict.fromkeys(names, 2) for attribute, names in _OF_SMALL.items()}
    return {**setting, **salient, **small, "small colour by shape": dict.fromkeys(SHAPES, 1 + len(COLOURS))}


def attribute_labels(scene: Scene) -> list[int]:
    """The classes that the image tower is trained to predict.

    The setting; the salient object's attributes; which shapes, colours, textures and positions small objects have
    (1 or 0 each); and for each shape the colour of the small object with that shape, 0 if there is none.
    """
    labels = [list(PLACES).index(scene.setting.place), list(TIMES).index(scene.setting.time)]
    labels += [names.index(getattr(scene.salient, attribute)) for attribute, names in _OF_SALIENT.items()]
    for attribute, names in _OF_SMALL.items():
        present = {getattr(thing, attribute) for thing in scene.objects}
        labels += [int(name in present) for name in names]
    colours = {thing.shape: 1 + list(COLOURS).index(thing.colour) for thing in scene.objects}
    return labels + [colours.get(shape, 0) for shape in SHAPES]
