"""Token ids beside a tar give the batches that tokenizing gives, and are used only where they are valid."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC, Prepend
from tokenizers.normalizers import Sequence as Steps

import lotlip.data
from lotlip.data.images import training_transform
from lotlip.data.tars import TarSamples
from lotlip.data.text import split_sub_captions
from lotlip.data.token_ids import TokenIds, read_token_ids, token_ids_path, vocabulary, write_token_ids
from lotlip.data.tokenizer import TextTokenizer, used_tokens
from lotlip.pretrain.config import LongTextsConfig, PretrainConfig
from lotlip.pretrain.loader import Batch, BatchSlice, Loader
from tests.conftest import TinySample, write_shards
from tests.test_tokenizer import FAMILIES, SIZES, family, ours, texts_of_all_sorts, write_roberta  # noqa: F401 (a fixture)

BERT = "bert-base-uncased"
TOKENIZER = TextTokenizer(BERT, 24, 2, 1)


def with_texts(samples: list[TinySample]) -> list[TinySample]:
    """Samples with many kinds of texts: long ones, other scripts, names of special tokens, and none."""
    texts = [
        ("A dog. It runs!", {"llava": ["one", "two", "three", "four"], "gpt": ["a", "b"]}),
        ("一只狗。它在跑", {"llava": ["Ünï ￼ \x00 code 🙂", "— ( )", "\u0301 mark"], "gpt": []}),
        ("[SEP] [COR1] [MASK]", {"gpt": ["[CLS] a", "[mask]", "unbelievable " * 40, "end"]}),
        ("word " * 60 + ". more", {}),
        ("no one. described it. at all. ok", {"llava": [], "gpt": []}),
        ("x", {"other": ["somebody else wrote this", "and this"]}),
    ]
    return [
        replace(sample, info={"raw": texts[number % 6][0], "captions": texts[number % 6][1]})
        for number, sample in enumerate(samples)
    ]


def loader(shards: Path, rows: BatchSlice, texts: dict[str, Any], workers: int, **settings: Any) -> Loader:
    tokenizer = settings.pop("tokenizer", TOKENIZER)
    config = PretrainConfig(long_texts=LongTextsConfig(**texts), loader=settings)
    return Loader(shards, config, tokenizer, 3, rows, workers=workers)


def equal_batches(batches: list[list[Batch]], expected: list[list[Batch]]) -> bool:
    """Whether the batches are identical, including their padding."""
    pairs = zip(chain.from_iterable(batches), chain.from_iterable(expected), strict=True)
    return all(equal(value, vars(other)[name]) for one, other in pairs for name, value in vars(one).items())


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_samples) -> tuple[Path, Path]:
    """The same shards with and without token ids."""
    samples = with_texts(tiny_samples)
    without, stored = (write_shards(tmp_path_factory.mktemp("shards"), samples, 3) for _ in range(2))
    for tar in stored.glob("*.tar"):
        assert write_token_ids(tar, BERT) == token_ids_path(tar)
    return without, stored


@pytest.fixture
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr("lotlip.pretrain.order.WINDOW", 2)


@pytest.fixture
def forbid_tokenizing(monkeypatch) -> Callable[[], None]:
    """A function that makes tokenizing a text or parsing a .json an error from then on."""

    def forbid() -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("a text was tokenized")

        monkeypatch.setattr("lotlip.pretrain.loader.sample_texts", refuse)
        encode = TextTokenizer.encode
        monkeypatch.setattr(TextTokenizer, "encode", lambda self, texts: refuse() if texts else encode(self, texts))

    return forbid


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("settings", [{}, {"epochs": "resampled", "weights": {"red": 5.0}}])
@pytest.mark.parametrize(
    ("texts", "rows", "workers"),
    [
        ({"sub_captions": 3}, BatchSlice(8), 0),
        ({"sub_captions": 2, "per_image": 3}, BatchSlice(8, micro_batches=2), 1),
        ({"sub_captions": 3, "window": "across-captions"}, BatchSlice(16, 1, 2, micro_batches=4), 2),
        ({"sub_captions": 1, "captioners": ["gpt"]}, BatchSlice(8), 0),
        ({"sub_captions": 9, "captioners": ["llava", "nobody"], "per_image": 2}, BatchSlice(8), 0),
        ({"sub_captions": 5, "captioners": ["other", "gpt"], "window": "across-captions"}, BatchSlice(8), 0),
        ({"sub_captions": 0}, BatchSlice(8, micro_batches=2), 0),
    ],
)
def test_stored_token_ids_give_the_batches_of_tokenized_texts(
    folders, small_windows, forbid_tokenizing, settings, texts, rows, workers
):
    without, stored = folders
    expected = list(loader(without, rows, texts, 0, **settings).steps(0, 14))
    forbid_tokenizing()
    assert equal_batches(list(loader(stored, rows, texts, workers, **settings).steps(0, 14)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_at_any_step(folders, small_windows, workers):
    without, stored = folders
    expected = list(loader(without, BatchSlice(8), {}, 0).steps(0, 13))
    for first in (1, 5, 6, 11):
        assert equal_batches(list(loader(stored, BatchSlice(8), {}, workers).steps(first, 13)), expected[first:])


def test_batches_of_pixels_have_the_same_texts(folders):
    def steps(shards: Path) -> list[list[Batch]]:
        return list(
            Loader(shards, PretrainConfig(), TOKENIZER, 0, BatchSlice(8), training_transform(16), 0).steps(0, 6)
        )

    assert equal_batches(steps(folders[1]), steps(folders[0]))


def test_only_the_feature_is_read(folders, monkeypatch):
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: sizes.append(size) or pread(file, size, offset))
    list(loader(folders[1], BatchSlice(8), {}, 0).steps(0, 6))
    assert sizes == [128 + 32 * 4] * 48  # .npy files of 32 numbers


def test_a_sample_without_a_stored_feature_is_an_error(tmp_path, tiny_samples):
    shards = write_shards(tmp_path, tiny_samples, 1, features=False)
    write_token_ids(shards / "train-000000.tar", BERT)
    with pytest.raises(ValueError, match=r"^sample \S+ in \S+train-000000.tar has no stored feature; set shard"):
        next(loader(shards, BatchSlice(8), {}, 0).steps(0, 1))


def test_tars_with_and_without_token_ids_can_be_mixed(tmp_path, tiny_samples, folders):
    mixed = write_shards(tmp_path, with_texts(tiny_samples), 3)
    write_token_ids(mixed / "train-000001.tar", BERT)
    expected = list(loader(folders[0], BatchSlice(8), {}, 0).steps(0, 6))
    assert equal_batches(list(loader(mixed, BatchSlice(8), {}, 0).steps(0, 6)), expected)


@pytest.mark.slow
def test_ids_of_another_tokenizer_are_not_used(folders):
    without, stored = folders
    tokenizer = TextTokenizer(BERT, 24, 2, sentence_ends="unicode")
    batches, expected = (
        list(loader(path, BatchSlice(8), {}, 0, tokenizer=tokenizer).steps(0, 6)) for path in (stored, without)
    )
    assert equal_batches(batches, expected)
    assert not equal_batches(batches, list(loader(stored, BatchSlice(8), {}, 0).steps(0, 6)))


@pytest.mark.slow
def test_token_ids_serve_any_context_length_and_corner_tokens(folders, forbid_tokenizing):
    without, stored = folders
    sizes = [TextTokenizer(BERT, 9, 4), TextTokenizer(BERT, 500, 0, 2)]
    expected = [list(loader(without, BatchSlice(8), {}, 0, tokenizer=size).steps(0, 6)) for size in sizes]
    forbid_tokenizing()
    for size, batches in zip(sizes, expected, strict=True):
        assert equal_batches(list(loader(stored, BatchSlice(8), {}, 0, tokenizer=size).steps(0, 6)), batches)


# --- the file -----------------------------------------------------------------------------------------------------


def write_one_tar(folder: Path, samples: list[TinySample], *captions: dict[str, Any]) -> Path:
    named = [replace(sample, info=info) for sample, info in zip(samples, captions, strict=False)]
    return write_shards(folder, named, 1) / "train-000000.tar"


def stored(tar: Path, words_hash: str | None = None) -> TokenIds | None:
    return read_token_ids(TarSamples(tar), words_hash)


def test_the_file_holds_every_sub_caption(tmp_path, tiny_samples):
    tar = write_one_tar(
        tmp_path,
        tiny_samples,
        {"raw": "a dog. it runs", "captions": {"b": ["red", "blue sky"], "a": ["green"]}},
        {"raw": "a cat", "captions": {"c": ["white"], "a": []}},
    )
    assert write_token_ids(tar, BERT)
    token_ids = stored(tar)
    assert token_ids is not None and token_ids.captioners == ["a", "b", "c"] and token_ids.ids.dtype == np.uint16
    assert token_ids.captions(0) == (range(2), {"a": range(2, 3), "b": range(3, 5), "c": range(5, 5)})
    assert token_ids.captions(1) == (range(5, 6), {"a": range(6, 6), "b": range(6, 6), "c": range(6, 7)})
    plain = TextTokenizer(BERT)
    for numbers, text in (
        ([0, 1], "a dog. it runs"),
        ([3, 4], "red. blue sky"),
        ([6], "white"),
        ([2, 4], "green. blue sky"),
    ):
        assert plain.encode_words(token_ids.words(numbers)).tolist() == plain.encode([text])[0]
    all_ids = TextTokenizer(BERT, 512).encode([["a dog", "it runs", "red", "blue sky", "green", "a cat", "white"]])
    assert token_ids.vocabulary == sorted(set(all_ids[0][1:]))
    assert token_ids.sentence_ends == "released" and token_ids.words_hash == plain.words_hash and token_ids.intact()


def test_the_vocabulary_covers_the_samples_in_the_tars(folders, tiny_samples, monkeypatch):
    """It does not depend on whether ids are stored. Samples that the shard stage dropped do not count."""
    without, with_ids = (sorted(folder.glob("*.tar")) for folder in folders)
    assert all(token_ids_path(tar).is_file() for tar in with_ids)
    expected = vocabulary(without, BERT)
    assert vocabulary([with_ids[0], *without[1:]], BERT) == expected
    infos = [sample.info for sample in with_texts(tiny_samples)]
    texts = [part for info in infos for part in (info["raw"], *chain.from_iterable(info["captions"].values()))]
    assert set(expected) == used_tokens(BERT, texts) - {TOKENIZER.sep_id}
    assert set(vocabulary(without[:1], BERT)) < set(expected)
    monkeypatch.setattr("lotlip.data.token_ids.used_tokens", None)  # nothing is tokenized
    assert vocabulary(with_ids, BERT) == expected


def test_the_bytes_depend_on_the_samples_only(tmp_path, tiny_samples):
    files = []
    for name in ("a", "b"):
        tar = write_shards(tmp_path / name, with_texts(tiny_samples), 1) / "train-000000.tar"
        path = write_token_ids(tar, BERT)
        assert path is not None
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_the_file_is_rewritten_only_when_it_is_stale(tmp_path, tiny_samples):
    info = {"raw": "a dog! it runs", "captions": {}}
    tar = write_one_tar(tmp_path, tiny_samples, info)
    path = token_ids_path(tar)

    def rewritten(*args: Any) -> bool:
        before = path.stat().st_ino if path.exists() else None
        open_file = path.open("rb") if before else None  # keeps its inode number from being reused
        assert write_token_ids(tar, BERT, *args) == path
        if open_file:
            open_file.close()
        return path.stat().st_ino != before

    assert [rewritten(), rewritten(), rewritten("unicode"), rewritten("unicode"), rewritten()] == [
        True,
        False,
        True,
        False,
        True,
    ]
    with tar.open("ab") as file:
        file.write(bytes(10240))
    assert [rewritten(), rewritten()] == [True, False]
    batch = pa.ipc.open_file(path).get_batch(0)
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch.slice(0, 0))
    assert [rewritten(), rewritten()] == [True, False]


def test_a_tar_without_samples_has_no_texts(tmp_path):
    tar = write_one_tar(tmp_path, [])
    assert write_token_ids(tar, BERT)
    token_ids = stored(tar)
    assert token_ids is not None and len(token_ids) == len(token_ids.ids) == 0
    inode = token_ids_path(tar).stat().st_ino
    assert write_token_ids(tar, BERT) and token_ids_path(tar).stat().st_ino == inode


@pytest.mark.slow
def test_a_large_vocabulary_takes_wider_ids(tmp_path, tiny_samples):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(4, 70000))]
    data = json.loads((Path(lotlip.data.__path__[0]) / BERT / "tokenizer.json").read_text())
    data["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces)}
    data["added_tokens"] = []
    name = tmp_path / "tokenizer.json"
    name.write_text(json.dumps(data))
    tar = write_one_tar(tmp_path / "shards", tiny_samples, {"raw": "w69999 w5", "captions": {}})
    assert write_token_ids(tar, str(name))
    token_ids = stored(tar)
    assert token_ids is not None and token_ids.ids.tolist() == [69999, 5, 3]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"raw": "..."}, "its short caption '...' has no words"),
        ({"raw": None}, "its .json has not `raw`"),
        ({"raw": "a", "captions": {"llava": ["a", " . "]}}, "a sub-caption of llava has no words or is not text"),
        ({"raw": "a", "captions": {"llava": [None]}}, "a sub-caption of llava has no words or is not text"),
    ],
)
def test_an_unusable_text_is_an_error_naming_its_sample(tmp_path, tiny_samples, info, message):
    tar = write_one_tar(tmp_path, tiny_samples, {"captions": {}, **info})
    with pytest.raises(ValueError, match=rf"^sample {tiny_samples[0].key} in \S+train-000000.tar: {message}"):
        write_token_ids(tar, BERT)


def test_sub_captions_that_contain_sentence_ends_are_not_stored(tmp_path, tiny_samples):
    tar = write_one_tar(tmp_path, tiny_samples, {"raw": "a", "captions": {"llava": ["[COR.1]"]}})
    assert write_token_ids(tar, BERT) is None
    assert stored(tar) is None


@pytest.mark.slow
def test_token_ids_are_not_stored_for_tokenizers_that_depend_on_context(tmp_path, tiny_samples):
    pieces = Tokenizer.from_file(str(Path(lotlip.data.__path__[0]) / BERT / "tokenizer.json"))
    assert pieces.normalizer is not None
    pieces.normalizer = Steps([Prepend("the "), pieces.normalizer])
    pieces.save(str(tmp_path / "tokenizer.json"))
    name = str(tmp_path / "tokenizer.json")
    tar = write_one_tar(tmp_path / "shards", tiny_samples, {"raw": "a dog. it runs", "captions": {}})
    assert write_token_ids(tar, BERT)
    assert write_token_ids(tar, name) is None
    assert stored(tar) is None  # the file of the other tokenizer is removed, too
    tar = write_one_tar(tmp_path / "short", tiny_samples, {"raw": "a dog", "captions": {}})
    assert write_token_ids(tar, name)  # there is only one sub-caption


def test_invalid_and_stale_files_are_errors(tmp_path, tiny_samples, folders):
    tar = write_one_tar(tmp_path, tiny_samples, {"raw": "a dog", "captions": {}})
    path = token_ids_path(tar)
    for data in (b"something else", b"", folders[1].joinpath("train-000000.token-ids.arrow").read_bytes()[:-100]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"token-ids.arrow is not a file with the token ids of a tar .*; rem"):
            next(loader(tmp_path, BatchSlice(1), {}, 0).steps(0, 1))
    path.write_bytes(folders[1].joinpath("train-000000.token-ids.arrow").read_bytes())
    with pytest.raises(ValueError, match=r"token-ids.arrow is stale: it describes a tar of \d+ bytes, but .*; remove"):
        next(loader(tmp_path, BatchSlice(1), {}, 0).steps(0, 1))
    batch = pa.record_batch({"key": ["a"]}).replace_schema_metadata({"bytes": str(tar.stat().st_size)})
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)
    with pytest.raises(ValueError, match=r"token-ids.arrow is not a file with the token ids of a tar .*; remove"):
        next(loader(tmp_path, BatchSlice(1), {}, 0).steps(0, 1))
    assert write_token_ids(tar, BERT)
    other = write_one_tar(tmp_path / "other", tiny_samples[1:], {"raw": "a cat", "captions": {}})
    assert other.stat().st_size == tar.stat().st_size
    token_ids_path(other).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"token-ids.arrow is stale: train-000000.tar has other samples; remove"):
        next(loader(other.parent, BatchSlice(1), {}, 0).steps(0, 1))


def test_a_normaliser_that_joins_characters_is_checked_in_every_sample(tmp_path, tiny_samples, monkeypatch):
    """The combining stroke of the last sample would be joined to the end of `</s>` before it."""
    monkeypatch.setattr("lotlip.data.token_ids._COMPARED", 2)
    write_roberta(tmp_path / "tokenizer.json", with_prefix=False)
    pieces = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces.normalizer = NFC()
    pieces.save(str(tmp_path / "tokenizer.json"))
    infos = [{"raw": "a dog. it runs", "captions": {}}] * 47
    name = str(tmp_path / "tokenizer.json")
    assert write_token_ids(write_one_tar(tmp_path / "plain", tiny_samples, *infos), name)
    stroke = {"raw": "a dog.\u0338it runs", "captions": {}}
    assert write_token_ids(write_one_tar(tmp_path / "stroke", tiny_samples, *infos, stroke), name) is None


# --- encoding one by one ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@given(
    texts=st.lists(texts_of_all_sorts, max_size=4),
    size=st.sampled_from(SIZES),
)
def test_encoding_sub_captions_one_by_one_equals_encoding_the_text(family, texts, size):  # noqa: F811
    parts = [part for text in texts for part in split_sub_captions(text)] or ["a"]
    unlimited = ours(family, SIZES[0])
    words = np.concatenate([np.array(row[1:]) for row in unlimited.encode(parts)])
    tokenizer = ours(family, size)
    assert tokenizer.encode_words(words).tolist() == tokenizer.encode([parts])[0]
