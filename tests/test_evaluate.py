"""Benchmarks and scores: known scores, and errors where scores would not be comparable."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lotlip.core.paths import Paths
from lotlip.data.partitions import write_captions
from lotlip.data.records import Caption, ImageRecord, Unit
from lotlip.data.tokenizer import TextTokenizer, used_tokens
from lotlip.demo.questions import SHAPES, label, long_text, short_text
from lotlip.demo.world import generate_scene
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, Prompts, open_benchmark
from lotlip.evaluate.config import HeldOutBenchmarkConfig, SceneBenchmarkConfig
from lotlip.evaluate.encoders import CachedTextEncoder, LotlipEncoder, Runner
from lotlip.evaluate.evaluate import chances, encoded_images, evaluate, image_features, unseen_share
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.initialisation import build_for_pretraining
from lotlip.pretrain.model import LotlipForPreTraining
from tests.conftest import TEXT, TinySample
from tests.partitions import write_partition

TOKENIZER = TextTokenizer("bert-base-uncased", 32)
BERT = "bert-base-uncased"
WORDS = ("red", "green", "blue", "white")


class WordModel(nn.Module):
    """The feature of a text is the mean over its known words."""

    config = LotlipConfig(TEXT)

    def encode_text(self, input_ids: Tensor, lengths: Tensor, cls_only: bool = False) -> Tensor:
        known = torch.tensor([TOKENIZER.encode([word])[0][1] for word in WORDS])
        return (input_ids[:, :, None] == known).sum(dim=1, keepdim=True).float()


class WordByWordModel(nn.Module):
    """The feature of a token identifies its word."""

    config = LotlipConfig(TEXT, similarity="late-interaction")

    def encode_text_tokens(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.tensor([TOKENIZER.encode([word])[0][1] for word in WORDS])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return (input_ids[:, :, None] == known).float(), mask


def word_model() -> LotlipModel:
    return WordModel()  # type: ignore[return-value]


def benchmark(retrieval: dict[str, ImageTexts], prompts: Prompts | None = None, images: int = 4) -> Benchmark:
    return Benchmark("toy", [str(number) for number in range(images)], lambda _: b"", retrieval, prompts)


def score_of(model: LotlipModel, bench: Benchmark, images: Tensor, batch_size: int) -> Mapping[str, float]:
    return evaluate(LotlipEncoder(model, TOKENIZER, batch_size), bench, images).values


# --- scores -------------------------------------------------------------------------------------------------------


def test_a_perfect_model_scores_one():
    bench = benchmark(
        {"short": ImageTexts([f"a {word} thing" for word in WORDS], [0, 1, 2, 3])},
        Prompts([[f"the {word} one", f"all {word}"] for word in WORDS], [0, 1, 2, 3]),
    )
    scores = score_of(word_model(), bench, torch.eye(4), 3)
    assert scores["short.image_to_text.r1"] == scores["short.text_to_image.r1"] == 1
    assert scores["short.text_to_image.median_rank"] == 1
    assert scores["classification.top1"] == scores["classification.top5"] == 1
    assert set(chances(bench)) <= set(scores)


def test_late_interaction_matches_words_and_patches():
    """Each image has one patch of its colour and one empty patch."""
    patches = torch.stack([torch.eye(4), torch.zeros(4, 4)], dim=1)  # [I, P, D]
    bench = benchmark(
        {"short": ImageTexts(["red", "a very big green thing", "the blue one", "white"], [0, 1, 2, 3])},
        Prompts([["red", "all red", "it is red"], ["green"], ["blue"], ["white"]], [0, 1, 2, 3]),
    )
    model: LotlipModel = WordByWordModel()  # type: ignore[assignment]
    scores = score_of(model, bench, patches, 3)
    assert scores["short.image_to_text.r1"] == scores["short.text_to_image.r1"] == 1
    assert scores["classification.top1"] == 1
    shifted = score_of(model, bench, patches.roll(1, dims=0), 3)
    assert shifted["short.text_to_image.r1"] == shifted["classification.top1"] == 0


def test_each_mistake_lowers_the_scores():
    """Two of four texts are swapped, and so are the labels of classes 0 and 1."""
    bench = benchmark(
        {"short": ImageTexts(["red", "green", "white", "blue"], [0, 1, 2, 3])},
        Prompts([["red"], ["green"], ["blue"], ["white"]], [1, 0, 2, 3]),
    )
    scores = score_of(word_model(), bench, torch.eye(4), 10)
    assert scores["short.text_to_image.r1"] == 0.5
    assert scores["short.text_to_image.r5"] == 1
    assert scores["classification.top1"] == 0.5


def test_texts_belong_to_the_images_of_their_indices():
    bench = benchmark({"short": ImageTexts(["blue", "red", "white", "green"], [2, 0, 3, 1])})
    scores = score_of(word_model(), bench, torch.eye(4), 10)
    assert scores["short.image_to_text.r1"] == scores["short.text_to_image.r1"] == 1


def test_images_without_a_long_text_count_for_short_texts_only():
    bench = benchmark({"short": ImageTexts(list(WORDS), [0, 1, 2, 3]), "long": ImageTexts(["white", "green"], [3, 1])})
    scores = score_of(word_model(), bench, torch.eye(4), 10)
    assert scores["long.image_to_text.r1"] == scores["long.text_to_image.r1"] == 1
    chance = chances(bench)
    assert chance["short.text_to_image.r1"] == pytest.approx(1 / 4)
    assert chance["long.text_to_image.r1"] == pytest.approx(1 / 2)
    assert chance["long.image_to_text.r1"] == pytest.approx(1 / 2)


def test_constant_features_score_chance():
    bench = benchmark({"short": ImageTexts(["a"] * 40, list(range(40)))}, Prompts([["a"]] * 8, [0] * 40), images=40)
    assert chances(bench) == pytest.approx(
        {f"short.{direction}.r{k}": k / 40 for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        | {"classification.top1": 1 / 8, "classification.top5": 5 / 8}
    )
    scores = score_of(word_model(), bench, torch.ones(40, 4), 40)
    # the model does not know the word "a", so all features are equal
    assert scores["classification.top1"] == pytest.approx(1 / 8)
    assert scores["short.text_to_image.r5"] == pytest.approx(5 / 40)


def test_chance_with_several_texts_per_image():
    bench = benchmark({"short": ImageTexts(["a"] * 20, [image for image in range(4) for _ in range(5)])})
    chance = chances(bench)
    assert chance["short.image_to_text.r1"] == chance["short.text_to_image.r1"] == pytest.approx(1 / 4)
    assert chance["short.image_to_text.r5"] == pytest.approx(1 - math.comb(15, 5) / math.comb(20, 5))
    assert chance["short.text_to_image.r5"] == 1
    scores = score_of(word_model(), bench, torch.ones(4, 4), 20)
    assert {name: scores[name] for name in chance} == pytest.approx(chance)


def test_top5_chance_is_one_with_fewer_than_five_classes():
    assert chances(benchmark({}, Prompts([["a"], ["b"]], [0, 1])))["classification.top5"] == 1


def test_unseen_share_counts_word_pieces_of_texts_and_prompts():
    bench = benchmark(
        {"short": ImageTexts(["red green", "red"], [0, 1])}, Prompts([["blue"], ["white"]], [0, 1]), images=2
    )
    assert unseen_share(bench, BERT, sorted(used_tokens(BERT, ["red green blue white"]))) == 0
    assert unseen_share(bench, BERT, sorted(used_tokens(BERT, ["red green blue"]))) == pytest.approx(1 / 4)
    assert unseen_share(bench, BERT, []) == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_features_of_texts_do_not_depend_on_the_batch(tiny_tower, batch_size):
    torch.manual_seed(0)
    settings = {"text": {"config": TEXT, "context_length": 32, "corner_tokens": 1}}
    model = build_for_pretraining(PretrainConfig.model_validate(settings), tiny_tower).eval()
    tokenizer = TextTokenizer(BERT, 32, 1)
    texts = ["red", "a very long text. about a red house. and a dog", "", "green tree", "blue"]
    expected, mask = LotlipEncoder(model, tokenizer, 100).texts(texts)
    assert expected.shape == (5, 32)
    assert mask is None
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(LotlipEncoder(model, tokenizer, batch_size).texts(texts)[0], expected, atol=1e-5, rtol=0)
    assert not expected.requires_grad
    model.config.similarity = "late-interaction"
    tokens, mask = LotlipEncoder(model, tokenizer, 100).texts(texts)
    assert tokens.shape[:2] == mask.shape
    assert mask.sum(dim=1).tolist() == tokenizer(texts)[1].tolist()
    batched, same_mask = LotlipEncoder(model, tokenizer, batch_size).texts(texts)
    torch.testing.assert_close(batched, tokens, atol=1e-5, rtol=0)
    assert torch.equal(same_mask, mask)


@pytest.mark.slow
def test_encoders_that_share_token_ids_tokenize_a_text_once(tiny_tower):
    tokenized: list[str] = []

    class CountingTokenizer(TextTokenizer):
        def __call__(self, texts, pad_to=None):
            tokenized.extend(texts)
            return super().__call__(texts, pad_to)

    texts = ["a red dog", "a dog", "there is a white house on the red and blue house"]
    token_ids: dict[str, np.ndarray] = {}
    first, second = with_image_tower(tiny_tower), with_image_tower(tiny_tower)
    for model, asked in ((first, texts[:2]), (second, texts), (first, [*texts, texts[0]])):
        features, _ = LotlipEncoder(model, CountingTokenizer(BERT, 32), 2, token_ids=token_ids).texts(asked)
        expected, _ = LotlipEncoder(model, TOKENIZER, 2).texts(asked)
        torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    assert tokenized == texts


def with_image_tower(tiny_tower: Path) -> LotlipForPreTraining:
    """A model with its image tower."""
    settings = {"text": {"config": TEXT, "context_length": 32}, "image_tower": {"frozen": False}}
    return build_for_pretraining(PretrainConfig.model_validate(settings), tiny_tower).eval()


# --- benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Five tiny images of the split `test` in two partitions, and two captioners that each lack images."""

    paths: Paths
    samples: list[TinySample]


