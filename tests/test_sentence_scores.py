"""Scores of prefixes and of texts with changed sentences, for known models."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lotlip.data.text import split_sub_captions
from lotlip.demo.questions import as_text, long_text, sentences
from lotlip.demo.world import generate_scene
from lotlip.evaluate.ablation import _text_lengths
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts
from lotlip.evaluate.evaluate import chances, evaluate, protocol
from lotlip.evaluate.metrics import retrieval
from lotlip.evaluate.score_names import SENTENCE_METRICS
from lotlip.evaluate.sentence_scores import (
    asked_texts,
    counted_texts,
    delete_first_sentence,
    himo,
    prefixes,
    sentence_scores,
    swap_sentences,
)

WORDS = [f"w{number}" for number in range(40)]


class BagOfWords:
    """The feature of a text counts its words, weighted by sentence; sentences after the last weight have weight 1."""

    def __init__(self, *weights: float, token_by_token: bool = False) -> None:
        self.weights, self.token_by_token = weights, token_by_token
        self.encoded: list[str] = []

    def images(self, images: Iterable[bytes]) -> Tensor:
        raise NotImplementedError

    def protocol(self) -> dict[str, str | int]:
        return {}

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        self.encoded += texts
        rows = torch.zeros(len(texts), len(WORDS))
        for row, text in zip(rows, texts, strict=True):
            for number, sentence in enumerate(split_sub_captions(text)):
                weight = self.weights[number] if number < len(self.weights) else 1.0
                for word in sentence.split():
                    row[WORDS.index(word)] += weight
        return (rows[:, None], torch.ones(len(texts), 1, dtype=torch.bool)) if self.token_by_token else (rows, None)


def images_of(*texts: str) -> Tensor:
    """Images that show all words of their text."""
    return BagOfWords().texts(texts)[0]


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("A. B. C. D.", 2, ["A. B.", "A. B. C. D."]),
        ("A. B. C. D. E", 3, ["A.", "A. B. C.", "A. B. C. D. E"]),  # 5/3 and 10/3, rounded down
        ("A. B. C. D. E. F. G.", 4, ["A.", "A. B. C.", "A. B. C. D. E.", "A. B. C. D. E. F. G."]),
        ("A! B?\nC</s>D", 4, ["A!", "A! B?", "A! B?\nC</s>", "A! B?\nC</s>D"]),
        ("  A ... B .C. \n\nD", 2, ["  A ... B .", "  A ... B .C. \n\nD"]),
    ],
)
def test_prefixes_end_between_sentences(text: str, number: int, expected: list[str]):
    assert prefixes(text, number) == expected


def test_prefixes_grow_and_start_with_the_first_sentences():
    rng = random.Random(0)
    for _ in range(200):
        parts = [rng.choice(["A dog", "it runs", "two   birds", "a 3"]) for _ in range(rng.randint(4, 12))]
        text = "".join(part + rng.choice([". ", "! ", "\n", " .", "</s>", "... "]) for part in parts)
        for number in (2, 3, 4):
            cut = [split_sub_captions(prefix, "unicode") for prefix in prefixes(text, number)]
            lengths = [k * len(parts) // number for k in range(1, number + 1)]
            assert cut == [parts[:length] for length in lengths]
            assert all(one < other for one, other in itertools.pairwise(lengths))


def test_changed_texts_keep_other_sentences_and_punctuation():
    rng = random.Random(1)
    for _ in range(200):
        parts = [f"{rng.choice(['A dog', 'it runs'])} {number}" for number in range(rng.randint(4, 9))]
        ends = [rng.choice([". ", "! ", "\n", " .", "</s>", "... "]) for _ in parts]
        text = "".join(part + end for part, end in zip(parts, ends, strict=True))
        swapped = [parts[3], *parts[1:3], parts[0], *parts[4:]]
        assert swap_sentences(text) == "".join(part + end for part, end in zip(swapped, ends, strict=True))
        assert swap_sentences(swap_sentences(text)) == text
        assert split_sub_captions(delete_first_sentence(text), "unicode") == parts[1:]
        assert text.endswith(delete_first_sentence(text))


def test_equal_sentences_are_distinguished_by_position():
    assert swap_sentences("A. A. B. C. A.") == "C. A. B. A. A."
    assert delete_first_sentence("A. A. B. C.") == "A. B. C."


def test_texts_with_fewer_than_four_sentences_are_excluded():
    counted = counted_texts(ImageTexts(["A. B. C.", "A. B. C. D.", "A.\n\n... B! C? </s>", "A\nB\nC\nD"], [0, 1, 1, 2]))
    assert counted == ImageTexts(["A. B. C. D.", "A\nB\nC\nD"], [1, 2])


# --- HiMo@K -------------------------------------------------------------------------------------------------------


def test_himo_of_two_or_three_is_the_fraction_of_increasing_rows():
    assert himo(torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.2, 0.2], [-0.2, -0.1]])).tolist() == [1, 0, 0, 1]
    assert himo(torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.3, 0.2], [0.1, 0.2, 0.2]])).tolist() == [1, 0, 0]


def test_himo_of_four_is_pearsons_correlation():
    rows = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [0.1, 0.4, 0.2, 0.3], [0.5, 0.5, 0.5, 0.5]])
    expected = [1, -1, 0.4, 0]  # third: covariance 0.2 with k, deviations √5 and √0.05
    assert himo(rows).tolist() == pytest.approx(expected)
    many = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    assert himo(many).tolist() == pytest.approx([np.corrcoef(row, range(4))[0, 1] for row in many.tolist()], abs=1e-5)


def test_differences_by_rounding_do_not_count_as_increases():
    rows = torch.tensor([[0.5, 0.5 + 1e-7, 0.5 + 2e-7]])
    assert himo(rows).tolist() == himo(torch.cat([rows, rows[:, 2:] + 1e-7], dim=1)).tolist() == [0]


@pytest.mark.parametrize("token_by_token", [False, True])
def test_himo_of_models_that_read_all_or_only_the_first_sentence(token_by_token):
    texts = ["w0. w1. w2. w3.", "w4. w5. w6. w7. w8."]
    images = images_of(*texts)
    shown = images[:, None] if token_by_token else images
    image_texts = ImageTexts(texts, [0, 1])
    scores = sentence_scores(BagOfWords(token_by_token=token_by_token), image_texts, shown).values
    assert (scores["prefixes.himo2"], scores["prefixes.himo3"]) == (1, 1)
    # cosines of 1, 2, 3 of 4 words and all: √(k/4); of 1, 2, 3 and 5 of 5 words: √(k/5)
    four_words = np.corrcoef([1, 2, 3, 4], np.sqrt([1, 2, 3, 4]))[0, 1]
    five_words = np.corrcoef([1, 2, 3, 4], np.sqrt([1, 2, 3, 5]))[0, 1]
    assert scores["prefixes.himo4"] == pytest.approx((four_words + five_words) / 2, abs=1e-5)
    first_sentence_model = BagOfWords(1, *[0] * 9, token_by_token=token_by_token)
    constant = sentence_scores(first_sentence_model, image_texts, shown).values
    assert [constant[f"prefixes.himo{k}"] for k in (2, 3, 4)] == [0, 0, 0]


def test_himo_of_similarities_that_increase_for_half_of_the_texts():
    """The second image shows only the first sentence of its text, so more sentences lower the similarity."""
    texts = ["w0. w1. w2. w3.", "w4. w5. w6. w7."]
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [0, 1]), images_of("w0 w1 w2 w3", "w4"))
    assert scores.values["prefixes.himo2"] == scores.values["prefixes.himo3"] == 0.5
    assert abs(scores.values["prefixes.himo4"]) < 0.05
    assert scores.intervals["prefixes.himo2"] == (0, 1)


# --- swapped and deleted sentences --------------------------------------------------------------------------------


def test_a_model_that_reads_only_the_first_sentence_fails_without_it():
    """Sentences 2 and 4 belong to the next image, so recall is zero without the first sentence."""
    texts = [f"w{n}. w{(n + 1) % 4}. w9. w{(n + 1) % 4}. w9." for n in range(4)]
    images = images_of("w0", "w1", "w2", "w3")
    scores = sentence_scores(BagOfWords(1, *[0] * 9), ImageTexts(texts, [0, 1, 2, 3]), images).values
    for direction in ("image_to_text", "text_to_image"):
        recalls = [scores[f"{change}.{direction}.r1"] for change in ("unchanged", "swapped", "deleted")]
        assert recalls == [1, 0, 0]


def test_a_model_without_order_is_not_affected_by_a_swap():
    texts = ["w0. w1. w9. w8.", "w2. w3. w9. w8.", "w4. w9. w9. w8.", "w5. w9. w9. w8."]
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [0, 1, 2, 3]), images_of(*texts)).values
    assert scores["unchanged.text_to_image.r1"] == scores["swapped.text_to_image.r1"] == 1
    # without the first sentence the last two texts are equal, so each scores one half
    assert scores["deleted.text_to_image.r1"] == 0.75


def test_excluded_texts_and_their_images_are_no_candidates():
    """The image of an excluded text is not a candidate, although it matches another text best."""
    texts = ["w0. w1. w2.", "w3. w4. w5. w6.", "w7. w8. w9. w10."]
    images = images_of("w3 w4 w5 w6", "w3", "w7")
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [0, 1, 2]), images)
    assert scores.values["unchanged.text_to_image.r1"] == 1
    benchmark = Benchmark("toy", ["a", "b", "c"], lambda _: b"", {"long": ImageTexts(texts, [0, 1, 2])})
    assert protocol(BagOfWords(), benchmark)["long_texts_of_4_sentences"] == 2
    assert evaluate(BagOfWords(), benchmark, images).values["long.text_to_image.r1"] < 1


def test_the_first_texts_alone_may_count():
    texts = ["w0. w1. w2. w3.", "w4. w5.", "w6. w7. w8. w9.", "w10. w11. w12. w13."]
    images = images_of("w0", "w4", "w6", "w0 w1 w2 w3 w10")
    long = {"long": ImageTexts(texts, [0, 1, 2, 3])}
    few, every = (Benchmark("toy", list("abcd"), lambda _: b"", long, sentence_texts=most) for most in (2, None))
    assert protocol(BagOfWords(), few)["long_texts_of_4_sentences"] == 2
    # among all images, the last one matches the first text best
    assert evaluate(BagOfWords(), few, images).values["unchanged.text_to_image.r1"] == 1
    assert evaluate(BagOfWords(), every, images).values["unchanged.text_to_image.r1"] < 1
    assert [chances(one)["swapped.text_to_image.r1"] for one in (few, every)] == pytest.approx([1 / 2, 1 / 3])


def test_images_may_have_several_texts():
    texts = ["w0. w1. w2. w3.", "w4. w5. w6. w7.", "w8. w9. w10. w11."]
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [2, 0, 2]), images_of("w4", "w30", "w0 w1 w2 w3 w8"))
    assert scores.values["unchanged.image_to_text.r1"] == 1
    assert scores.values["prefixes.himo2"] == pytest.approx(1 / 3)  # only the first text's similarities increase


@pytest.mark.parametrize("texts", [[], ["w0. w1. w2. w3."], ["w0. w1.", "w2. w3. w4."]])
def test_fewer_than_two_texts_have_no_scores(texts: list[str]):
    image_texts = ImageTexts(texts, list(range(len(texts))))
    assert sentence_scores(BagOfWords(), image_texts, torch.ones(3, len(WORDS))).values == {}


# --- within evaluate ----------------------------------------------------------------------------------------------


def test_scores_of_unchanged_texts_equal_those_of_long_texts():
    scenes = [generate_scene(3, "test", number) for number in range(30)]
    rng = torch.Generator().manual_seed(0)
    known: dict[str, Tensor] = {}

    class Random(BagOfWords):
        def texts(self, texts: Sequence[str]) -> tuple[Tensor, None]:
            for text in texts:
                if text not in known:
                    known[text] = torch.randn(8, generator=rng)
            return torch.stack([known[text] for text in texts]), None

    texts = ImageTexts([long_text(scene) for scene in scenes], list(range(30)))
    images = torch.randn(30, 8, generator=rng)
    scores = evaluate(Random(), Benchmark("toy", [""] * 30, lambda _: b"", {"long": texts}), images)
    assert set(SENTENCE_METRICS) <= set(scores.values) and set(SENTENCE_METRICS) <= set(scores.intervals)
    for direction in ("image_to_text", "text_to_image"):
        name = f"{direction}.r1"
        assert scores.values[f"unchanged.{name}"] == scores.values[f"long.{name}"]
        swapped = [swap_sentences(text) for text in texts.texts]
        expected = retrieval(images, Random().texts(swapped)[0], torch.arange(30), (1,)).values[name]
        assert scores.values[f"swapped.{name}"] == expected


def test_chance_of_sentence_scores():
    texts = ImageTexts([f"w{n}. w1. w2. w3." for n in range(10)] + ["w0."], list(range(11)))
    chance = chances(Benchmark("toy", [""] * 11, lambda _: b"", {"long": texts}))
    assert chance["prefixes.himo2"] == 1 / 2 and chance["prefixes.himo3"] == 1 / 6
    assert "prefixes.himo4" not in chance  # a correlation has no chance level
    assert chance["swapped.image_to_text.r1"] == chance["deleted.text_to_image.r1"] == pytest.approx(1 / 10)
    assert chance["long.text_to_image.r1"] == pytest.approx(1 / 11)
    similarities = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    assert himo(similarities).mean().item() == pytest.approx(1 / math.factorial(3), abs=0.01)


def test_texts_are_encoded_once_and_shared_with_the_reading_test():
    """Both tests encode the first sentences of a scene's text."""
    scene = generate_scene(3, "test", 0)
    parts = sentences(scene)
    truncated = {as_text(parts[:number]) for number in range(1, len(parts) + 1)}
    scene_prefixes = {prefix for number in (2, 3, 4) for prefix in prefixes(long_text(scene), number)}
    assert scene_prefixes <= truncated
    texts = ["w0. w1. w2. w3. w4. w5.", "w6. w7. w8. w9."]
    model = BagOfWords()
    sentence_scores(model, ImageTexts(texts, [0, 1]), images_of(*texts))
    assert set(model.encoded) == asked_texts(ImageTexts(texts, [0, 1]))
    counts = {text: model.encoded.count(text) for text in model.encoded}
    assert {text for text, count in counts.items() if count > 1} == set(
        texts
    )  # the full texts, which the caller caches


def test_text_lengths_of_a_benchmark_equal_those_of_lotlip_stats():
    texts = ["A dog runs. It is brown.", "A cat."]
    benchmark = Benchmark("toy", ["a", "b"], lambda _: b"", {"long": ImageTexts(texts, [0, 1])})
    assert _text_lengths(benchmark, "bert-base-uncased") == {
        "long_sub_captions_per_text": 1.5,
        "long_tokens_per_text": (8 + 3) / 2,
    }
