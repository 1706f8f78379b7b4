"""Reading to the end: models that read a known part of a text get known answers."""

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
# What a sentence can say of a small object, each with a place in a feature.
FACTS = {fact: n for n, fact in enumerate(itertools.product(TEXTURES, COLOURS, SHAPES, POSITIONS))}


def pieces(texts: Sequence[str]) -> list[int]:
    return token_counts(BERT, texts)


@cache
def quiz() -> ReadingTest:
    return make_reading_test(SCENES, pieces)


def fact(sentence: str) -> tuple[str, str, str, str] | None:
    """What a sentence says of a small object; None where it is about something else."""
    words = sentence.split()
    texture, colour, shape = (next((w for w in words if w in names), "") for names in (TEXTURES, COLOURS, SHAPES))
    positions = [position for position in POSITIONS if position in sentence.lower()]
    return (texture, colour, shape, max(positions, key=len)) if positions and shape else None


def facts(text: str, sentences: int | None = None) -> list[tuple[str, str, str, str]]:
    return [found for found in map(fact, split_sub_captions(text)[:sentences]) if found]


def truth(scene: Scene) -> list[tuple[str, str, str, str]]:
    return [(thing.texture, thing.colour, thing.shape, thing.position) for thing in scene.objects]


@dataclass(frozen=True)
class Reader:
    """Understands the first `sentences` of a text, all of them with None; token by token where it is asked to be so."""

    sentences: int | None = None
    token_by_token: bool = False

    def images(self, images: Iterable[bytes]) -> Tensor:
        raise NotImplementedError

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        rows = [self.row(facts(text, self.sentences)) for text in texts]
        if not self.token_by_token:
            return normalize(torch.stack([row.sum(dim=0) for row in rows])), None
        return torch.stack(rows), torch.stack([row.any(dim=1) | (torch.arange(6) == 0) for row in rows])

    def row(self, told: list[tuple[str, str, str, str]]) -> Tensor:
        """A token for each of at most six facts."""
        row = torch.zeros(6, len(FACTS))
        for number, one in enumerate(told):
            row[number, FACTS[one]] = 1
        return row

    def seen(self, scenes: Sequence[Scene]) -> Tensor:
        """Features of the scenes' images."""
        rows = torch.stack([self.row(truth(scene)) for scene in scenes])
        return rows if self.token_by_token else normalize(rows.sum(dim=1))

    def protocol(self) -> dict[str, str | int]:
        return {}


# --- questions ----------------------------------------------------------------------------------------------------


def test_the_scenes_with_most_objects_are_asked_for_at_every_position():
    asked = questions(SCENES)
    assert [question.scene for question in asked] == [n for n, scene in enumerate(SCENES) if len(scene.objects) == 6]
    for question in asked:
        assert len(question.true) == len(question.changed) == len(question.before) == 6
        for position, (true, changed) in enumerate(zip(question.true, question.changed, strict=True)):
            right, wrong = split_sub_captions(true), split_sub_captions(changed)
            different = [n for n, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1]]
            assert different == [2 + position]
            assert split_sub_captions(question.before[position]) == right[: 2 + position]
            assert sorted(right) == sorted(split_sub_captions(long_text(SCENES[question.scene])))


def test_one_attribute_is_false_of_the_scene_and_everything_else_is_true():
    for question in questions(SCENES):
        scene = SCENES[question.scene]
        for true, changed in zip(question.true, question.changed, strict=True):
            assert set(facts(true)) == set(truth(scene))
            (right,), (wrong,) = set(facts(true)) - set(facts(changed)), set(facts(changed)) - set(facts(true))
            names = ("texture", "colour", "shape", "position")
            assert [n for n, a, b in zip(names, right, wrong, strict=True) if a != b] == [question.attribute]
            there = {getattr(thing, question.attribute) for thing in (scene.salient, *scene.objects)}
            assert wrong[names.index(question.attribute)] not in there


