"""Prefixes and changed sentences: known models get known scores, and texts keep everything else."""

from __future__ import annotations

import doctest
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
from lotlip.evaluate import sentence_scores as module
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
    """Its feature of a text has each word's count, times the weight of the word's sentence: 1 after the last weight."""

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
    """Images that show each of a text's words."""
    return BagOfWords().texts(texts)[0]


# --- texts --------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(module).failed == 0


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
def test_a_text_is_cut_between_sentences(text: str, number: int, expected: list[str]):
    assert prefixes(text, number) == expected


def test_prefixes_grow_and_have_the_first_sentences():
    rng = random.Random(0)
    for _ in range(200):
        parts = [rng.choice(["A dog", "it runs", "two   birds", "a 3"]) for _ in range(rng.randint(4, 12))]
        text = "".join(part + rng.choice([". ", "! ", "\n", " .", "</s>", "... "]) for part in parts)
        for number in (2, 3, 4):
            cut = [split_sub_captions(prefix, "unicode") for prefix in prefixes(text, number)]
            lengths = [k * len(parts) // number for k in range(1, number + 1)]
            assert cut == [parts[:length] for length in lengths]
            assert all(one < other for one, other in itertools.pairwise(lengths))


def test_changed_texts_keep_all_other_sentences_and_the_punctuation():
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


def test_equal_sentences_are_not_confused():
    assert swap_sentences("A. A. B. C. A.") == "C. A. B. A. A."
    assert delete_first_sentence("A. A. B. C.") == "A. B. C."


def test_texts_with_fewer_than_four_sentences_do_not_count():
    counted = counted_texts(ImageTexts(["A. B. C.", "A. B. C. D.", "A.\n\n... B! C? </s>", "A\nB\nC\nD"], [0, 1, 1, 2]))
    assert counted == ImageTexts(["A. B. C. D.", "A\nB\nC\nD"], [1, 2])


# --- HiMo@K -------------------------------------------------------------------------------------------------------


def test_a_share_counts_rows_that_always_grow():
    assert himo(torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.2, 0.2], [-0.2, -0.1]])).tolist() == [1, 0, 0, 1]
    assert himo(torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.3, 0.2], [0.1, 0.2, 0.2]])).tolist() == [1, 0, 0]


def test_a_correlation_is_pearsons():
    rows = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [0.1, 0.4, 0.2, 0.3], [0.5, 0.5, 0.5, 0.5]])
    expected = [1, -1, 0.4, 0]  # third: covariance 0.2 with k, deviations √5 and √0.05
    assert himo(rows).tolist() == pytest.approx(expected)
    many = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    assert himo(many).tolist() == pytest.approx([np.corrcoef(row, range(4))[0, 1] for row in many.tolist()], abs=1e-5)


def test_similarities_that_differ_by_rounding_do_not_grow():
    rows = torch.tensor([[0.5, 0.5 + 1e-7, 0.5 + 2e-7]])
    assert himo(rows).tolist() == himo(torch.cat([rows, rows[:, 2:] + 1e-7], dim=1)).tolist() == [0]


@pytest.mark.parametrize("token_by_token", [False, True])
def test_a_model_that_reads_all_grows_and_one_that_reads_the_first_sentence_does_not(token_by_token):
    texts = ["w0. w1. w2. w3.", "w4. w5. w6. w7. w8."]
    images = images_of(*texts)
    shown = images[:, None] if token_by_token else images
    asked = ImageTexts(texts, [0, 1])
    grows = sentence_scores(BagOfWords(token_by_token=token_by_token), asked, shown).values
    assert (grows["prefixes.himo2"], grows["prefixes.himo3"]) == (1, 1)
    # cosines of 1, 2, 3 of 4 words and all: √(k/4); of 1, 2, 3 and 5 of 5 words: √(k/5)
    of_four = np.corrcoef([1, 2, 3, 4], np.sqrt([1, 2, 3, 4]))[0, 1]
    of_five = np.corrcoef([1, 2, 3, 4], np.sqrt([1, 2, 3, 5]))[0, 1]
    assert grows["prefixes.himo4"] == pytest.approx((of_four + of_five) / 2, abs=1e-5)
    first = BagOfWords(1, *[0] * 9, token_by_token=token_by_token)
    constant = sentence_scores(first, asked, shown).values
    assert [constant[f"prefixes.himo{k}"] for k in (2, 3, 4)] == [0, 0, 0]


def test_half_of_the_texts_grow():
    """The second image shows nothing of its text but the first sentence, so more sentences lower the similarity."""
    texts = ["w0. w1. w2. w3.", "w4. w5. w6. w7."]
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [0, 1]), images_of("w0 w1 w2 w3", "w4"))
    assert scores.values["prefixes.himo2"] == scores.values["prefixes.himo3"] == 0.5
    assert abs(scores.values["prefixes.himo4"]) < 0.05
    assert scores.intervals["prefixes.himo2"] == (0, 1)


# --- swapped and deleted sentences --------------------------------------------------------------------------------


