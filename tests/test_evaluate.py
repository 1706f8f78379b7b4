"""Benchmarks and scores: known right answers, and what makes scores incomparable is an error."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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
    """Stands for a model that understands: a text's feature is the mean of those of its words that it knows."""

    config = LotlipConfig(TEXT)

    def encode_text(self, input_ids: Tensor, lengths: Tensor, cls_only: bool = False) -> Tensor:
        known = torch.tensor([TOKENIZER.encode([word])[0][1] for word in WORDS])
        return (input_ids[:, :, None] == known).sum(dim=1, keepdim=True).float()


class WordByWordModel(nn.Module):
    """The same token by token: a token's feature says which word it is."""

    config = LotlipConfig(TEXT, similarity="late-interaction")

    def encode_text_tokens(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.tensor([TOKENIZER.encode([word])[0][1] for word in WORDS])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return (input_ids[:, :, None] == known).float(), mask


def understanding() -> LotlipModel:
    return WordModel()  # type: ignore[return-value]


def benchmark(retrieval: dict[str, ImageTexts], prompts: Prompts | None = None, images: int = 4) -> Benchmark:
    return Benchmark("toy", [str(number) for number in range(images)], lambda _: b"", retrieval, prompts)


def scored(model: LotlipModel, asked: Benchmark, images: Tensor, batch_size: int) -> Mapping[str, float]:
    return evaluate(LotlipEncoder(model, TOKENIZER, batch_size), asked, images).values


# --- scores -------------------------------------------------------------------------------------------------------


def test_a_model_that_understands_is_always_right():
    asked = benchmark(
        {"short": ImageTexts([f"a {word} thing" for word in WORDS], [0, 1, 2, 3])},
        Prompts([[f"the {word} one", f"all {word}"] for word in WORDS], [0, 1, 2, 3]),
    )
    scores = scored(understanding(), asked, torch.eye(4), 3)
    assert scores["short.image_to_text.r1"] == scores["short.text_to_image.r1"] == 1
    assert scores["short.text_to_image.median_rank"] == 1
    assert scores["classification.top1"] == scores["classification.top5"] == 1
    assert set(chances(asked)) <= set(scores)


def test_late_interaction_finds_what_its_patches_show():
    """Each picture has one patch of its colour and one of nothing, whatever else the texts say."""
    patches = torch.stack([torch.eye(4), torch.zeros(4, 4)], dim=1)  # [I, P, D]
    asked = benchmark(
        {"short": ImageTexts(["red", "a very big green thing", "the blue one", "white"], [0, 1, 2, 3])},
        Prompts([["red", "all red", "it is red"], ["green"], ["blue"], ["white"]], [0, 1, 2, 3]),
    )
    model: LotlipModel = WordByWordModel()  # type: ignore[assignment]
    scores = scored(model, asked, patches, 3)
    assert scores["short.image_to_text.r1"] == scores["short.text_to_image.r1"] == 1
    assert scores["classification.top1"] == 1
    wrong = scored(model, asked, patches.roll(1, dims=0), 3)
    assert wrong["short.text_to_image.r1"] == wrong["classification.top1"] == 0


def test_each_mistake_counts():
    """Two of four texts name the other's image; the labels of classes 0 and 1 are exchanged."""
    asked = benchmark(
        {"short": ImageTexts(["red", "green", "white", "blue"], [0, 1, 2, 3])},
        Prompts([["red"], ["green"], ["blue"], ["white"]], [1, 0, 2, 3]),
    )
    scores = scored(understanding(), asked, torch.eye(4), 10)
    assert scores["short.text_to_image.r1"] == 0.5
    assert scores["short.text_to_image.r5"] == 1
    assert scores["classification.top1"] == 0.5


def test_texts_belong_to_the_images_that_they_name():
    asked = benchmark({"short": ImageTexts(["blue", "red", "white", "green"], [2, 0, 3, 1])})
    scores = scored(understanding(), asked, torch.eye(4), 10)
    assert scores["short.image_to_text.r1"] == scores["short.text_to_image.r1"] == 1


def test_images_without_a_long_text_are_left_out_of_the_long_texts_only():
    asked = benchmark({"short": ImageTexts(list(WORDS), [0, 1, 2, 3]), "long": ImageTexts(["white", "green"], [3, 1])})
    scores = scored(understanding(), asked, torch.eye(4), 10)
    assert scores["long.image_to_text.r1"] == scores["long.text_to_image.r1"] == 1
    chance = chances(asked)
    assert chance["short.text_to_image.r1"] == pytest.approx(1 / 4)
    assert chance["long.text_to_image.r1"] == pytest.approx(1 / 2)
    assert chance["long.image_to_text.r1"] == pytest.approx(1 / 2)


def test_chances_are_those_of_guessing():
    asked = benchmark({"short": ImageTexts(["a"] * 40, list(range(40)))}, Prompts([["a"]] * 8, [0] * 40), images=40)
    assert chances(asked) == pytest.approx(
        {f"short.{way}.r{k}": k / 40 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        | {"classification.top1": 1 / 8, "classification.top5": 5 / 8}
    )
    same = scored(understanding(), asked, torch.ones(40, 4), 40)
    # features that are all the same are guesses: "a" is no word that the model knows, each gets nothing
    assert same["classification.top1"] == pytest.approx(1 / 8)
    assert same["short.text_to_image.r5"] == pytest.approx(5 / 40)


def test_guessing_finds_one_of_several_texts_more_often_than_their_image():
    asked = benchmark({"short": ImageTexts(["a"] * 20, [image for image in range(4) for _ in range(5)])})
    chance = chances(asked)
    assert chance["short.image_to_text.r1"] == chance["short.text_to_image.r1"] == pytest.approx(1 / 4)
    assert chance["short.image_to_text.r5"] == pytest.approx(1 - math.comb(15, 5) / math.comb(20, 5))
    assert chance["short.text_to_image.r5"] == 1
    same = scored(understanding(), asked, torch.ones(4, 4), 20)
    assert {name: same[name] for name in chance} == pytest.approx(chance)


def test_few_classes_cannot_be_missed_among_five():
    assert chances(benchmark({}, Prompts([["a"], ["b"]], [0, 1])))["classification.top5"] == 1


def test_the_unseen_share_counts_pieces_of_all_texts_and_prompts():
    asked = benchmark(
        {"short": ImageTexts(["red green", "red"], [0, 1])}, Prompts([["blue"], ["white"]], [0, 1]), images=2
    )
    assert unseen_share(asked, BERT, sorted(used_tokens(BERT, ["red green blue white"]))) == 0
    assert unseen_share(asked, BERT, sorted(used_tokens(BERT, ["red green blue"]))) == pytest.approx(1 / 4)
    assert unseen_share(asked, BERT, []) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_features_of_texts_do_not_depend_on_the_batch(tiny_tower, batch_size):
    torch.manual_seed(0)
    settings = {"text": {"config": TEXT, "context_length": 32, "corner_tokens": 1}}
    model = build_for_pretraining(PretrainConfig.model_validate(settings), tiny_tower).eval()
    tokenizer = TextTokenizer(BERT, 32, 1)
    texts = ["red", "a very long text. about a red house. and a dog", "", "green tree", "blue"]
    whole, mask = LotlipEncoder(model, tokenizer, 100).texts(texts)
    assert whole.shape == (5, 32)
    assert mask is None
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(LotlipEncoder(model, tokenizer, batch_size).texts(texts)[0], whole, atol=1e-5, rtol=0)
    assert not whole.requires_grad
    model.config.similarity = "late-interaction"
    tokens, mask = LotlipEncoder(model, tokenizer, 100).texts(texts)
    assert tokens.shape[:2] == mask.shape
    assert mask.sum(dim=1).tolist() == tokenizer(texts)[1].tolist()
    again, same_mask = LotlipEncoder(model, tokenizer, batch_size).texts(texts)
    torch.testing.assert_close(again, tokens, atol=1e-5, rtol=0)
    assert torch.equal(same_mask, mask)


def with_pictures(tiny_tower: Path) -> LotlipForPreTraining:
    """A model with its image tower."""
    settings = {"text": {"config": TEXT, "context_length": 32}, "image_tower": {"frozen": False}}
    return build_for_pretraining(PretrainConfig.model_validate(settings), tiny_tower).eval()


# --- benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Five tiny images of the split `test` in two partitions; two captioners, neither of which has seen all."""

    paths: Paths
    samples: list[TinySample]


@pytest.fixture
def held(tmp_path: Path, tiny_samples: list[TinySample]) -> Held:
    paths = Paths(ingest=tmp_path / "ingest", captions=tmp_path / "captions")
    samples = tiny_samples[:5]
    for number, part in enumerate((samples[:3], samples[3:])):
        unit = Unit("test", number, tuple(sample.key for sample in part))
        write_partition(unit, [record(sample) for sample in part], paths.ingest)
        described = [caption(sample, "llava", 10) for sample in part if sample is not samples[0]]
        write_captions(unit.name, described, len(described), tmp_path / "captions/llava")
        write_captions(unit.name, [caption(part[-1], "gpt", 25)], 1, tmp_path / "captions/gpt")
    return Held(paths, samples)


def record(sample: TinySample, scene: dict | None = None) -> ImageRecord:
    sha256 = hashlib.sha256(sample.image).hexdigest()
    return ImageRecord(sample.key, sample.image, "png", sample.info["raw"], 16, 16, sha256, scene)


def caption(sample: TinySample, captioner: str, tokens: int) -> Caption:
    text = f"{captioner} on {sample.key}"
    return Caption(sample.key, captioner, text, [text], tokens, "stop", "r", "")


def test_held_out_images_come_with_their_captions(held):
    asked = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held.paths, ["llava", "gpt"])
    assert list(encoded_images(asked)) == [sample.image for sample in held.samples]
    assert asked.retrieval["short"] == ImageTexts([sample.info["raw"] for sample in held.samples], [0, 1, 2, 3, 4])
    keys = [sample.key for sample in held.samples]
    # the longest of each image's; the first image has none
    expected = [f"llava on {keys[1]}", f"gpt on {keys[2]}", f"llava on {keys[3]}", f"gpt on {keys[4]}"]
    assert asked.retrieval["long"] == ImageTexts(expected, [1, 2, 3, 4])
    assert asked.prompts is None and asked.max_unseen_tokens is None


def test_the_order_of_captioners_does_not_matter(held):
    settings = HeldOutBenchmarkConfig(kind="held-out")
    first = open_benchmark("mine", settings, held.paths, ["llava", "gpt"])
    assert open_benchmark("mine", settings, held.paths, ["gpt", "llava"]).retrieval == first.retrieval


def test_a_benchmarks_version_tells_what_is_asked(held):
    settings = HeldOutBenchmarkConfig(kind="held-out")
    versions = [open_benchmark("mine", settings, held.paths, names).about["version"] for names in (["llava"], ["gpt"])]
    again = open_benchmark("yours", settings, held.paths, ["llava"]).about["version"]
    assert again == versions[0] != versions[1]


def test_without_long_captions_there_are_short_texts_only(held):
    asked = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held.paths, [])
    assert list(asked.retrieval) == ["short"]