def test_attributes_are_asked_for_equally_often():
    counts = Counter(question.attribute for question in questions(SCENES))
    assert set(counts) == set(ATTRIBUTES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_seed_chooses_the_questions():
    assert questions(SCENES, 1) == questions(SCENES, 1) != questions(SCENES, 2)


def test_changed_texts_are_made_of_words_that_training_has():
    records = [
        ImageRecord(f"s{n}", b"", "png", "", 64, 64, "", generate_scene(7, "train", n).to_json()) for n in range(400)
    ]
    said = [
        caption.text
        for style in ("instructblip", "llava", "sharegpt4v")
        for caption in SceneCaptioner(style, CaptionerConfig(kind="scenes", path="", style=style), len).caption(records)
        if isinstance(caption, Caption)
    ]
    asked = [text for question in questions(SCENES) for text in question.changed]
    unseen = used_tokens(BERT, asked) - used_tokens(BERT, said)
    assert unseen <= used_tokens(BERT, [long_text(scene) for scene in SCENES]) - used_tokens(BERT, said)


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_by_token", [False, True])
def test_a_model_that_reads_three_objects_guesses_on_the_others(token_by_token):
    reader = Reader(sentences=5, token_by_token=token_by_token)
    found = hard_negatives(reader, quiz(), reader.seen(SCENES))
    assert [at.accuracy.value for at in found.by_position] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert [at.accuracy.interval for at in found.by_position] == [(1, 1)] * 3 + [(0.5, 0.5)] * 3
    assert found.accuracy.value == 0.75
    assert [of.accuracy.value for of in found.by_attribute] == [0.75] * 4
    assert sum(of.scenes for of in found.by_attribute) == found.scenes == len(questions(SCENES))


def test_a_model_that_reads_all_is_right_and_one_that_reads_nothing_guesses():
    for sentences, accuracy in ((None, 1), (0, 0.5)):
        reader = Reader(sentences)
        found = hard_negatives(reader, quiz(), reader.seen(SCENES))
        assert {at.accuracy.value for at in found.by_position} == {accuracy}


def test_a_model_that_prefers_what_is_false_is_wrong():
    reader = Reader()
    found = hard_negatives(reader, quiz(), -reader.seen(SCENES))
    assert found.accuracy.value == 0


def test_intervals_are_of_images():
    """Half of the images are seen as nothing: on those the model guesses, on the others it is right."""
    reader, asked = Reader(), questions(SCENES)
    seen = reader.seen(SCENES)
    seen[[question.scene for question in asked[::2]]] = torch.eye(len(FACTS))[0]
    found = hard_negatives(reader, quiz(), seen).accuracy
    assert found.value == pytest.approx(0.75, abs=0.02)
    low, high = found.interval
    half = 1.96 * 0.25 / len(asked) ** 0.5  # each image scores 0.5 or 1, whatever the position
    assert high - low == pytest.approx(2 * half, rel=0.25)


def test_what_stands_before_a_sentence_is_counted():
    asked = questions(SCENES)
    before = [at.tokens_before for at in hard_negatives(Reader(), quiz(), Reader().seen(SCENES)).by_position]
    assert before[0] == pytest.approx(sum(pieces([question.before[0] for question in asked])) / len(asked))
    assert all(8 < later - earlier < 14 for earlier, later in itertools.pairwise(before))


def test_recall_rises_until_the_model_stops_reading():
    reader = Reader(sentences=5)
    found = recall_by_length(reader, quiz(), reader.seen(SCENES))
    assert [at.sentences for at in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found[0].text_to_image.value == found[1].text_to_image.value < 0.05  # of no small object
    values = [at.text_to_image.value for at in found]
    assert values[1] < values[2] < values[3] and values[4:] == [values[4]] * 4
    assert all(at.text_to_image.interval[0] <= at.text_to_image.value <= at.text_to_image.interval[1] for at in found)
    assert [at.tokens for at in found] == sorted(at.tokens for at in found)


def test_whole_texts_score_as_long_texts_do():
    reader = Reader(sentences=4)
    seen, texts = reader.seen(SCENES), [long_text(scene) for scene in SCENES]
    last = recall_by_length(reader, quiz(), seen)[-1]
    expected = retrieval(seen, reader.texts(texts)[0], torch.arange(len(SCENES)), (1,))
    for way, share in (("image_to_text", last.image_to_text), ("text_to_image", last.text_to_image)):
        assert (share.value, share.interval) == (expected.values[f"{way}.r1"], expected.intervals[f"{way}.r1"])


def test_answers_are_plain_json():
    few = SCENES[:12]
    found = evaluate_reading(Reader(), make_reading_test(few, pieces), Reader().seen(few)).to_json()
    assert found["hard_negatives"]["by_position"][0].keys() == {"position", "tokens_before", "accuracy"}
    assert found["hard_negatives"]["accuracy"]["value"] == 1
    assert found["lengths"][-1].keys() == {"sentences", "images", "tokens", "image_to_text", "text_to_image"}


def test_only_the_first_scenes_are_asked_about():
    reader = Reader(sentences=4)
    few = make_reading_test(SCENES, pieces, 40)
    assert few == make_reading_test(SCENES[:40], pieces)
    found = evaluate_reading(reader, few, reader.seen(SCENES))
    assert found == evaluate_reading(reader, few, reader.seen(SCENES[:40]))
    assert {at.images for at in found.lengths} == {40}