@pytest.fixture
def held_out(tmp_path: Path, tiny_samples: list[TinySample]) -> HeldOut:
    paths = Paths(ingest=tmp_path / "ingest", captions=tmp_path / "captions")
    samples = tiny_samples[:5]
    for number, part in enumerate((samples[:3], samples[3:])):
        unit = Unit("test", number, tuple(sample.key for sample in part))
        write_partition(unit, [record(sample) for sample in part], paths.ingest)
        captions = [caption(sample, "llava", 10) for sample in part if sample is not samples[0]]
        write_captions(unit.name, captions, len(captions), tmp_path / "captions/llava")
        write_captions(unit.name, [caption(part[-1], "gpt", 25)], 1, tmp_path / "captions/gpt")
    return HeldOut(paths, samples)


def record(sample: TinySample, scene: dict | None = None) -> ImageRecord:
    sha256 = hashlib.sha256(sample.image).hexdigest()
    return ImageRecord(sample.key, sample.image, "png", sample.info["raw"], 16, 16, sha256, scene)


def caption(sample: TinySample, captioner: str, tokens: int) -> Caption:
    text = f"{captioner} on {sample.key}"
    return Caption(sample.key, captioner, text, [text], tokens, "stop", "r", "")


def test_held_out_images_have_their_captions(held_out):
    bench = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held_out.paths, ["llava", "gpt"])
    assert list(encoded_images(bench)) == [sample.image for sample in held_out.samples]
    assert bench.retrieval["short"] == ImageTexts([sample.info["raw"] for sample in held_out.samples], [0, 1, 2, 3, 4])
    keys = [sample.key for sample in held_out.samples]
    # the longest caption of each image; the first image has none
    expected = [f"llava on {keys[1]}", f"gpt on {keys[2]}", f"llava on {keys[3]}", f"gpt on {keys[4]}"]
    assert bench.retrieval["long"] == ImageTexts(expected, [1, 2, 3, 4])
    assert bench.prompts is None and bench.max_unseen_tokens is None