def test_an_empty_split_is_an_error(held):
    with pytest.raises(ValueError, match="benchmark mine: the split 'val' has no images"):
        open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out", split="val"), held.paths, [])


def test_pictures_that_are_no_scenes_are_an_error(held):
    with pytest.raises(ValueError, match="are not generated scenes; use `kind: held-out`"):
        open_benchmark("toy", SceneBenchmarkConfig(kind="scenes", size=5), held.paths, [])


@pytest.mark.parametrize("size", [4, 6])
def test_another_size_is_an_error(held, size):
    message = rf"has 5 scenes, but evaluate\.benchmarks\.toy\.size is {size}; scores of different sizes are not"
    with pytest.raises(ValueError, match=message):
        open_benchmark("toy", SceneBenchmarkConfig(kind="scenes", size=size), held.paths, [])


def test_scenes_come_with_texts_and_prompts(tmp_path, tiny_samples):
    scenes = [generate_scene(0, "test", number) for number in range(3)]
    records = [record(sample, scene.to_json()) for sample, scene in zip(tiny_samples, scenes, strict=False)]
    paths = Paths(ingest=tmp_path)
    write_partition(Unit("test", 0, tuple(item.key for item in records)), records, tmp_path)
    asked = open_benchmark("scenes", SceneBenchmarkConfig(kind="scenes", size=3, max_unseen_tokens=0.5), paths, [])
    assert asked.retrieval["long"] == ImageTexts([long_text(scene) for scene in scenes], [0, 1, 2])
    assert asked.retrieval["short"] == ImageTexts([short_text(scene) for scene in scenes], [0, 1, 2])
    assert asked.prompts is not None
    assert len(asked.prompts.classes) == len(SHAPES)
    assert asked.prompts.labels == [label(scene) for scene in scenes]
    assert asked.max_unseen_tokens == 0.5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_features_of_images_do_not_depend_on_the_batch(held, tiny_tower, batch_size):
    asked = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held.paths, [])
    model = with_pictures(tiny_tower)
    features = LotlipEncoder(model, TOKENIZER, batch_size).images(encoded_images(asked))
    expected = torch.stack([torch.from_numpy(sample.feature) for sample in held.samples])
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)
    model.config.similarity = "late-interaction"
    patches = LotlipEncoder(model, TOKENIZER, batch_size).images(encoded_images(asked))
    assert patches.shape == (5, 16, 32)
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(5, 16))


