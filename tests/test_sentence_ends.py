"""`caption.sentence_ends`: one rule from captions to the saved model, with an unchanged default."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.normalizers import Replace
from transformers import AutoProcessor, AutoTokenizer

from lotlip import cli
from lotlip.caption.config import CaptionConfig
from lotlip.core.files import read_json
from lotlip.data.statistics import text_statistics
from lotlip.data.text import as_sentence_ends, has_words, join_sub_captions, split_sub_captions
from lotlip.data.tokenizer import TextTokenizer, used_tokens
from lotlip.models.saving import load_model
from lotlip.retrieval.embedding import Embedder, embed
from tests.conftest import TinySample, TinyWorld, write_shards
from tests.tiny_model import save_tiny_model
from tests.training import tiny_job, train

ROOT = Path(__file__).parent.parent
BERT = "bert-base-uncased"
CHINESE = "一只红色的狗。它在草地上跑！天空是蓝色的吗？"
JAPANESE = "赤い犬がいます。草の上を走っています｡空は青いですか？はい．"
MIXED = "A red dog! 它在跑。Is the sky blue? 是的．It is 3 o'clock.\n完"
SUB_CAPTIONS = {
    CHINESE: ["一只红色的狗", "它在草地上跑", "天空是蓝色的吗"],
    JAPANESE: ["赤い犬がいます", "草の上を走っています", "空は青いですか", "はい"],
    MIXED: ["A red dog", "它在跑", "Is the sky blue", "是的", "It is 3 o'clock", "完"],
    "एक कुत्ता है। वह दौड़ता है॥": ["एक कुत्ता है", "वह दौड़ता है"],
    "هذا كلب. هل يجري؟ نعم۔": ["هذا كلب", "هل يجري", "نعم"],
    "。！？ …": ["…"],
    "他说“你好。”然后走了。": ["他说“你好", "”然后走了"],
    "สุนัขวิ่ง แมวนอน": ["สุนัขวิ่ง แมวนอน"],
}
# Texts with many adjacent sentence ends, white space and special tokens.
AWKWARD = [*"ab 。！？．｡.!?…।؟\n\t\u3000一犬”", "</s>", "[SEP]", "[MASK]", "[COR.1]"]
awkward = st.lists(st.sampled_from(AWKWARD)).map("".join)


@lru_cache
def unicode_tokenizer() -> TextTokenizer:
    return TextTokenizer(BERT, 48, 2, sentence_ends="unicode")


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SUB_CAPTIONS)
def test_unicode_splits_at_every_sentence_terminator(text):
    assert split_sub_captions(text, "unicode") == SUB_CAPTIONS[text]


@given(st.text() | awkward)
def test_the_default_rule_is_the_released_one(text):
    released = [part for part in (part.strip() for part in re.split(r"\n|</s>|\.", text)) if part]
    assert split_sub_captions(text) == split_sub_captions(text, "released") == released


@pytest.mark.slow
def test_the_terminators_are_unicodes():
    theirs = Replace(Regex(r"\p{Sentence_Terminal}"), "")
    known = [character for character in map(chr, range(0x110000)) if unicodedata.category(character)[0] != "C"]
    expected = {character for character in known if not theirs.normalize_str(character)}
    assert {character for character in known if len(split_sub_captions(f"a{character}b", "unicode")) == 2} == expected


@given(awkward)
def test_split_undoes_join_and_finds_the_same_words(text):
    parts = split_sub_captions(text, "unicode")
    assert split_sub_captions(join_sub_captions(parts), "unicode") == parts
    assert has_words(text) == any(character.isalnum() for part in parts for character in part)


@pytest.mark.parametrize("value", ["Unicode", "", 1, ["unicode"]])
def test_an_unknown_value_in_a_file_is_an_error_naming_the_file(value):
    with pytest.raises(ValueError, match=r"^index\.json: sentence_ends"):
        as_sentence_ends(value, "index.json")
    assert as_sentence_ends(None, "index.json") == "released"


def test_an_unknown_value_in_params_yaml_is_an_error():
    with pytest.raises(ValueError, match="sentence_ends"):
        CaptionConfig.model_validate({"sentence_ends": "chinese"})


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, MIXED])
def test_sub_captions_are_separated_by_sep(text):
    tokenizer = unicode_tokenizer()
    plain = TextTokenizer(BERT, 48)
    cls, sep = plain.encode([""])[0]
    (ids,) = tokenizer.encode([text])
    parts = [plain.encode([part])[0][1:-1] for part in SUB_CAPTIONS[text]]
    assert ids == [cls, 30522, 30523, *(token for part in parts for token in [*part, sep])]
    assert ids.count(sep) == len(SUB_CAPTIONS[text])
    assert TextTokenizer(BERT, 48, 2).encode([text])[0].count(sep) < len(SUB_CAPTIONS[text])


@given(awkward)
def test_a_caption_and_its_sub_captions_have_the_same_ids(text):
    parts = split_sub_captions(text, "unicode")
    if not any(part in ("[COR.1]", "[SEP]") for part in (text, *parts)):  # unless a text equals a token name
        assert unicode_tokenizer().encode([text]) == unicode_tokenizer().encode([parts])


@pytest.mark.slow
@pytest.mark.parametrize("first", ["released", "unicode"])
@pytest.mark.parametrize("then", ["released", "unicode"])
def test_a_saved_tokenizer_uses_the_rule_given_when_it_is_opened(tmp_path, first, then):
    TextTokenizer(BERT, 48, 1, sentence_ends=first).save(tmp_path)
    reopened = TextTokenizer(str(tmp_path), 48, 2, sentence_ends=then)
    assert reopened.vocabulary_size == 30522
    texts = list(SUB_CAPTIONS)
    assert reopened.encode(texts) == TextTokenizer(BERT, 48, 2, sentence_ends=then).encode(texts)


def test_terminators_are_not_used_tokens():
    assert used_tokens(BERT, ["a dog!"]) > used_tokens(BERT, ["a dog!"], "unicode") == used_tokens(BERT, ["a dog"])


# --- data to model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_world: TinyWorld) -> TinyWorld:
    """The tiny world in Chinese and English, sharded with `unicode`."""

    def with_captions(sample: TinySample) -> TinySample:
        captions = {"llava": split_sub_captions(CHINESE, "unicode"), "gpt": split_sub_captions(MIXED, "unicode")}
        return replace(sample, info={**sample.info, "raw": CHINESE, "captions": captions})

    samples = {key: with_captions(sample) for key, sample in tiny_world.samples.items()}
    shards = write_shards(tmp_path_factory.mktemp("unicode") / "shards", list(samples.values()), 3)
    index = read_json(shards / "index.json")
    (shards / "index.json").write_text(json.dumps({**index, "sentence_ends": "unicode"}))
    return TinyWorld(tiny_world.image_tower, shards, tiny_world.pixel_shards, samples)


@pytest.fixture(scope="module")
def trained_model(
    world: TinyWorld, tmp_path_factory: pytest.TempPathFactory, group: None
) -> tuple[Path, TextTokenizer]:
    """Folder of a trained model, and the tokenizer of its training."""
    from lotlip.pretrain.sink import NullSink
    from lotlip.pretrain.trainer import Trainer

    job = tiny_job(world, tmp_path_factory.mktemp("trained"), {"steps": 2, "text": {"context_length": 48}})
    trainer = Trainer(job, 0, NullSink())
    trainer.train()
    return job.model_folder(0), trainer.tokenizer


@pytest.mark.slow
def test_training_splits_short_captions_by_the_shards_rule(world, trained_model):
    folder, tokenizer = trained_model
    assert tokenizer.sentence_ends == "unicode"
    assert load_model(folder)[0].config.sentence_ends == "unicode"


def test_the_loader_separates_sub_captions_by_sep(world, trained_model):
    from lotlip.pretrain.config import PretrainConfig
    from lotlip.pretrain.loader import BatchSlice, Loader

    _, tokenizer = trained_model
    settings = PretrainConfig.model_validate({"batch_size": 4, "long_texts": {"sub_captions": 2}})
    (batch,) = next(iter(Loader(world.shards, settings, tokenizer, 0, BatchSlice(4), workers=0).steps(0, 1)))
    assert batch.short_ids[0].tolist() == tokenizer.encode([CHINESE])[0]
    assert {row.tolist().count(102) for row in batch.long_ids} == {2}


@pytest.mark.slow
def test_all_interfaces_of_the_model_tokenize_as_in_training(trained_model, tmp_path):
    folder, tokenizer = trained_model
    texts = [CHINESE, JAPANESE, MIXED]
    expected, _ = tokenizer(texts)
    options = {"padding": True, "truncation": True, "return_tensors": "np"}
    assert np.array_equal(AutoTokenizer.from_pretrained(folder)(texts, **options)["input_ids"], expected)
    assert np.array_equal(AutoProcessor.from_pretrained(folder)(text=texts, return_tensors="np")["input_ids"], expected)
    model, loaded = load_model(folder)
    assert np.array_equal(loaded(texts)[0], expected)
    (tmp_path / "texts.txt").write_text("\n".join([CHINESE, JAPANESE]) + "\n", encoding="utf-8")
    embed(folder, tmp_path / "texts.txt", tmp_path / "index.parquet")
    stored = pq.read_table(tmp_path / "index.parquet")["embedding"].to_pylist()
    split = [split_sub_captions(text, "unicode") for text in (CHINESE, JAPANESE)]
    with torch.inference_mode():
        rows = [torch.from_numpy(loaded([parts])[0]) for parts in split]
        features = torch.cat([model.get_text_features(row).pooler_output for row in rows]).numpy()
    np.testing.assert_allclose(np.asarray(stored), features, atol=1e-6)
    np.testing.assert_allclose(Embedder(folder).texts([CHINESE, JAPANESE]), features, atol=1e-6)


@pytest.mark.slow
def test_finetuning_uses_the_rule_of_its_own_shards(trained_model, tiny_world, tmp_path):
    folder, _ = trained_model
    job = tiny_job(tiny_world, tmp_path, {"steps": 2, "text": {"context_length": 48, "pretrained": str(folder)}})
    assert load_model(train(job).model_folder(0))[1].sentence_ends == "released"


def test_shards_with_an_unknown_rule_are_an_error(world, tmp_path, group):
    shards = shutil.copytree(world.shards, tmp_path / "shards")
    index = read_json(shards / "index.json")
    (shards / "index.json").write_text(json.dumps({**index, "sentence_ends": "thai"}))
    with pytest.raises(ValueError, match=r"index\.json is not what its stage writes \(sentence_ends"):
        train(tiny_job(world, tmp_path, shards=str(shards)))


@pytest.fixture
def old_model(tmp_path: Path, tiny_tower: Path) -> Path:
    """A model that was saved before the option existed."""
    folder = save_tiny_model(tmp_path / "old", tiny_tower)
    config = read_json(folder / "config.json")
    del config["sentence_ends"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_a_model_without_the_option_uses_the_released_rule(old_model):
    model, tokenizer = load_model(old_model)
    assert model.config.sentence_ends == tokenizer.sentence_ends == "released"
    texts = list(SUB_CAPTIONS)
    assert tokenizer.encode(texts) == TextTokenizer(BERT, 32, 2).encode(texts)
    assert AutoTokenizer.from_pretrained(old_model)(texts, truncation=True)["input_ids"] == tokenizer.encode(texts)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["unicode", "thai"])
def test_a_configuration_that_contradicts_its_tokenizer_is_an_error(old_model, value):
    config = read_json(old_model / "config.json")
    (old_model / "config.json").write_text(json.dumps({**config, "sentence_ends": value}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(old_model))}.*sentence_ends"):
        load_model(old_model)


# --- stages and commands ----------------------------------------------------------------------------------------------


def test_a_change_makes_only_stages_that_split_texts_stale():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    watching = {
        name
        for name, stage in stages.items()
        if {"caption", "caption.sentence_ends"} & set(map(str, stage.get("do", stage).get("params", [])))
    }
    # Training reads the rule from the index of the shards, and evaluation from the model.
    assert watching == {"caption", "shard"}


def test_shards_of_captions_with_another_rule_are_an_error(tmp_path):
    from flows.runtime.scratch import StageFailed
    from flows.stages.shard import check_sentence_ends
    from lotlip.data.index import CaptionIndex, write_index

    write_index(tmp_path, [], CaptionIndex)
    check_sentence_ends("llava", tmp_path, "released")
    with pytest.raises(StageFailed, match=r"caption\.sentence_ends.*flows caption llava"):
        check_sentence_ends("llava", tmp_path, "unicode")
    write_index(tmp_path, [], CaptionIndex, sentence_ends="unicode")
    check_sentence_ends("llava", tmp_path, "unicode")


def test_statistics_count_sub_captions_by_the_rule():
    texts = [CHINESE, MIXED]
    assert text_statistics(texts, BERT).sub_captions == 1 + 2
    assert text_statistics(texts, BERT, "unicode").sub_captions == 3 + 6
    assert text_statistics(texts, BERT, "unicode").tokens == text_statistics(texts, BERT).tokens


@pytest.mark.parametrize(("option", "expected"), [([], 1.0), (["--sentence-ends", "unicode"], 3.0)])
def test_stats_takes_the_option(tmp_path, monkeypatch, capsys, option, expected):
    (tmp_path / "captions.txt").write_text(CHINESE + "\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["lotlip", "stats", str(tmp_path / "captions.txt"), "--json", *option])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["sub_captions_per_text"] == expected