def test_long_texts_can_be_windows_as_in_training(tmp_path, tiny_samples):
    paths = Paths(ingest=tmp_path / "ingest", captions=tmp_path / "captions")
    samples = tiny_samples[:6]
    unit = Unit("test", 0, tuple(sample.key for sample in samples))
    write_partition(unit, [record(sample) for sample in samples], paths.ingest)
    for name, parts in {"llava": ["a", "b", "c", "d"], "gpt": ["e", "f"]}.items():
        described = [replace(caption(sample, name, 5), sub_captions=parts) for sample in samples]
        write_captions(unit.name, described, len(described), paths.captions / name)

    def open_with(**settings):
        config = HeldOutBenchmarkConfig(kind="held-out", sub_captions=2, **settings)
        return open_benchmark("mine", config, paths, ["llava", "gpt"])

    bench = open_with()
    texts = bench.retrieval["long"].texts
    assert set(texts) <= {"a. b.", "b. c.", "c. d.", "e. f."} and len(set(texts)) > 1
    assert open_with().retrieval == bench.retrieval
    first = open_with(size=4)
    assert len(first.images) == 4 and first.retrieval["long"].texts == texts[:4]
    assert first.retrieval["short"].texts == bench.retrieval["short"].texts[:4]
    assert len(list(encoded_images(first))) == 4
    message = r"the split 'test' has 6 images, but evaluate\.benchmarks\.mine\.size is 7; lower it, or raise"
    with pytest.raises(ValueError, match=message):
        open_with(size=7)


@pytest.mark.parametrize("sub_captions", [None, 1])
def test_the_order_of_captioners_does_not_matter(held_out, sub_captions):
    settings = HeldOutBenchmarkConfig(kind="held-out", sub_captions=sub_captions)
    first = open_benchmark("mine", settings, held_out.paths, ["llava", "gpt"])
    assert open_benchmark("mine", settings, held_out.paths, ["gpt", "llava"]).retrieval == first.retrieval