def test_an_image_that_cannot_be_decoded_is_named(held, tiny_tower):
    asked = open_benchmark("mine", HeldOutBenchmarkConfig(kind="held-out"), held.paths, [])
    spoilt = replace(asked, read=lambda number: b"wrong" if number == 3 else asked.read(number))
    with pytest.raises(ValueError, match=f"benchmark mine: image {asked.images[3]}: not a readable image"):
        image_features(LotlipEncoder(with_pictures(tiny_tower), TOKENIZER, 2), spoilt)


@pytest.mark.parametrize("similarity", ["cosine", "late-interaction"])
def test_a_text_is_encoded_once_however_often_it_is_asked_for(tiny_tower, similarity):
    model = with_pictures(tiny_tower)
    model.config.similarity = similarity
    encoded = []
    plain = LotlipEncoder(model, TOKENIZER, Runner(2, on_batch=encoded.append))
    once = CachedTextEncoder(LotlipEncoder(model, TOKENIZER, Runner(2, on_batch=encoded.append)))
    first, again = ["red", "a red dog", "red"], ["a cat", "a red dog"]
    for asked in (first, again):
        (features, mask), (expected, expected_mask) = once.texts(asked), plain.texts(asked)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
        assert (mask is None) == (expected_mask is None)
        assert mask is None or torch.equal(mask, expected_mask)
    assert sum(encoded) == 3 + len(first) + len(again)
