"""Retrieval with image features that texts pool (FLAIR): scores, candidates, cost limits, and the weights on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.core.section import merge
from lotlip.evaluate.ablation import AblationResults, measure, summary
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts
from lotlip.evaluate.conditioned import (
    PatchFeatures,
    Pooling,
    evaluate_conditioned,
    families,
    load_pooling,
    of_families,
    protocol,
    saved_pooling,
)
from lotlip.evaluate.encoders import LotlipEncoder, Runner
from lotlip.evaluate.evaluate import chances
from lotlip.evaluate.metrics import retrieval_by_pairs
from lotlip.evaluate.score_names import Metric
from lotlip.models.saving import load_model
from lotlip.objectives.conditioned import ConditionedPooling, TextQueries, conditioned_scores
from lotlip.pretrain.records import OBJECTIVE
from tests.conftest import TinySample, TinyWorld
from tests.tiny_model import save_tiny_model
from tests.training import tiny_job, train

WIDTH, HEADS = 8, 2
LOSS = {"conditioned": {"heads": HEADS}}


class GivenTexts:
    """Stands for an encoder: a text is the number of its feature."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def texts(self, texts: list[str]) -> tuple[Tensor, None]:
        return self._features[[int(text) for text in texts]], None


def random_pooling(token_width: int = 6, width: int = WIDTH, heads: int = HEADS) -> ConditionedPooling:
    module = ConditionedPooling(token_width, width, heads)
    for values in module.parameters():
        torch.nn.init.normal_(values)
    return module


@pytest.fixture
def case() -> dict[str, Any]:
    """30 images of which 24 have 2 long texts each, in any order, and all have a short one."""
    torch.manual_seed(0)
    images, patches = normalize(torch.randn(30, WIDTH), dim=-1), torch.randn(30, 5, 6)
    owner = torch.arange(3, 27).repeat_interleave(2)[torch.randperm(48)].tolist()
    short = torch.randperm(30).tolist()
    features = normalize(torch.cat([images[owner], images[short]]) + 0.6 * torch.randn(78, WIDTH), dim=-1)
    retrieval = {
        "long": ImageTexts([str(number) for number in range(48)], owner),
        "short": ImageTexts([str(number) for number in range(48, 78)], short),
    }
    asked = Benchmark("toy", [str(number) for number in range(30)], lambda _: b"", retrieval)
    module = random_pooling()
    with torch.no_grad():
        tokens, weights = module(patches)
        similarity = conditioned_scores(tokens, TextQueries.of(features, weights, HEADS), weights)
    return {
        "arguments": (GivenTexts(features), asked, images),
        "patches": patches,
        "pooling": Pooling(module, HEADS),
        "long": (similarity[3:27, :48], torch.tensor(owner) - 3),
        "short": (similarity[:, 48:], torch.tensor(short)),
    }


def test_conditioned_scores_are_the_retrieval_of_all_pairs(case):
    found = evaluate_conditioned(*case["arguments"], case["patches"].split(7), case["pooling"])
    for kind in ("long", "short"):
        expected = retrieval_by_pairs(*case[kind]).under(f"conditioned-{kind}")
        assert {name: found.values[name] for name in expected.values} == pytest.approx(expected.values)
        assert expected.values.keys() <= found.intervals.keys()
    assert set(found.values) == {m for m in Metric if m.family.startswith(("conditioned-", "reranked-"))}


def test_with_all_as_candidates_nothing_is_lost(case):
    """Neither when all pairs are scored, nor when the pairs of candidates only are."""
    for most_pairs in (10**6, 0):
        found = evaluate_conditioned(*case["arguments"], case["patches"].split(7), case["pooling"], most_pairs, 48)
        for kind in ("long", "short"):
            expected = retrieval_by_pairs(*case[kind]).under(f"reranked-{kind}").values
            assert {name: found.values[name] for name in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_pairs_of_candidates_alone_give_the_same_scores(case):
    """One kind of text has too many pairs, then both have; batches of any size."""
    every = evaluate_conditioned(*case["arguments"], [case["patches"]], case["pooling"], candidates=12).values
    for most_pairs, left in ((24 * 48 - 1, {"conditioned-short"}), (899, set())):
        for batch in (1, 4, 30):
            patches = case["patches"].split(batch)
            found = evaluate_conditioned(*case["arguments"], patches, case["pooling"], most_pairs, 12).values
            assert {name.partition(".")[0] for name in found} == {"reranked-long", "reranked-short", *left}
            assert found == pytest.approx({name: every[name] for name in found})
    assert every["reranked-long.text_to_image.r10"] != every["conditioned-long.text_to_image.r10"]


def test_what_is_scored_is_known_before(case):
    asked = case["arguments"][1]
    pairs = 24 * 48
    assert list(families(asked, pairs)) == ["conditioned-long", "conditioned-short", "reranked-long", "reranked-short"]
    assert list(families(asked, pairs - 1)) == ["conditioned-short", "reranked-long", "reranked-short"]
    assert protocol(asked, pairs) == {"reranked_candidates": 100}
    assert protocol(asked, 0)["not_conditioned"] == (
        "long text has 1,152 pairs and short text has 900 pairs, more than max_conditioned_pairs, 0; only re-ranked"
    )
    chance = of_families(chances(asked), families(asked, pairs - 1))
    assert chance["reranked-long.image_to_text.r1"] == chances(asked)["long.image_to_text.r1"]
    assert len(chance) == 3 * 6


# --- an ablation ------------------------------------------------------------------------------------------------------


def tiny_benchmark(samples: list[TinySample], name: str = "own") -> Benchmark:
    """The pictures with their short caption, and all but the first with a long one."""
    retrieval = {
        "short": ImageTexts([sample.info["raw"] for sample in samples], list(range(len(samples)))),
        "long": ImageTexts(
            [". ".join(sample.info["captions"]["gpt"]) for sample in samples[1:]], list(range(1, len(samples)))
        ),
    }
    return Benchmark(name, [sample.key for sample in samples], lambda number: samples[number].image, retrieval)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory, tiny_tower: Path) -> Path:
    """Two seeds of a model with a pooling of random weights."""
    folder = tmp_path_factory.mktemp("ablation")
    torch.manual_seed(0)
    for seed in (0, 1):
        save_tiny_model(folder / f"seed-{seed}", tiny_tower, seed)
        module = random_pooling(32, 32)
        weights = {f"objective.conditioned.{name}": value for name, value in module.state_dict().items()}
        save_file(weights, folder / f"seed-{seed}" / OBJECTIVE)
    return folder


