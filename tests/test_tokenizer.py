"""Captions to token ids, counted and saved as the model reads them. (The released code's own ids: test_parity.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lotlip.data.tokenizer import TextTokenizer, count_tokens, used_tokens, word_pieces

CLS, SEP, PAD, WORDS = 101, 102, 0, 30522  # of bert-base-uncased


def bert(context_length: int = 32, corner_tokens: int = 0) -> TextTokenizer:
    return TextTokenizer("bert-base-uncased", context_length, corner_tokens)


def write_words(file: Path, special: tuple[str, ...], words: str = "a red dog") -> str:
    """A tokenizer.json of whole words."""
    vocabulary = {token: index for index, token in enumerate([*special, *words.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[-1]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(file))
    return str(file)


def test_sub_captions_end_in_sep():
    pieces = word_pieces("bert-base-uncased")
    dog, runs = (pieces.encode(text, add_special_tokens=False).ids for text in ("A dog", "It runs"))
    assert bert().encode(["A dog. It runs."]) == [[CLS, *dog, SEP, *runs, SEP]]
    for same in ("A dog\nIt runs", "A dog</s>It runs", ["A dog", "It runs"]):
        assert bert().encode([same]) == bert().encode(["A dog. It runs."])


@pytest.mark.parametrize("corner_tokens", [1, 2, 4])
def test_corner_ids_follow_the_vocabulary(corner_tokens):
    (ids,) = bert(corner_tokens=corner_tokens).encode(["a dog"])
    (plain,) = bert().encode(["a dog"])
    assert ids == [CLS, *range(WORDS, WORDS + corner_tokens), *plain[1:]]


@pytest.mark.parametrize("corner_tokens", [0, 2])
def test_a_text_that_is_cut_still_ends_in_sep(corner_tokens):
    tokenizer = bert(10, corner_tokens)
    (whole,) = bert(512, corner_tokens).encode(["one two three four five six seven eight nine ten eleven twelve"])
    (cut,) = tokenizer.encode(["one two three four five six seven eight nine ten eleven twelve"])
    assert len(cut) == 10
    assert cut == [*whole[:9], SEP]


def test_a_text_that_just_fits_is_not_cut():
    text = "one two three four five six seven eight"
    (ids,) = bert(10).encode([text])
    assert len(ids) == 10
    assert bert(512).encode([text]) == [ids]


@pytest.mark.parametrize("empty", ["", " . \n", []])
def test_an_empty_text_is_still_a_sentence(empty):
    assert bert(corner_tokens=1).encode([empty]) == [[CLS, WORDS, SEP]]


def test_texts_are_padded_to_the_longest_or_as_asked():
    tokenizer = bert()
    ids, lengths = tokenizer(["a dog", "a big red dog", "dog"])
    assert ids.dtype == lengths.dtype == np.int64
    assert ids.shape == (3, 6)
    assert lengths.tolist() == [4, 6, 3]
    for row, length in zip(ids, lengths, strict=True):
        assert row[length - 1] == SEP
        assert (row[length:] == PAD).all()
    wide, same = tokenizer(["a dog", "a big red dog", "dog"], pad_to=9)
    assert wide.shape == (3, 9)
    assert np.array_equal(wide[:, :6], ids) and (wide[:, 6:] == PAD).all()
    assert np.array_equal(same, lengths)


def test_robertas_special_tokens_are_known(tmp_path):
    name = write_words(tmp_path / "tokenizer.json", ("<s>", "<pad>", "</s>", "<unk>"))
    tokenizer = TextTokenizer(name, 16, 1)
    assert tokenizer.vocabulary_size == 7
    ids, lengths = tokenizer(["a dog. red", "dog"])
    assert ids.tolist() == [[0, 7, 4, 6, 2, 5, 2], [0, 7, 6, 2, 1, 1, 1]]
    assert lengths.tolist() == [7, 4]


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    name = write_words(tmp_path / "tokenizer.json", ("<|endoftext|>",))
    with pytest.raises(ValueError, match=r"has none of \[CLS\], <s>: not a BERT-family tokenizer"):
        TextTokenizer(name)


def test_an_unknown_tokenizer_names_what_can_be_given(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer 'bert-large'.*or a bundled name \(bert-base-uncased\)"):
        TextTokenizer("bert-large")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not there"):
        TextTokenizer(str(tmp_path))


@pytest.mark.parametrize("text", ["A dog. It runs.", "one", "", "a.b.c", "Mr. Smith's 3.5 unbelievable dogs\nbark"])
def test_the_count_is_of_what_the_model_reads(text):
    (ids,) = bert(512).encode([text])
    assert count_tokens("bert-base-uncased")(text) == sum(token not in (CLS, SEP) for token in ids)


def test_used_tokens_are_those_of_all_texts():
    ids = {token for row in bert().encode(["a dog. it runs", "dog"]) for token in row} - {CLS, SEP}
    assert used_tokens("bert-base-uncased", ["a dog. it runs", "dog"]) == ids
    assert used_tokens("bert-base-uncased", []) == set()


def test_what_was_saved_is_read_by_transformers_and_by_us(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = bert(24, 2)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id) == (CLS, SEP, PAD)
    assert theirs.model_max_length == 24
    assert theirs("a big red dog", add_special_tokens=False)["input_ids"] == bert().encode(["a big red dog"])[0][1:-1]
    ours = TextTokenizer(str(tmp_path), 24, 2)
    texts = ["A dog. It runs.", "unbelievable " * 40]
    assert ours.encode(texts) == tokenizer.encode(texts)
    assert ours.vocabulary_size == tokenizer.vocabulary_size
