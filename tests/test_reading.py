"""The reading test gives known scores to models that read a known part of a text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.caption.config import SceneCaptionerConfig as CaptionerConfig
from lotlip.data.records import Caption, ImageRecord
from lotlip.data.text import split_sub_captions
from lotlip.data.tokenizer import token_counts, used_tokens
from lotlip.demo.captioner import SceneCaptioner
from lotlip.demo.questions import long_text
from lotlip.demo.world import COLOURS, POSITIONS, SHAPES, TEXTURES, Scene, generate_scene
from lotlip.evaluate.metrics import retrieval
from lotlip.evaluate.reading import (
    ATTRIBUTES,
    ReadingTest,
    evaluate_reading,
    hard_negatives,
    make_reading_test,
    questions,
    recall_by_length,
)

SCENES = [generate_scene(7, "test", number) for number in range(120)]
BERT = "bert-base-uncased"
# Every fact that a sentence can state about a small object, with its place in a feature.
FACTS = {fact: n for n, fact in enumerate(itertools.product(TEXTURES, COLOURS, SHAPES, POSITIONS))}


def pieces(texts: Sequence[str]) -> list[int]:
    return token_counts(BERT, texts)


@cache
def reading_test() -> ReadingTest:
    return make_reading_test(SCENES, pieces)


def fact(sentence: str) -> tuple[str, str, str, str] | None:
    """The fact that a sentence states about a small object; None: it is about something else."""
    words = sentence.split()
    texture, colour, shape = (next((w for w in words if w in names), "") for names in (TEXTURES, COLOURS, SHAPES))
    positions = [position for position in POSITIONS if position in sentence.lower()]
    return (texture, colour, shape, max(positions, key=len)) if positions and shape else None


def facts(text: str, sentences: int | None = None) -> list[tuple[str, str, str, str]]:
    return [fact_found for fact_found in map(fact, split_sub_captions(text)[:sentences]) if fact_found]


def truth(scene: Scene) -> list[tuple[str, str, str, str]]:
    return [(thing.texture, thing.colour, thing.shape, thing.position) for thing in scene.objects]


@dataclass(frozen=True)
class Reader:
    """Understands the first `sentences` of a text (None: all), with one feature or one token per fact."""

    sentences: int | None = None
    token_by_token: bool = False

    def images(self, images: Iterable[bytes]) -> Tensor:
        raise NotImplementedError

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        rows = [self.row(facts(text, self.sentences)) for text in texts]
        if not self.token_by_token:
            return normalize(torch.stack([row.sum(dim=0) for row in rows])), None
        return torch.stack(rows), torch.stack([row.any(dim=1) | (torch.arange(6) == 0) for row in rows])

    def row(self, known_facts: list[tuple[str, str, str, str]]) -> Tensor:
        """A token for each of up to six facts."""
        row = torch.zeros(6, len(FACTS))
        for number, one in enumerate(known_facts):
            row[number, FACTS[one]] = 1
        return row

    def image_features(self, scenes: Sequence[Scene]) -> Tensor:
        """Features of the scenes' images."""
        rows = torch.stack([self.row(truth(scene)) for scene in scenes])
        return rows if self.token_by_token else normalize(rows.sum(dim=1))

    def protocol(self) -> dict[str, str | int]:
        return {}


# --- questions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_questions_cover_every_position_of_scenes_with_the_most_objects():
    chosen = questions(SCENES)
    assert [question.scene for question in chosen] == [n for n, scene in enumerate(SCENES) if len(scene.objects) == 6]
    for question in chosen:
        assert len(question.true) == len(question.changed) == len(question.before) == 6
        for position, (true, changed) in enumerate(zip(question.true, question.changed, strict=True)):
            right, wrong = split_sub_captions(true), split_sub_captions(changed)
            different = [n for n, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1]]
            assert different == [2 + position]
            assert split_sub_captions(question.before[position]) == right[: 2 + position]
            assert sorted(right) == sorted(split_sub_captions(long_text(SCENES[question.scene])))


def test_a_question_changes_one_attribute_to_a_false_one():
    for question in questions(SCENES):
        scene = SCENES[question.scene]
        for true, changed in zip(question.true, question.changed, strict=True):
            assert set(facts(true)) == set(truth(scene))
            (right,), (wrong,) = set(facts(true)) - set(facts(changed)), set(facts(changed)) - set(facts(true))
            names = ("texture", "colour", "shape", "position")
            assert [n for n, a, b in zip(names, right, wrong, strict=True) if a != b] == [question.attribute]
            values = {getattr(thing, question.attribute) for thing in (scene.salient, *scene.objects)}
            assert wrong[names.index(question.attribute)] not in values


def test_questions_change_each_attribute_equally_often():
    counts = Counter(question.attribute for question in questions(SCENES))
    assert set(counts) == set(ATTRIBUTES)
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.slow
def test_questions_depend_on_the_seed():
    assert questions(SCENES, 1) == questions(SCENES, 1) != questions(SCENES, 2)