CONFIG: dict[str, Any] = {
    "seeds": [0, 1],
    "text": {"tokenizer": "bert-base-uncased"},
    "image_tower": {"frozen": True},
    "loss": {"conditioned": None},
}


def measured(folder: Path, samples: list[TinySample], most_pairs: int = 10**6, **changes: Any) -> AblationResults:
    asked = [tiny_benchmark(samples)]
    return measure(folder, CONFIG | changes, asked, [], {}, Runner(4), max_conditioned_pairs=most_pairs)


@pytest.mark.slow
def test_an_ablation_has_the_scores_beside_its_others(ablation, tiny_samples):
    plain, pooled = (measured(ablation, tiny_samples[:12], loss=loss) for loss in ({"conditioned": None}, LOSS))
    own, found = plain.results["own"], pooled.results["own"]
    for seed in (0, 1):
        assert own.seeds[seed].items() <= found.seeds[seed].items()
        assert own.intervals[seed].items() <= found.intervals[seed].items()
        further = found.seeds[seed].keys() - own.seeds[seed].keys()
        assert {Metric(name).family for name in further} == set(families(tiny_benchmark(tiny_samples[:12])))
        assert found.chance.keys() <= found.seeds[seed].keys()
        # 12 images: all of them are candidates
        for name in further:
            assert found.seeds[seed][name.replace("conditioned", "reranked")] == found.seeds[seed][name]
    assert found.seeds[0] != found.seeds[1]
    assert found.chance["conditioned-short.text_to_image.r1"] == pytest.approx(1 / 12)
    assert found.chance["reranked-long.text_to_image.r1"] == pytest.approx(1 / 11)
    assert found.ceiling["reranked-long.text_to_image.r1"] == found.ceiling["long.text_to_image.r1"]
    assert own.protocol.items() < found.protocol.items()
    assert found.protocol["reranked_candidates"] == 100
    assert not [name for name in own.protocol if "condition" in name or "rerank" in name]
    assert summary(pooled.results) == summary(plain.results)
    assert (
        plain.results["own"].model_dump_json() == measured(ablation, tiny_samples[:12]).results["own"].model_dump_json()
    )


@pytest.mark.slow
def test_the_patches_are_those_that_training_pools(ablation, tiny_samples):
    """Of the tower's tokens without normalisation, by the pooling of the same seed."""
    asked = tiny_benchmark(tiny_samples[:12])
    model, tokenizer = load_model(ablation / "seed-1")
    encoder = LotlipEncoder(model, tokenizer, 5)
    pixels = torch.from_numpy(encoder.prepare(tiny_samples[7].image))[None]
    with torch.no_grad():
        patches = model.image_tower.patches(model.image_tower.hidden_states(pixels))
        module = random_pooling(32, 32)
        names = load_file(ablation / "seed-1" / OBJECTIVE).items()
        module.load_state_dict({name.removeprefix("objective.conditioned."): value for name, value in names})
        tokens, weights = module(patches)
        texts = encoder.texts(asked.retrieval["short"].texts)[0]
        expected = conditioned_scores(tokens, TextQueries.of(texts, weights, HEADS), weights)
    batches = list(PatchFeatures(shared=True).of(encoder, asked))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    torch.testing.assert_close(batches[1][2:3], patches, atol=1e-5, rtol=1e-4)
    pooling = load_pooling(ablation / "seed-1", LOSS, model)
    found = pooling.scores(pooling.project(batches[1][2:3]), pooling.queries(texts))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_too_many_pairs_are_ranked_again_only_and_the_protocol_says_so(ablation, tiny_samples):
    every = measured(ablation, tiny_samples[:12], loss=LOSS).results["own"]
    found = measured(ablation, tiny_samples[:12], 143, loss=LOSS).results["own"]
    assert "conditioned-short.text_to_image.r1" not in found.seeds[0]
    assert "conditioned-short.text_to_image.r1" not in found.chance
    assert found.seeds[0] == pytest.approx({name: every.seeds[0][name] for name in found.seeds[0]})
    assert len(every.seeds[0]) - len(found.seeds[0]) == 6
    assert found.protocol["not_conditioned"].startswith("short text has 144 pairs, more than max_conditioned_pairs")


