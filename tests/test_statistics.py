"""Lengths of texts: known values, and independence of batches."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotlip.data import statistics
from lotlip.data.statistics import Statistics, text_statistics
from lotlip.data.text import split_sub_captions

BERT = "bert-base-uncased"


def test_statistics_of_known_texts():
    statistics = text_statistics(["A dog. It runs.", "", "a cat</s>it sleeps", "one"], BERT)
    # </s> ends a sentence, and BERT's pieces of it are <, /, s, >
    assert statistics == Statistics(texts=3, sub_captions=2 + 2 + 1, tokens=6 + 8 + 1, empty=1)
    assert statistics.to_json() == {"texts": 3, "sub_captions_per_text": 5 / 3, "tokens_per_text": 5.0}


def test_means_are_over_texts_not_over_files():
    files = [["a dog. a cat. a car."], ["a", "b", "c"]]
    total = sum((text_statistics(texts, BERT) for texts in files), Statistics())
    assert total.to_json() == {"texts": 4, "sub_captions_per_text": 6 / 4, "tokens_per_text": 12 / 4}


def test_no_texts_have_zero_statistics():
    assert text_statistics([], BERT).to_json() == {"texts": 0, "sub_captions_per_text": 0.0, "tokens_per_text": 0.0}
    assert text_statistics(["", ""], BERT) == Statistics(empty=2)


def test_a_text_without_sentences_is_counted():
    assert text_statistics(["..."], BERT) == Statistics(texts=1, sub_captions=0, tokens=3)


@given(st.lists(st.text("ab .\n", max_size=12), max_size=12), st.integers(1, 40))
def test_sums_do_not_depend_on_batches(texts, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_BATCH", batch)
        result = text_statistics(iter(texts), BERT)
    assert result.texts + result.empty == len(texts)
    assert result.sub_captions == sum(len(split_sub_captions(text)) for text in texts)
    one_by_one = [text_statistics([text], BERT) for text in texts]
    assert result == sum(one_by_one, Statistics())


def test_texts_are_read_in_batches(monkeypatch):
    monkeypatch.setattr(statistics, "_BATCH", 100)
    sizes = []
    counts = statistics._batches
    monkeypatch.setattr(statistics, "_batches", lambda texts: (sizes.append(len(b)) or b for b in counts(texts)))
    rng = random.Random(0)
    text_statistics(("a " * rng.randrange(1, 20) for _ in range(500)), BERT)
    assert sum(sizes) == 500
    assert max(sizes) <= 100 // 3 + 1
    assert len(sizes) > 10


def test_an_unknown_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="no tokenizer 'bert-large'"):
        text_statistics([], "bert-large")
