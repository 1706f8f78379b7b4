"""`lotlip evaluate`: models of any kind on the same benchmarks, as a table and as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lotlip.core.paths import Paths
from lotlip.data.index import UnitIndex, write_index
from lotlip.data.records import ImageRecord, Unit
from lotlip.demo.world import generate_scene
from lotlip.evaluate.ablation import measure
from lotlip.evaluate.benchmarks import open_benchmark
from lotlip.evaluate.compare import Result, compare, load_benchmark, table, to_json
from lotlip.evaluate.conditioned import saved_pooling
from lotlip.evaluate.config import SceneBenchmarkConfig
from lotlip.evaluate.encoders import Runner
from lotlip.evaluate.evaluate import encoded_images, evaluate
from lotlip.evaluate.metrics import Scores
from lotlip.evaluate.models import open_encoder
from lotlip.evaluate.reference import REFERENCE, Reference
from lotlip.importing.official import import_official
from lotlip.pretrain.records import OBJECTIVE
from tests.conftest import TinySample
from tests.parity import IMAGE_TOWER, write_checkpoint, write_text_config
from tests.partitions import write_partition
from tests.test_cli import program
from tests.test_conditioned import random_pooling
from tests.tiny_baselines import register_open_clip, save_clip, save_open_clip, save_siglip
from tests.tiny_model import save_tiny_model

SCENES = 7


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, tiny_samples: list[TinySample]) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "ingest", tiny_samples)


def write_scenes(folder: Path, tiny_samples: list[TinySample]) -> Path:
    """Ingested scenes of the test split and one of `val`, with the images of the tiny world."""
    reports = []
    for split, samples in (("test", tiny_samples[:SCENES]), ("val", tiny_samples[SCENES : SCENES + 1])):
        records = [
            ImageRecord(one.key, one.image, "png", "", 16, 16, hashlib.sha256(one.image).hexdigest(), scene.to_json())
            for number, one in enumerate(samples)
            if (scene := generate_scene(0, split, number))
        ]
        reports.append(write_partition(Unit(split, 0, tuple(one.key for one in records)), records, folder))
    write_index(folder, reports, UnitIndex)
    return folder


@pytest.fixture(scope="module")
def urban(tmp_path_factory: pytest.TempPathFactory, tiny_samples: list[TinySample]) -> Path:
    """Urban-1k with its 1,000 images, which are small and repeat."""
    root = tmp_path_factory.mktemp("urban")
    (root / "image").mkdir()
    (root / "caption").mkdir()
    for number in range(1000):
        sample = tiny_samples[number % len(tiny_samples)]
        (root / "image" / f"{number}.jpg").write_bytes(sample.image)
        (root / "caption" / f"{number}.txt").write_text(f"{sample.info['raw']}. It is the number {number}.")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> list[str]:
    """One model of each kind."""
    root = tmp_path_factory.mktemp("models")
    import_official(write_checkpoint("m2", root), root / "official", IMAGE_TOWER, write_text_config("m2", root))
    name = register_open_clip(root, "tiny-compared")
    open_clip = save_open_clip(root / "open_clip", name)
    folders = [save_tiny_model(root / "ours", tiny_tower), root / "official", save_clip(root / "clip")]
    return [
        *map(str, [*folders, save_siglip(root / "siglip")]),
        f"open_clip:{name}:{open_clip}/open_clip_model.safetensors",
    ]


@pytest.mark.slow
def test_the_command_scores_every_kind_of_model_like_evaluate(monkeypatch, capsys, tmp_path, models, scenes):
    out = tmp_path / "new" / "scores.json"
    arguments = ["--benchmark", "scenes", "--data", scenes, "--device", "cpu", "--batch-size", 3, "--out", out]
    assert program(monkeypatch, "evaluate", *models, *arguments) == 0
    shown = capsys.readouterr()
    results = json.loads(out.read_text())["results"]
    assert [(result["model"], result["benchmark"]) for result in results] == [(model, "scenes") for model in models]
    benchmark = open_benchmark("scenes", SceneBenchmarkConfig(kind="scenes", size=SCENES), Paths(ingest=scenes), [])
    lines = shown.out.splitlines()
    for result, model, line in zip(results, models, lines[3:], strict=False):
        encoder = open_encoder(model, 3, "cpu")
        expected = evaluate(encoder, benchmark, encoder.images(encoded_images(benchmark)))
        assert result["scores"] == pytest.approx(dict(expected.values), abs=1e-6)
        about = result["protocol"]
        assert (about["model"], about["benchmark"], about["images"], about["split"]) == (
            model,
            "scenes",
            SCENES,
            "test",
        )
        assert about["command"].startswith("lotlip evaluate ") and f"--data {scenes}" in about["command"]
        for name in ("weights_sha256", "context_length", "image_size", "preprocessing", "precision", "similarity"):
            assert about[name]
        cells = line.split("  ")
        assert cells[0].strip() == model
        assert f"{100 * result['scores']['long.image_to_text.r1']:.1f}" in line
        assert f"{100 * result['scores']['classification.top1']:.1f}" in line
    assert lines[0].split() == ["scenes"]
    assert "(published)" not in shown.out  # there are no published scores on scenes
    assert "items" in shown.err and f"{models[0]}, scenes" in shown.err


@pytest.mark.slow
def test_published_scores_are_shown_below_measured_ones(monkeypatch, capsys, models, scenes, urban):
    arguments = ["--benchmark", "urban-1k", "--data", urban, "--benchmark", "scenes", "--data", scenes]
    assert program(monkeypatch, "evaluate", models[0], *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["urban-1k", "scenes"]
    published = [line for line in lines if "(published) " in line]
    assert len(published) == sum("urban-1k" in reference.scores for reference in REFERENCE)
    (lotlip,) = [line for line in published if line.startswith("LoTLIP B/16, 100M (published)")]
    assert lotlip.split()[-2:] == ["88.8", "84.8"]
    assert lotlip.index("88.8") == lines[1].index("long, i→t")
    assert lines[-1].startswith(
        "(published): zero-shot scores that were not measured here: README of github.com/wuw2019/LoTLIP (CLIP"
    )


@pytest.mark.slow
def test_a_partial_run_is_marked_and_shows_no_published_scores(monkeypatch, capsys, tmp_path, models, urban):
    part = tmp_path / "urban"
    for kind, ending in (("image", "jpg"), ("caption", "txt")):
        (part / kind).mkdir(parents=True)
        for number in range(5):
            (part / kind / f"{number}.{ending}").write_bytes((urban / kind / f"{number}.{ending}").read_bytes())
    arguments = ["evaluate", models[0], "--benchmark", "urban-1k", "--data", part]
    assert "but the published benchmark has 1,000 images" in str(program(monkeypatch, *arguments))
    capsys.readouterr()
    assert program(monkeypatch, *arguments, "--partial") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["urban-1k-partial"]
    assert "published" not in shown
    assert program(monkeypatch, *arguments, "--partial", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["results"][0]["benchmark"] == output["results"][0]["protocol"]["benchmark"] == "urban-1k-partial"
    assert output["published"]["models"] == {}


def test_images_may_be_in_another_folder(monkeypatch, capsys, tmp_path, models, urban):
    (tmp_path / "texts" / "caption").mkdir(parents=True)
    (tmp_path / "texts" / "caption" / "3.txt").write_text("a red dog")
    arguments = ["--benchmark", "urban-1k", "--data", tmp_path / "texts", "--images", urban / "image", "--partial"]
    assert program(monkeypatch, "evaluate", models[0], *arguments, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["protocol"]["images"], result["protocol"]["long_texts"]) == (1, 1)


@pytest.mark.slow
def test_progress_counts_every_image_and_text(models, scenes):
    announced: list[tuple[str, str, int]] = []
    encoded: list[int] = []
    encoders = [(model, open_encoder(model, 3, "cpu", on_batch=encoded.append)) for model in models[:3]]
    compare(encoders, [load_benchmark("scenes", scenes)], "", lambda *started: announced.append(started))
    assert [started[:2] for started in announced] == [(model, "scenes") for model in models[:3]]
    assert sum(encoded) == sum(started[2] for started in announced)


def result(model: str, benchmark: str, **scores: float) -> Result:
    values = {name.replace("__", "."): score for name, score in scores.items()}
    intervals = {name: (score - 0.02, score + 0.01) for name, score in values.items() if name.startswith("long")}
    return Result(model, benchmark, Scores(values, intervals), {}, {}, {"context_length": 77})


RESULTS = [
    result("ours", "dci", long__image_to_text__r1=0.641, long__text_to_image__r1=0.6263, long__text_to_image__r5=0.8),
    result("ours", "imagenet", classification__top1=0.5),
    result("theirs", "dci", long__image_to_text__r1=0.454, long__text_to_image__r1=0.43),
    result("theirs", "imagenet", classification__top1=0.683),
]


def test_table_shows_scores_intervals_and_references():
    references = [
        Reference("CLIP", {"dci": {"long.image_to_text.r1": 0.4545}}, "a paper"),
        Reference("X", {"coco": {"x": 1.0}}, "another"),
    ]
    assert table(RESULTS, references) == [
        "                  dci                                   imagenet",
        "model             long, i→t          long, t→i          top-1",
        "----------------  -----------------  -----------------  --------",
        "ours              64.1 [62.1, 65.1]  62.6 [60.6, 63.6]  50.0",
        "theirs            45.4 [43.4, 46.4]  43.0 [41.0, 44.0]  68.3",
        "CLIP (published)  45.5",
        "R@1 (i→t: image to text, t→i: text to image) and top-1 in percent; brackets: 95 % confidence interval",
        "(published): zero-shot scores that were not measured here: a paper (CLIP)",
    ]


def test_table_shows_the_best_possible_score_when_texts_repeat():
    protocol = {"images": 288, "short_texts": 288, "repeated_short_texts": 142, "repeated_images": 0}
    ceiling = {"short.image_to_text.r1": 0.5069, "short.text_to_image.r1": 0.5069, "short.text_to_image.r5": 1.0}
    scores = Scores({"short.image_to_text.r1": 0.25, "short.text_to_image.r1": 0.125})
    results = [
        Result("ours", "own", scores, {}, ceiling, protocol),
        Result("ours", "imagenet", Scores({"classification.top1": 0.5}), {}, {}, {}),
    ]
    lines = table(results, [])
    assert [line.split() for line in lines if line.startswith("best possible  ")] == [
        ["best", "possible", "50.7", "50.7"]
    ]
    assert [line for line in lines if "142 of 288 short texts" in line and "own" in line]
    assert to_json(results)["results"][0]["ceiling"] == ceiling


def test_json_holds_all_scores_and_published_ones():
    output = json.loads(json.dumps(to_json(RESULTS)))
    assert output["results"][0]["scores"]["long.text_to_image.r5"] == 0.8
    assert output["results"][0]["intervals"]["long.text_to_image.r5"] == pytest.approx([0.78, 0.81])
    assert output["results"][0]["protocol"] == {"context_length": 77}
    dci_references = [reference for reference in REFERENCE if "dci" in reference.scores]
    assert list(output["published"]["models"]) == [reference.model for reference in dci_references]
    assert output["published"]["sources"] == {reference.model: reference.source for reference in dci_references}
    assert all(list(scores) == ["dci"] for scores in output["published"]["models"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "scene"], "there is no benchmark 'scene'; choose from scenes, sharegpt4v-1k, "),
        (["--benchmark", "scenes", "--benchmark", "dci"], "2 --benchmark, 1 --data, 0 --images: give one --data per"),
        (["--benchmark", "scenes", "--partial"], "takes neither a folder of images nor a partial run; leave them out"),
        (["--benchmark", "scenes", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--benchmark", "scenes", "no/such/model"], "there is no folder no/such/model"),
    ],
)
def test_an_invalid_command_is_one_line_and_writes_nothing(monkeypatch, tmp_path, models, scenes, arguments, message):
    out = tmp_path / "scores.json"
    error = program(monkeypatch, "evaluate", models[0], *arguments, "--data", scenes, "--out", out)
    assert str(error).startswith("error: ") and message in str(error)
    assert not out.exists()


def test_scenes_need_a_finished_test_split(tmp_path, tiny_samples):
    with pytest.raises(ValueError, match="has not finished"):
        load_benchmark("scenes", tmp_path)
    write_index(tmp_path, [], UnitIndex)
    with pytest.raises(ValueError, match="has no scenes in its test split"):
        load_benchmark("scenes", tmp_path)


@pytest.mark.slow
def test_a_late_interaction_model_is_scored(tmp_path, tiny_tower, scenes):
    folder = save_tiny_model(tmp_path / "model", tiny_tower, similarity="late-interaction")
    encoder = open_encoder(str(folder), device="cpu")
    (result,) = compare([("filip", encoder)], [load_benchmark("scenes", scenes)], "")
    assert result.protocol["similarity"] == "late-interaction"
    assert 0 <= result.scores.values["long.text_to_image.r1"] <= 1
    assert torch.isfinite(torch.tensor(list(result.scores.values.values()))).all()


# --- features that texts pool -----------------------------------------------------------------------------------------

LOSS: dict[str, Any] = {"conditioned": {"heads": 2}}


def save_pooled_model(folder: Path, image_tower: Path, loss: Any = LOSS, module: str = "conditioned") -> Path:
    """A model as training with `loss` saves it, with a pooling of random weights."""
    save_tiny_model(folder, image_tower, provenance={"pretraining": {"loss": loss}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = random_pooling(32, 32).state_dict()
    save_file({f"objective.{module}.{name}": value for name, value in weights.items()}, folder / OBJECTIVE)
    return folder


@pytest.mark.slow
def test_a_saved_pooling_gives_the_scores_of_the_stage(monkeypatch, capsys, tmp_path, tiny_tower, models, scenes):
    folder = save_pooled_model(tmp_path / "flair" / "seed-0", tiny_tower)
    benchmark = replace(load_benchmark("scenes", scenes), scenes=[], max_unseen_tokens=None)
    config = {
        "seeds": [0],
        "text": {"tokenizer": "bert-base-uncased"},
        "image_tower": {"frozen": True},
        "loss": LOSS,
    }
    arguments = ["evaluate", models[0], folder, "--benchmark", "scenes", "--data", scenes, "--device", "cpu"]
    for most_pairs in (SCENES**2, SCENES**2 - 1):
        out = tmp_path / "scores.json"
        assert program(monkeypatch, *arguments, "--max-conditioned-pairs", most_pairs, "--out", out) == 0
        plain, pooled = json.loads(out.read_text())["results"]
        expected = measure(tmp_path / "flair", config, [benchmark], [], {}, Runner(64), lambda _: None, most_pairs)
        stage = expected.results["scenes"]
        assert pooled["scores"] == pytest.approx(stage.seeds[0], abs=1e-6)
        assert set(pooled["intervals"]) == stage.intervals[0].keys()
        assert (pooled["chance"], pooled["ceiling"]) == (stage.chance, stage.ceiling)
        for name in ("reranked_candidates", "not_conditioned"):
            assert pooled["protocol"].get(name) == stage.protocol.get(name)
        assert ("conditioned-long.text_to_image.r1" in pooled["scores"]) == (most_pairs == SCENES**2)
        assert "reranked-long.text_to_image.r1" in pooled["scores"]
        assert not [
            name
            for name in [*plain["scores"], *plain["protocol"]]
            if name.startswith(("conditioned", "reranked", "not_"))
        ]
        lines = capsys.readouterr().out.splitlines()
        names = [line.split("  ")[0] for line in lines]
        rows = [str(folder), f"{folder} (conditioned)", f"{folder} (re-ranked)"]
        shown = [name for name in names if name.startswith(str(folder))]
        assert shown == (rows if most_pairs == SCENES**2 else [rows[0], rows[2]])
        left_out = [line for line in lines if line.startswith("not conditioned: ")]
        if most_pairs < SCENES**2:
            assert left_out[0].startswith(f"not conditioned: {folder} on scenes: long text has 49 pairs and short text")
        else:
            assert not left_out
            (line,) = [line for line in lines if line.startswith(rows[1])]
            cells = line.removeprefix(rows[1]).replace(", ", ",").replace(" [", "[").split()
            score = pooled["scores"]["conditioned-long.image_to_text.r1"]
            assert len(cells) == 4 and cells[0].startswith(f"{100 * score:.1f}[")


@pytest.mark.slow
def test_a_pooling_that_cannot_be_used_is_left_out_with_the_reason(monkeypatch, capsys, tmp_path, tiny_tower, scenes):
    bare = save_pooled_model(tmp_path / "bare", tiny_tower)
    (bare / OBJECTIVE).rename(tmp_path / OBJECTIVE)
    assert program(monkeypatch, "evaluate", bare, "--benchmark", "scenes", "--data", scenes) == 0
    lines = capsys.readouterr().out.splitlines()
    reason = f"it was trained with loss.conditioned, but {bare / OBJECTIVE} is missing"
    assert lines[-1] == f"not conditioned: {bare} on scenes: {reason}"
    assert not [line for line in lines if "(conditioned)" in line or "(re-ranked)" in line]
    for number, loss in enumerate([None, [2], {"conditioned": None}, {"conditioned": {"heads": True}}]):
        folder = save_pooled_model(tmp_path / f"headless-{number}", tiny_tower, loss)
        assert "the heads of its pooling are unknown" in str(saved_pooling(open_encoder(str(folder))))
    masks = save_pooled_model(tmp_path / "smart-clip", tiny_tower, {"conditioned": None}, "masks")
    assert saved_pooling(open_encoder(str(masks))) is None
    damaged = save_pooled_model(tmp_path / "damaged", tiny_tower)
    (damaged / OBJECTIVE).write_bytes(b"")
    assert str(damaged / OBJECTIVE) in str(
        program(monkeypatch, "evaluate", damaged, *["--benchmark", "scenes", "--data", scenes])
    )


@pytest.mark.slow
def test_progress_counts_pooled_images_twice(tmp_path, tiny_tower, scenes):
    folder = save_pooled_model(tmp_path / "model", tiny_tower)
    announced: list[int] = []
    encoded: list[int] = []
    encoder = open_encoder(str(folder), 3, "cpu", on_batch=encoded.append)
    poolings = {"flair": saved_pooling(encoder)}
    compare([("flair", encoder)], [load_benchmark("scenes", scenes)], "", lambda *s: announced.append(s[2]), poolings)
    assert sum(encoded) == sum(announced)