@pytest.mark.slow
def test_changed_texts_use_words_of_training_captions():
    records = [
        ImageRecord(f"s{n}", b"", "png", "", 64, 64, "", generate_scene(7, "train", n).to_json()) for n in range(400)
    ]
    captions = [
        caption.text
        for style in ("instructblip", "llava", "sharegpt4v")
        for caption in SceneCaptioner(style, CaptionerConfig(kind="scenes", path="", style=style), len).caption(records)
        if isinstance(caption, Caption)
    ]
    texts = [text for question in questions(SCENES) for text in question.changed]
    unseen = used_tokens(BERT, texts) - used_tokens(BERT, captions)
    assert unseen <= used_tokens(BERT, [long_text(scene) for scene in SCENES]) - used_tokens(BERT, captions)


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("token_by_token", [False, True])
def test_a_model_that_reads_three_objects_scores_chance_on_the_others(token_by_token):
    reader = Reader(sentences=5, token_by_token=token_by_token)
    result = hard_negatives(reader, reading_test(), reader.image_features(SCENES))
    assert [at.accuracy.value for at in result.by_position] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert [at.accuracy.interval for at in result.by_position] == [(1, 1)] * 3 + [(0.5, 0.5)] * 3
    assert result.accuracy.value == 0.75
    assert [of.accuracy.value for of in result.by_attribute] == [0.75] * 4
    assert sum(of.scenes for of in result.by_attribute) == result.scenes == len(questions(SCENES))


def test_reading_all_scores_one_and_reading_nothing_scores_chance():
    for sentences, accuracy in ((None, 1), (0, 0.5)):
        reader = Reader(sentences)
        result = hard_negatives(reader, reading_test(), reader.image_features(SCENES))
        assert {at.accuracy.value for at in result.by_position} == {accuracy}


def test_a_model_that_prefers_false_texts_scores_zero():
    reader = Reader()
    result = hard_negatives(reader, reading_test(), -reader.image_features(SCENES))
    assert result.accuracy.value == 0


@pytest.mark.slow
def test_intervals_resample_images():
    """The model guesses on half of the images, whose features are wrong, and is right on the others."""
    reader, chosen = Reader(), questions(SCENES)
    features = reader.image_features(SCENES)
    features[[question.scene for question in chosen[::2]]] = torch.eye(len(FACTS))[0]
    accuracy = hard_negatives(reader, reading_test(), features).accuracy
    assert accuracy.value == pytest.approx(0.75, abs=0.02)
    low, high = accuracy.interval
    half = 1.96 * 0.25 / len(chosen) ** 0.5  # each image scores 0.5 or 1 at every position
    assert high - low == pytest.approx(2 * half, rel=0.25)


def test_tokens_before_a_sentence_are_counted():
    chosen = questions(SCENES)
    before = [
        at.tokens_before for at in hard_negatives(Reader(), reading_test(), Reader().image_features(SCENES)).by_position
    ]
    assert before[0] == pytest.approx(sum(pieces([question.before[0] for question in chosen])) / len(chosen))
    assert all(8 < later - earlier < 14 for earlier, later in itertools.pairwise(before))


@pytest.mark.slow
def test_recall_rises_until_the_model_stops_reading():
    reader = Reader(sentences=5)
    results = recall_by_length(reader, reading_test(), reader.image_features(SCENES))
    assert [at.sentences for at in results] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert results[0].text_to_image.value == results[1].text_to_image.value < 0.05  # they describe no small object
    values = [at.text_to_image.value for at in results]
    assert values[1] < values[2] < values[3] and values[4:] == [values[4]] * 4
    assert all(at.text_to_image.interval[0] <= at.text_to_image.value <= at.text_to_image.interval[1] for at in results)
    assert [at.tokens for at in results] == sorted(at.tokens for at in results)


@pytest.mark.slow
def test_recall_of_full_texts_equals_retrieval_of_long_texts():
    reader = Reader(sentences=4)
    features, texts = reader.image_features(SCENES), [long_text(scene) for scene in SCENES]
    last = recall_by_length(reader, reading_test(), features)[-1]
    expected = retrieval(features, reader.texts(texts)[0], torch.arange(len(SCENES)), (1,))
    for direction, recall in (("image_to_text", last.image_to_text), ("text_to_image", last.text_to_image)):
        assert (recall.value, recall.interval) == (
            expected.values[f"{direction}.r1"],
            expected.intervals[f"{direction}.r1"],
        )


def test_results_are_plain_json():
    few = SCENES[:12]
    report = evaluate_reading(Reader(), make_reading_test(few, pieces), Reader().image_features(few)).to_json()
    assert report["hard_negatives"]["by_position"][0].keys() == {"position", "tokens_before", "accuracy"}
    assert report["hard_negatives"]["accuracy"]["value"] == 1
    assert report["lengths"][-1].keys() == {"sentences", "images", "tokens", "image_to_text", "text_to_image"}


@pytest.mark.slow
def test_a_limit_selects_the_first_scenes():
    reader = Reader(sentences=4)
    few = make_reading_test(SCENES, pieces, 40)
    assert few == make_reading_test(SCENES[:40], pieces)
    results = evaluate_reading(reader, few, reader.image_features(SCENES))
    assert results == evaluate_reading(reader, few, reader.image_features(SCENES[:40]))
    assert {at.images for at in results.lengths} == {40}
