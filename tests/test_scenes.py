"""The demo's world: scene graphs, pictures, short captions, the source, and the labels of the image tower."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from lotlip.core.files import sha256_json
from lotlip.data.records import KEY_PATTERN, ImageRecord, Unit
from lotlip.demo.source import SceneSource
from lotlip.demo.world import (
    COLOURS,
    PLACES,
    POSITIONS,
    SHAPES,
    TEXTURES,
    TIMES,
    Scene,
    Setting,
    attribute_classes,
    attribute_labels,
    generate_scene,
    render,
    short_caption,
    with_articles,
)
from lotlip.ingest.config import ImagesConfig, SceneSourceConfig

SCENES = [generate_scene(0, "test", number) for number in range(1000)]


def source(**values: object) -> SceneSource:
    return SceneSource(SceneSourceConfig(kind="scenes", path=Path("scenes.py"), **values), ImagesConfig())


# --- scene graphs -------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_scenes_and_any_other_gives_another() -> None:
    scene = generate_scene(0, "train", 7)
    assert scene == generate_scene(0, "train", 7)
    others = [generate_scene(1, "train", 7), generate_scene(0, "train", 8)]
    others += [generate_scene(0, split, 7) for split in ("val", "test", "tower")]
    assert scene not in others


def test_splits_share_no_scene() -> None:
    splits = [
        {generate_scene(0, split, number) for number in range(500)} for split in ("train", "val", "test", "tower")
    ]
    assert len(set.union(*splits)) == 2000


@pytest.mark.parametrize("scene", SCENES[:50])
def test_a_scene_has_one_large_and_three_to_six_small_objects_all_of_different_shapes(scene: Scene) -> None:
    assert scene.salient.size in ("big", "huge")
    assert 3 <= len(scene.objects) <= 6
    assert all(thing.size in ("tiny", "small") for thing in scene.objects)
    things = [scene.salient, *scene.objects]
    assert len({thing.shape for thing in things}) == len(things)
    assert len({thing.position for thing in things}) == len(things)


@pytest.mark.parametrize("few, most", [(2, 2), (4, 8), (8, 8)])
def test_the_number_of_small_objects_can_be_chosen(few: int, most: int) -> None:
    scenes = [generate_scene(0, "test", number, (few, most)) for number in range(200)]
    assert {len(scene.objects) for scene in scenes} == set(range(few, most + 1))
    for scene in scenes:
        things = [scene.salient, *scene.objects]
        assert len({thing.shape for thing in things}) == len({thing.position for thing in things}) == len(things)
        assert Scene.from_json(scene.to_json()) == scene


def test_the_scenes_of_earlier_versions_do_not_change() -> None:
    """Scores and models of earlier runs stay comparable only as long as their scenes are drawn the same."""
    graphs = [generate_scene(2024, split, number).to_json() for split in ("train", "test") for number in range(100)]
    assert sha256_json(graphs) == "9dbdee31b196a7c2c2937ec8f09043a769ba016d4a442675524ed44058a3de2f"


def test_a_scene_survives_json() -> None:
    assert Scene.from_json(SCENES[0].to_json()) == SCENES[0]


def test_every_attribute_occurs_about_as_often_as_any_other() -> None:
    for names, values in (
        (SHAPES, [scene.salient.shape for scene in SCENES]),
        (COLOURS, [scene.salient.colour for scene in SCENES]),
        (TEXTURES, [scene.salient.texture for scene in SCENES]),
        (PLACES, [scene.setting.place for scene in SCENES]),
        (TIMES, [scene.setting.time for scene in SCENES]),
        (POSITIONS, [thing.position for scene in SCENES for thing in scene.objects]),
    ):
        counts = Counter(values)
        assert set(counts) == set(names)
        assert max(counts.values()) < 2 * min(counts.values())


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 200])
def test_a_picture_has_the_size_asked_for_and_is_drawn_the_same_again(size: int) -> None:
    picture = render(SCENES[0], size)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"
    assert picture.tobytes() == render(SCENES[0], size).tobytes()


def test_the_composition_is_the_same_at_every_size() -> None:
    small = np.asarray(render(SCENES[0], 64), dtype=float)
    large = np.asarray(render(SCENES[0], 256).resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - large).mean() < 8
    assert np.abs(small - np.asarray(render(SCENES[1], 64), dtype=float)).mean() > 20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_object_shows_its_colour(shape: str, colour: str) -> None:
    thing = replace(SCENES[0].salient, shape=shape, colour=colour, texture="plain", tilt=0.0)
    pixels = np.asarray(render(Scene(SCENES[0].setting, thing, ()), 64)).reshape(-1, 3).astype(int)
    near = (np.abs(pixels - COLOURS[colour]).max(axis=1) <= 4).mean()
    assert near > 0.04, f"{near:.3f} of the picture is {colour}"


def test_every_attribute_changes_the_picture() -> None:
    plain = replace(SCENES[0].salient, shape="circle", colour="red", texture="plain", size="big", tilt=0.0)
    setting = Setting("sea", "day", 0)
    things = [replace(plain, shape=shape) for shape in SHAPES]
    things += [replace(plain, colour=colour) for colour in COLOURS if colour != "red"]
    things += [replace(plain, texture=texture) for texture in TEXTURES if texture != "plain"]
    things += [replace(plain, size="huge"), replace(plain, x=0.4), replace(plain, tilt=9.0, shape="star")]
    pictures = [render(Scene(setting, thing, ())).tobytes() for thing in things]
    pictures += [
        render(Scene(Setting(place, time, variant), plain, ())).tobytes()
        for place in PLACES
        for time in TIMES
        for variant in range(4)
        if (place, time, variant) != ("sea", "day", 0)
    ]
    assert len(set(pictures)) == len(pictures)


# --- short captions -------------------------------------------------------------------------------------------------


def short_captions() -> list[str]:
    return [short_caption(scene, random.Random(number)) for number, scene in enumerate(SCENES)]


def test_raw_captions_name_the_salient_object_and_no_other() -> None:
    for scene, caption in zip(SCENES, short_captions(), strict=True):
        words = caption.split()
        assert scene.salient.shape in words
        assert not {thing.shape for thing in scene.objects} & set(words)


def test_raw_captions_are_short_and_often_incomplete() -> None:
    captions = short_captions()
    assert max(len(caption.split()) for caption in captions) <= 16
    with_colour = sum(scene.salient.colour in caption.split() for scene, caption in zip(SCENES, captions, strict=True))
    assert 0.5 < with_colour / len(captions) < 0.8


def test_some_raw_captions_name_the_bare_shape() -> None:
    attributes = {*COLOURS, *TEXTURES, "big", "huge", *PLACES, *TIMES}
    bare = [caption for caption in short_captions() if not attributes & set(caption.split())]
    assert 0.15 < len(bare) / len(SCENES) < 0.35
    assert any(caption in SHAPES for caption in bare)


def test_articles_fit_the_word_after_them() -> None:
    assert with_articles("a orange star over a arrow and a house") == "an orange star over an arrow and a house"
    assert with_articles("A orange one is a one") == "An orange one is a one"


# --- the source ---------------------------------------------------------------------------------------------------


def test_units_hold_every_scene_of_every_split_once() -> None:
    units = source(train=25, val=3, test=10).units(partition_size=10)
    assert [unit.name for unit in units] == [
        "train/part-00000",
        "train/part-00001",
        "train/part-00002",
        "val/part-00000",
        "test/part-00000",
    ]
    assert [item for unit in units[:3] for item in unit.items] == [str(number) for number in range(25)]


def test_the_source_draws_the_number_of_small_objects_asked_for() -> None:
    few = source(fewest_objects=2, most_objects=2)
    unit = Unit("train", 0, tuple(str(number) for number in range(20)))
    records = [record for record in few.read(unit) if isinstance(record, ImageRecord)]
    assert [len((record.scene or {})["objects"]) for record in records] == [2] * 20


def test_more_objects_at_least_than_at_most_are_an_error() -> None:
    with pytest.raises(ValidationError, match="fewest_objects 7 is above most_objects 6"):
        source(fewest_objects=7)


def test_records_are_whole_and_the_same_again() -> None:
    unit = Unit("val", 0, ("0", "12"))
    records = list(source(image_size=48).read(unit))
    assert records == list(source(image_size=48).read(unit))
    for record in records:
        assert isinstance(record, ImageRecord)
        assert KEY_PATTERN.fullmatch(record.key)
        assert (record.width, record.height) == Image.open(io.BytesIO(record.image)).size == (48, 48)
        assert Scene.from_json(record.scene or {}).salient.shape in record.short_caption
    assert [record.key for record in records if isinstance(record, ImageRecord)] == ["val-000000", "val-000012"]


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_are_classes_that_tell_what_is_there() -> None:
    kinds = attribute_classes()
    names = [(kind, name, classes) for kind, labels in kinds.items() for name, classes in labels.items()]
    for scene in SCENES[:100]:
        labels = attribute_labels(scene)
        assert len(labels) == len(names)
        told = {(kind, name): label for (kind, name, _), label in zip(names, labels, strict=True)}
        assert all(0 <= label < classes for (_, _, classes), label in zip(names, labels, strict=True))
        assert SHAPES[told["salient shape", "shape"]] == scene.salient.shape
        assert list(PLACES)[told["place", "place"]] == scene.setting.place
        for position in POSITIONS:
            assert told["small position", position] == (position in [thing.position for thing in scene.objects])
        colours = {thing.shape: thing.colour for thing in scene.objects}
        for shape in SHAPES:
            assert told["small shape", shape] == (shape in colours)
            assert ["", *COLOURS][told["small colour by shape", shape]] == colours.get(shape, "")