class CountingEncoder:
    """Gives a patch of each picture, and counts the pictures."""

    def __init__(self) -> None:
        self.encoded = 0

    def patches(self, images: Iterator[bytes]) -> Iterator[Tensor]:
        for image in images:
            self.encoded += 1
            yield torch.tensor(list(image), dtype=torch.float32)[None, None]


@pytest.mark.parametrize(("shared", "most_bytes", "encoded"), [(True, 8, 2), (True, 7, 4), (False, 8, 4)])
def test_patches_are_computed_once_for_a_shared_tower(shared, most_bytes, encoded):
    encoder, patches = CountingEncoder(), PatchFeatures(shared, most_bytes)
    asked = Benchmark("toy", ["a", "b"], lambda number: bytes([number]), {})
    for _ in range(2):
        found = [batch.item() for batch in patches.of(encoder, asked)]  # type: ignore[arg-type]
        assert found == [0, 1]
    assert encoder.encoded == encoded


# --- the weights on disk ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_that_do_not_fit_are_an_error_that_names_the_file(ablation, tiny_tower, tmp_path):
    model, _ = load_model(ablation / "seed-0")
    whole = load_file(ablation / "seed-0" / OBJECTIVE)
    file = tmp_path / OBJECTIVE

    def message(weights: dict[str, Tensor], loss: dict[str, Any] = LOSS) -> str:
        save_file(weights, file)
        with pytest.raises(ValueError) as error:
            load_pooling(tmp_path, loss, model)
        assert str(file) in str(error.value)
        return str(error.value)

    with pytest.raises(ValueError, match=f"{file} is missing; .*run the stage that writes it"):
        load_pooling(tmp_path, LOSS, model)
    output = "objective.conditioned.output"
    missing = {name: value for name, value in whole.items() if name != output}
    assert f"1 of 8 weights ({output}: model (32, 32), file None); restore the files of one model, or" in message(
        missing
    )
    assert "(objective.conditioned.other: model None, file (2,))" in message(
        whole | {"objective.conditioned.other": torch.ones(2)}
    )
    bare = {name.removeprefix("objective.conditioned."): value for name, value in whole.items()}
    assert "16 of 8 weights" in message(bare)
    masks = {"objective.masks.query": torch.ones(2)}
    assert "objective.masks.query: model None" in message(whole | masks)
    assert f"({output}: model (32, 32), file (16, 32))" in message(whole | {output: torch.ones(16, 32)})
    assert "have NaN or infinity, first objective.conditioned.output; restore" in message(
        whole | {output: torch.full((32, 32), torch.nan)}
    )
    assert "heads is 3, which does not divide" in _error(tmp_path, {"conditioned": {"heads": 3}}, model)
    file.write_bytes(b"\x80\x02")
    assert "is a torch checkpoint, not a safetensors file" in _error(tmp_path, LOSS, model)
    save_file(whole | masks, file)
    assert load_pooling(tmp_path, LOSS | {"masks": {}}, model)


def _error(folder: Path, loss: dict[str, Any], model: Any) -> str:
    with pytest.raises(ValueError) as error:
        load_pooling(folder, loss, model)
    return str(error.value)


# --- training and evaluation ------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("tower", [{"frozen": True}, {"frozen": False, "learning_rate": 1e-4}])
def test_what_training_pools_finds_images_in_evaluation(
    group, tiny_world: TinyWorld, tmp_path: Path, tiny_samples: list[TinySample], tower: dict[str, Any]
) -> None:
    learning = {
        "seeds": [1],
        "steps": 150,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5, "weight_decay": 0.0},
    }
    flair = {
        "loss": {"objective": "siglip", "conditioned": {"heads": 4}, "short_loss_fraction": 0},
        "text": {"corner_tokens": 0},
        "long_texts": {"per_image": 3},
        "image_tower": tower,
    }
    job = train(tiny_job(tiny_world, tmp_path, merge(learning, flair)), seeds=[1])
    asked = [tiny_benchmark(tiny_samples)]
    config = job.config.model_dump(mode="json")
    found = measure(job.out, config, asked, [], {}, Runner(16)).results["own"]
    for family in ("conditioned-long", "reranked-long"):
        for way in ("image_to_text", "text_to_image"):
            assert found.seeds[1][f"{family}.{way}.r5"] > 2 * found.chance[f"{family}.{way}.r5"], found.seeds[1]
    assert isinstance(saved_pooling(LotlipEncoder.open(job.out / "seed-1", Runner(16))), Pooling)