def test_a_benchmarks_version_depends_on_its_texts(held_out):
    settings = HeldOutBenchmarkConfig(kind="held-out")
    versions = [
        open_benchmark("mine", settings, held_out.paths, names).about["version"] for names in (["llava"], ["gpt"])
    ]
    renamed = open_benchmark("yours", settings, held_out.paths, ["llava"]).about["version"]
    assert renamed == versions[0] != versions[1]


def test_a_benchmark_without_captioners_has_short_texts_only(held_out):
    bench = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held_out.paths, [])
    assert list(bench.retrieval) == ["short"]


def test_windows_need_captions(held_out):
    settings = HeldOutBenchmarkConfig(kind="held-out", sub_captions=3)
    message = r"no captioner has described .* 'test', .*; caption the split, or remove evaluate\.benchmarks\.mine\.sub_"
    with pytest.raises(ValueError, match=message):
        open_benchmark("mine", settings, held_out.paths, [])


def test_an_empty_split_is_an_error(held_out):
    with pytest.raises(ValueError, match="benchmark mine: the split 'val' has no images"):
        open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out", split="val"), held_out.paths, [])


def test_images_that_are_not_scenes_are_an_error(held_out):
    with pytest.raises(ValueError, match="are not generated scenes; use `kind: held-out`"):
        open_benchmark("toy", SceneBenchmarkConfig(kind="scenes", size=5), held_out.paths, [])


@pytest.mark.parametrize("size", [4, 6])
def test_another_size_is_an_error(held_out, size):
    message = rf"has 5 scenes, but evaluate\.benchmarks\.toy\.size is {size}; scores of different sizes are not"
    with pytest.raises(ValueError, match=message):
        open_benchmark("toy", SceneBenchmarkConfig(kind="scenes", size=size), held_out.paths, [])


def test_scenes_have_texts_and_prompts(tmp_path, tiny_samples):
    scenes = [generate_scene(0, "test", number) for number in range(3)]
    records = [record(sample, scene.to_json()) for sample, scene in zip(tiny_samples, scenes, strict=False)]
    paths = Paths(ingest=tmp_path)
    write_partition(Unit("test", 0, tuple(item.key for item in records)), records, tmp_path)
    bench = open_benchmark("scenes", SceneBenchmarkConfig(kind="scenes", size=3, max_unseen_tokens=0.5), paths, [])
    assert bench.retrieval["long"] == ImageTexts([long_text(scene) for scene in scenes], [0, 1, 2])
    assert bench.retrieval["short"] == ImageTexts([short_text(scene) for scene in scenes], [0, 1, 2])
    assert bench.prompts is not None
    assert len(bench.prompts.classes) == len(SHAPES)
    assert bench.prompts.labels == [label(scene) for scene in scenes]
    assert bench.max_unseen_tokens == 0.5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_features_of_images_do_not_depend_on_the_batch(held_out, tiny_tower, batch_size):
    bench = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held_out.paths, [])
    model = with_image_tower(tiny_tower)
    features = LotlipEncoder(model, TOKENIZER, batch_size).images(encoded_images(bench))
    expected = torch.stack([torch.from_numpy(sample.feature) for sample in held_out.samples])
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)
    model.config.similarity = "late-interaction"
    patches = LotlipEncoder(model, TOKENIZER, batch_size).images(encoded_images(bench))
    assert patches.shape == (5, 16, 32)
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(5, 16))


def test_an_unreadable_image_is_an_error_naming_it(held_out, tiny_tower):
    bench = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held_out.paths, [])
    broken = replace(bench, read=lambda number: b"wrong" if number == 3 else bench.read(number))
    with pytest.raises(ValueError, match=f"benchmark mine: image {bench.images[3]}: not a readable image"):
        image_features(LotlipEncoder(with_image_tower(tiny_tower), TOKENIZER, 2), broken)


@pytest.mark.parametrize("similarity", ["cosine", "late-interaction"])
def test_the_cached_encoder_encodes_each_text_once(tiny_tower, similarity):
    model = with_image_tower(tiny_tower)
    model.config.similarity = similarity
    encoded = []
    plain = LotlipEncoder(model, TOKENIZER, Runner(2, on_batch=encoded.append))
    cached = CachedTextEncoder(LotlipEncoder(model, TOKENIZER, Runner(2, on_batch=encoded.append)))
    first, second = ["red", "a red dog", "red"], ["a cat", "a red dog"]
    for texts in (first, second):
        (features, mask), (expected, expected_mask) = cached.texts(texts), plain.texts(texts)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
        assert (mask is None) == (expected_mask is None)
        assert mask is None or torch.equal(mask, expected_mask)
    assert sum(encoded) == 3 + len(first) + len(second)
