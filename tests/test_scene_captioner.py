"""The three scene captioners, and the evaluation's texts: other sentences, known words."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lotlip import evaluate as evaluation
from lotlip.caption.config import SceneCaptionerConfig as CaptionerConfig
from lotlip.data.records import Caption, Failure, ImageRecord, Unit
from lotlip.data.text import split_sub_captions
from lotlip.demo.captioner import SceneCaptioner
from lotlip.demo.questions import SHAPES, label, long_text, shape_prompts, short_text
from lotlip.demo.source import SceneSource
from lotlip.demo.world import COLOURS, PLACES, POSITIONS, TEXTURES, TIMES, Scene, generate_scene
from lotlip.ingest.config import ImagesConfig, SceneSourceConfig

RATES = {"instructblip": (0.25, 0.05), "llava": (0.15, 0.04), "sharegpt4v": (0.05, 0.02)}
TOKENIZER = Tokenizer.from_file(str(Path(evaluation.__file__).parents[1] / "data/bert-base-uncased/tokenizer.json"))
TEST_SCENES = [generate_scene(0, "test", number) for number in range(1000)]


def pieces(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


def source(**values: int) -> SceneSource:
    config = SceneSourceConfig(**{"kind": "scenes", "path": "scenes.py", "image_size": 32, **values})
    return SceneSource(config, ImagesConfig())


@lru_cache
def records(count: int) -> tuple[ImageRecord, ...]:
    unit = Unit("train", 0, tuple(str(number) for number in range(count)))
    return tuple(record for record in source().read(unit) if isinstance(record, ImageRecord))


def captioner(style: str, name: str = "", **values: float) -> SceneCaptioner:
    omission, error = RATES[style]
    config = CaptionerConfig(
        **{"kind": "scenes", "path": "scenes.py", "style": style, "omission": omission, "error": error, **values}
    )
    return SceneCaptioner(name or style, config, lambda text: len(pieces(text)))


def captions(style: str, count: int, **values: float) -> list[Caption]:
    written = list(captioner(style, **values).caption(records(count)))
    assert all(isinstance(caption, Caption) for caption in written)
    return [caption for caption in written if isinstance(caption, Caption)]


# --- captioners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", RATES)
def test_a_caption_is_whole_and_says_where_it_comes_from(style: str) -> None:
    for record, caption in zip(records(20), captions(style, 20), strict=True):
        assert caption.key == record.key
        assert caption.captioner == style
        assert caption.sub_captions == split_sub_captions(caption.text)
        assert caption.tokens == len(pieces(caption.text))
        assert caption.finish_reason == "stop"
        assert caption.revision
        assert caption.prompt
        assert "{" not in caption.text


def test_captions_depend_on_seed_name_and_key_but_not_on_other_records() -> None:
    alone = list(captioner("llava").caption(records(20)[7:8]))
    assert alone == captions("llava", 20)[7:8]
    again = list(captioner("llava", name="other").caption(records(20)[7:8]))
    reseeded = list(captioner("llava", seed=1).caption(records(20)[7:8]))
    texts = {caption.text for caption in [*alone, *again, *reseeded] if isinstance(caption, Caption)}
    assert len(texts) == 3


def test_an_image_without_a_scene_is_a_failure_with_its_reason() -> None:
    record = ImageRecord("cat", b"", "jpg", "a cat", 1, 1, "")
    (failure,) = captioner("llava").caption([record])
    assert isinstance(failure, Failure)
    assert failure.kind == "missing"
    assert "scene graph" in failure.reason


@pytest.mark.slow
def test_styles_differ_in_length() -> None:
    counts = {style: [len(caption.sub_captions) for caption in captions(style, 200)] for style in RATES}
    means = {style: sum(count) / len(count) for style, count in counts.items()}
    assert 3 <= means["instructblip"] < means["llava"] - 1
    assert means["llava"] + 1 < means["sharegpt4v"] <= 10
    assert max(counts["instructblip"]) <= 5


def test_without_omission_and_error_everything_told_is_true() -> None:
    for record, caption in zip(records(200), captions("sharegpt4v", 200, omission=0.0, error=0.0), strict=True):
        scene = Scene.from_json(record.scene or {})
        for thing in (scene.salient, *scene.objects):
            assert any({thing.shape, thing.colour} <= words_of(sentence) for sentence in caption.sub_captions)
        told = words_of(caption.text) & set(SHAPES)
        assert told == {thing.shape for thing in (scene.salient, *scene.objects)}


@pytest.mark.parametrize("style", ["llava", "sharegpt4v"])
def test_the_detailed_styles_describe_and_count_eight_objects(style: str) -> None:
    crowded = source(fewest_objects=8, most_objects=8)
    unit = Unit("train", 0, tuple(str(number) for number in range(30)))
    scenes = [record for record in crowded.read(unit) if isinstance(record, ImageRecord)]
    for record, caption in zip(scenes, captioner(style, omission=0.0, error=0.0).caption(scenes), strict=True):
        assert isinstance(caption, Caption)
        told = words_of(caption.text)
        assert told >= {thing.shape for thing in Scene.from_json(record.scene or {}).objects} | {"eight"}


@pytest.mark.slow
def test_omission_leaves_objects_out() -> None:
    def told(omission: float) -> int:
        texts = [words_of(caption.text) for caption in captions("llava", 200, omission=omission, error=0.0)]
        scenes = [Scene.from_json(record.scene or {}) for record in records(200)]
        return sum(thing.shape in text for scene, text in zip(scenes, texts, strict=True) for thing in scene.objects)

    objects = sum(len((record.scene or {})["objects"]) for record in records(200))
    assert told(0.0) == objects
    assert told(1.0) == 0
    assert 0.6 < told(0.3) / objects < 0.8


@pytest.mark.slow
def test_error_is_the_chance_that_an_attribute_is_told_wrong() -> None:
    def wrong_shapes(error: float) -> float:
        wrong = 0
        for record, caption in zip(records(500), captions("instructblip", 500, error=error), strict=True):
            wrong += (record.scene or {})["salient"]["shape"] not in words_of(caption.sub_captions[0])
        return wrong / 500

    assert wrong_shapes(0.0) == 0
    assert 0.2 < wrong_shapes(0.3) < 0.4
    assert wrong_shapes(1.0) == 1


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# --- the evaluation's texts ---------------------------------------------------------------------------------------


@lru_cache
def raw_texts() -> list[str]:
    return [record.short_caption for record in records(1500)]


@lru_cache
def long_captions() -> list[Caption]:
    return [caption for style in RATES for caption in captions(style, 1500)]


def unseen_share(texts: list[str], known: list[str]) -> float:
    vocabulary = {piece for text in known for piece in pieces(text)}
    asked = [piece for text in texts for piece in pieces(text)]
    return sum(piece not in vocabulary for piece in asked) / len(asked)


def prompts() -> list[str]:
    return [prompt for of_shape in shape_prompts() for prompt in of_shape]


@pytest.mark.integration
def test_short_texts_and_prompts_are_made_of_words_of_raw_captions() -> None:
    assert unseen_share([*map(short_text, TEST_SCENES), *prompts()], raw_texts()) == 0


@pytest.mark.integration
def test_long_texts_are_made_of_words_that_training_has() -> None:
    known = raw_texts() + [caption.text for caption in long_captions()]
    assert unseen_share([long_text(scene) for scene in TEST_SCENES], known) <= 0.005


def frame(sentence: str) -> str:
    """A sentence without the words that tell scenes apart: what is left is its frame."""
    words = sentence.lower()
    phrases = [*PLACES.values(), *TIMES.values(), *POSITIONS, *SHAPES, *COLOURS, *TEXTURES]
    for phrase in sorted([*phrases, "big", "huge", "small", "tiny"], key=len, reverse=True):
        words = re.sub(rf"\b{phrase}\b", "_", words)
    words = re.sub(r"\ban\b", "a", words)
    return re.sub(r"_( _)+", "_", words)


@pytest.mark.integration
def test_no_sentence_frame_of_the_evaluation_is_one_of_training() -> None:
    training = {frame(sentence) for caption in long_captions() for sentence in caption.sub_captions}
    training |= {frame(text) for text in raw_texts()}
    asked = {frame(sentence) for scene in TEST_SCENES for sentence in split_sub_captions(long_text(scene))}
    asked |= {frame(short_text(scene)) for scene in TEST_SCENES} | {frame(prompt) for prompt in prompts()}
    assert len(asked) > 8
    assert not asked & training


@pytest.mark.slow
def test_long_texts_tell_everything_and_fit_the_context() -> None:
    for scene in TEST_SCENES:
        text = long_text(scene)
        assert len(pieces(text)) < 125
        assert len(split_sub_captions(text)) == 2 + len(scene.objects)
        for thing in (scene.salient, *scene.objects):
            told = {thing.shape, thing.colour, thing.texture}
            assert any(told <= words_of(sentence) for sentence in split_sub_captions(text))


def test_short_texts_are_nearly_unique() -> None:
    assert len({short_text(scene) for scene in TEST_SCENES}) > 950


def test_a_label_is_the_place_of_the_salient_shape_among_the_prompts() -> None:
    assert len(shape_prompts()) == len(SHAPES)
    for scene in TEST_SCENES[:50]:
        assert all(scene.salient.shape in words_of(prompt) for prompt in shape_prompts()[label(scene)])