def test_a_model_that_reads_the_first_sentence_needs_it():
    """It finds nothing by the other sentences: sentence 4 and sentence 2 are those of the next image."""
    texts = [f"w{n}. w{(n + 1) % 4}. w9. w{(n + 1) % 4}. w9." for n in range(4)]
    images = images_of("w0", "w1", "w2", "w3")
    scores = sentence_scores(BagOfWords(1, *[0] * 9), ImageTexts(texts, [0, 1, 2, 3]), images).values
    for direction in ("image_to_text", "text_to_image"):
        found = [scores[f"{change}.{direction}.r1"] for change in ("unchanged", "swapped", "deleted")]
        assert found == [1, 0, 0]


def test_a_model_without_order_is_not_affected_by_a_swap():
    texts = ["w0. w1. w9. w8.", "w2. w3. w9. w8.", "w4. w9. w9. w8.", "w5. w9. w9. w8."]
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [0, 1, 2, 3]), images_of(*texts)).values
    assert scores["unchanged.text_to_image.r1"] == scores["swapped.text_to_image.r1"] == 1
    # without the first sentence the last two texts are the same: each is found in half of the draws
    assert scores["deleted.text_to_image.r1"] == 0.75


def test_scores_are_among_the_texts_that_count():
    """The image of a short text is no candidate, though it is the best match of another's text."""
    texts = ["w0. w1. w2.", "w3. w4. w5. w6.", "w7. w8. w9. w10."]
    images = images_of("w3 w4 w5 w6", "w3", "w7")
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [0, 1, 2]), images)
    assert scores.values["unchanged.text_to_image.r1"] == 1
    asked = Benchmark("toy", ["a", "b", "c"], lambda _: b"", {"long": ImageTexts(texts, [0, 1, 2])})
    assert protocol(BagOfWords(), asked)["long_texts_of_4_sentences"] == 2
    assert evaluate(BagOfWords(), asked, images).values["long.text_to_image.r1"] < 1


def test_an_image_may_have_several_texts():
    texts = ["w0. w1. w2. w3.", "w4. w5. w6. w7.", "w8. w9. w10. w11."]
    scores = sentence_scores(BagOfWords(), ImageTexts(texts, [2, 0, 2]), images_of("w4", "w30", "w0 w1 w2 w3 w8"))
    assert scores.values["unchanged.image_to_text.r1"] == 1
    assert scores.values["prefixes.himo2"] == pytest.approx(1 / 3)  # the first text's


@pytest.mark.parametrize("texts", [[], ["w0. w1. w2. w3."], ["w0. w1.", "w2. w3. w4."]])
def test_there_are_no_scores_of_fewer_than_two_texts(texts: list[str]):
    asked = ImageTexts(texts, list(range(len(texts))))
    assert sentence_scores(BagOfWords(), asked, torch.ones(3, len(WORDS))).values == {}


# --- as a part of evaluation --------------------------------------------------------------------------------------


def test_scores_of_whole_texts_are_those_of_long_texts():
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


def test_chance_is_that_of_guessing():
    texts = ImageTexts([f"w{n}. w1. w2. w3." for n in range(10)] + ["w0."], list(range(11)))
    found = chances(Benchmark("toy", [""] * 11, lambda _: b"", {"long": texts}))
    assert found["prefixes.himo2"] == 1 / 2 and found["prefixes.himo3"] == 1 / 6
    assert "prefixes.himo4" not in found  # a correlation
    assert found["swapped.image_to_text.r1"] == found["deleted.text_to_image.r1"] == pytest.approx(1 / 10)
    assert found["long.text_to_image.r1"] == pytest.approx(1 / 11)
    similarities = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    assert himo(similarities).mean().item() == pytest.approx(1 / math.factorial(3), abs=0.01)


def test_no_text_is_encoded_twice_and_prefixes_of_scenes_are_those_of_the_reading_test():
    """Both tests of a scene's text need its first sentences, so the encodings are shared."""
    scene = generate_scene(3, "test", 0)
    parts = sentences(scene)
    truncated = {as_text(parts[:number]) for number in range(1, len(parts) + 1)}
    cut = {prefix for number in (2, 3, 4) for prefix in prefixes(long_text(scene), number)}
    assert cut <= truncated
    texts = ["w0. w1. w2. w3. w4. w5.", "w6. w7. w8. w9."]
    model = BagOfWords()
    sentence_scores(model, ImageTexts(texts, [0, 1]), images_of(*texts))
    assert set(model.encoded) == asked_texts(ImageTexts(texts, [0, 1]))
    counts = {text: model.encoded.count(text) for text in model.encoded}
    assert {text for text, count in counts.items() if count > 1} == set(texts)  # the whole texts, cached by the caller


def test_lengths_of_a_benchmark_s_texts_are_those_of_lotlip_stats():
    texts = ["A dog runs. It is brown.", "A cat."]
    asked = Benchmark("toy", ["a", "b"], lambda _: b"", {"long": ImageTexts(texts, [0, 1])})
    assert _text_lengths(asked, "bert-base-uncased") == {
        "long_sub_captions_per_text": 1.5,
        "long_tokens_per_text": (8 + 3) / 2,
    }
