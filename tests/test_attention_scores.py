"""Attention scores and figures on scenes, whose objects are known, and in the report."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lotlip.data.images import MEAN, RESIZES, image_transform, square
from lotlip.data.tokenizer import TextTokenizer
from lotlip.demo.questions import long_text, object_texts, short_text
from lotlip.demo.world import generate_scene, render
from lotlip.evaluate.attention_pictures import attention_pictures, image_relevance, overlay, text_readings
from lotlip.evaluate.attention_scores import attention_scores, coverage, object_scores, on_objects, ratio, text_scores
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.report.inputs import load_inputs
from lotlip.report.page import build_report
from tests.conftest import IMAGE_SIZE
from tests.test_attention import make
from tests.test_report import make_params, write_project

SCENES = [generate_scene(2024, "test", number) for number in range(4)]


def png(number: int) -> bytes:
    file = io.BytesIO()
    render(SCENES[number], 64).save(file, "png")
    return file.getvalue()


def scenes_benchmark(read: Callable[[int], bytes] = png, **changes: Any) -> Benchmark:
    every = list(range(len(SCENES)))
    retrieval = {
        "long": ImageTexts([long_text(scene) for scene in SCENES], every),
        "short": ImageTexts([short_text(scene) for scene in SCENES], every),
    }
    names = [f"test-{number}" for number in every]
    return Benchmark(**{"name": "scenes", "images": names, "read": read, "retrieval": retrieval, **changes})


def encoder_of(corner_tokens: int = 2, **changes: Any) -> LotlipEncoder:
    model = make(corner_tokens=corner_tokens, context_length=128, **changes)
    return LotlipEncoder(model, TextTokenizer("bert-base-uncased", 128, corner_tokens), 8)


@pytest.fixture(scope="module")
def encoder() -> LotlipEncoder:
    return encoder_of()


def test_coverage_matches_the_drawn_objects() -> None:
    scene = SCENES[0]
    grid = coverage((scene.salient, *scene.objects), (8, 8))
    assert grid.shape == (1 + len(scene.objects), 8, 8)
    for thing, covered in zip((scene.salient, *scene.objects), grid, strict=True):
        x, y, radius = thing.disc
        assert covered.mean().item() == pytest.approx(math.pi * radius**2, rel=0.02)  # objects lie inside the image
        row, column = divmod(int(covered.argmax()), 8)
        assert abs((column + 0.5) / 8 - x) < radius
        assert abs((row + 0.5) / 8 - y) < radius


def test_coverage_of_a_crop_is_a_part_of_the_full_coverage() -> None:
    things = (SCENES[0].salient, *SCENES[0].objects)
    full, cropped = coverage(things, (40, 40)), coverage(things, (32, 32), crop=0.8)
    torch.testing.assert_close(cropped, full[:, 4:36, 4:36], atol=0.02, rtol=0)


def test_on_objects_has_known_values() -> None:
    scene = SCENES[0]
    objects = coverage((scene.salient, *scene.objects), (32, 32))
    area = objects.mean(dim=(1, 2))
    uniform = torch.full_like(objects, 1 / 32**2)
    expected = [area[1:].mean(), area[1:].mean(), area[1:].mean(), area[0], area[0]]
    torch.testing.assert_close(on_objects(scene, uniform), torch.stack(expected))
    correct = (objects == 1).float()
    correct = correct / correct.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(on_objects(scene, correct)[[0, 1, 3]], torch.tensor([1.0, 0.0, 1.0]))
    wrong = torch.cat([correct[:1], correct[1:].roll(1, dims=0)])  # the relevance of each text is on another object
    named, not_named, *_ = on_objects(scene, wrong).tolist()
    assert named == pytest.approx(0, abs=1e-6)
    assert not_named == pytest.approx(1 / (len(scene.objects) - 1))


def test_the_interval_of_a_ratio_contains_it() -> None:
    below = torch.linspace(1, 2, 50)
    assert ratio(3 * below, below) == (pytest.approx(3), (pytest.approx(3), pytest.approx(3)))
    noisy = 3 * below + torch.linspace(-1, 1, 50).sin()[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    value, (low, high) = ratio(noisy, below)
    assert low < value < high
    assert ratio(noisy, below) == (value, (low, high))


def test_object_texts_are_sentences_of_the_long_text() -> None:
    for scene in SCENES:
        texts = object_texts(scene)
        assert len(texts) == 1 + len(scene.objects)
        for text, thing in zip(texts, (scene.salient, *scene.objects), strict=True):
            assert text in long_text(scene)
            assert thing.shape in text.split()


def test_object_scores_are_fractions_and_chance_is_the_area(encoder: LotlipEncoder) -> None:
    benchmark = scenes_benchmark(scenes=SCENES)
    scores = object_scores(encoder, benchmark)
    values = dict(scores.values)
    ratios = {name: values.pop(name) for name in scores.intervals}
    assert all(0 < value < 1 for value in values.values())
    areas = [np.mean([math.pi * thing.disc[2] ** 2 for thing in scene.objects]) for scene in SCENES]
    assert values["named_object_area"] == pytest.approx(np.mean(areas), rel=0.02)
    expected = values["on_named_object"] / values["named_object_area"]
    assert ratios["on_named_object_over_chance"] == pytest.approx(expected, rel=1e-5)
    for name, (low, high) in scores.intervals.items():
        assert low <= ratios[name] <= high


def test_a_blind_model_scores_chance() -> None:
    encoder = encoder_of()
    for block in encoder.model.image_tower.trunk.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    values = object_scores(encoder, scenes_benchmark(scenes=SCENES)).values
    for name in ("on_named_object_over_chance", "on_named_object_over_not_named", "on_salient_object_over_chance"):
        assert values[name] == pytest.approx(1, rel=1e-5)


def test_text_scores_cover_cls_and_each_corner_token(encoder: LotlipEncoder) -> None:
    values = text_scores(encoder, scenes_benchmark(scenes=SCENES)).values
    readers = ("cls", "corner1", "corner2")
    assert set(values) == {
        "length_entropy",
        "salient_words_length",
        *(f"{reader}_{what}" for reader in readers for what in ("entropy", "on_salient_words")),
    }
    assert all(0 < value < 1 for value in values.values())
    words = [text.replace(".", " ").split() for text in (long_text(scene) for scene in SCENES)]
    assert values["salient_words_length"] == pytest.approx(np.mean([4 / len(text) for text in words]), rel=0.1)


def test_text_scores_without_corner_tokens_cover_cls_only() -> None:
    values = text_scores(encoder_of(corner_tokens=0), scenes_benchmark(scenes=SCENES)).values
    assert set(values) == {"length_entropy", "salient_words_length", "cls_entropy", "cls_on_salient_words"}


def test_scores_that_cannot_be_measured_have_a_reason(encoder: LotlipEncoder) -> None:
    without_scenes = scenes_benchmark(retrieval={"short": ImageTexts(["a red dog"], [0])})
    output = attention_scores(encoder, without_scenes).to_json()
    assert output["values"] == {}
    assert set(output["left_out"]) == {"images", "texts"}
    late = encoder_of(similarity="late-interaction")
    output = attention_scores(late, scenes_benchmark(scenes=SCENES)).to_json()
    assert output["values"] == {}
    assert all("late interaction" in reason for reason in output["left_out"].values())
    assert attention_pictures(late, scenes_benchmark(scenes=SCENES)) == {}


# --- figures ------------------------------------------------------------------------------------------------------


def test_overlay_is_red_at_the_relevance() -> None:
    relevance = np.zeros((4, 4), dtype=np.float32)
    relevance[0, 3] = 0.5
    shown = np.asarray(overlay(Image.new("RGB", (80, 80), (200, 200, 200)), relevance)).astype(int)
    redness = shown[..., 0] - shown[..., 1]
    assert redness[10, 70] > 100
    assert redness[60, 10] == 0
    ringed = np.asarray(overlay(Image.new("RGB", (80, 80)), relevance, (0.5, 0.5, 0.25)))
    assert ringed[40, 60].tolist() == [255, 255, 255]


@pytest.mark.slow
def test_figures_show_the_first_images_and_texts(encoder: LotlipEncoder) -> None:
    benchmark = scenes_benchmark(scenes=SCENES)
    first = image_relevance(encoder, benchmark)[0]
    assert first.texts[0] == short_text(SCENES[0])
    assert list(first.texts[2:]) == object_texts(SCENES[0])[: len(first.texts) - 2]
    assert first.named[0] == first.named[2] == SCENES[0].salient.disc
    assert first.named[1] is None  # the setting
    assert first.named[3] == SCENES[0].objects[0].disc
    reading = text_readings(encoder, benchmark)[0]
    assert list(reading.shares) == ["[CLS]", "Cor 1", "Cor 2", "by length"]
    assert list(reading.sub_captions[1:]) == object_texts(SCENES[0])
    figures = attention_pictures(encoder, benchmark)
    assert set(figures) == {"relevance", "reading"}
    assert figures == attention_pictures(encoder, benchmark)
    for png in figures.values():
        assert min(Image.open(io.BytesIO(png)).size) > 300


def test_figures_split_sub_captions_like_the_tokenizer() -> None:
    tokenizer = TextTokenizer("bert-base-uncased", 128, 2, sentence_ends="unicode")
    encoder = LotlipEncoder(make(corner_tokens=2, context_length=128), tokenizer, 8)
    benchmark = scenes_benchmark(retrieval={"long": ImageTexts(["A dog! It runs? 它是红色的。"], [0])})
    parts = ["A dog", "It runs", "它是红色的"]
    assert list(image_relevance(encoder, benchmark)[0].texts) == parts
    reading = text_readings(encoder, benchmark)[0]
    assert list(reading.sub_captions) == parts
    assert {len(shares) for shares in reading.shares.values()} == {3}


@pytest.mark.slow
def test_images_without_scenes_are_shown_without_objects(encoder: LotlipEncoder) -> None:
    texts = {
        "short": ImageTexts(["a dog", "another", "a cat"], [0, 0, 2]),
        "long": ImageTexts(["It runs. It is red."], [0]),
    }
    relevance = image_relevance(encoder, scenes_benchmark(retrieval=texts))
    assert [list(image.texts) for image in relevance] == [["a dog", "It runs", "It is red"], ["a cat"]]
    assert relevance[0].named == [None] * 3
    assert set(attention_pictures(encoder, scenes_benchmark(retrieval=texts))) == {"relevance", "reading"}


@pytest.mark.parametrize("resize", RESIZES)
def test_relevance_is_drawn_on_the_models_square_input(resize: str) -> None:
    encoder = encoder_of(vit={"resize": resize})
    image, file = Image.linear_gradient("L").resize((90, 30)).convert("RGB"), io.BytesIO()
    image.save(file, "png")
    benchmark = scenes_benchmark(lambda _: file.getvalue(), retrieval={"short": ImageTexts(["a dog"], [0])}, scenes=())
    relevance = image_relevance(encoder, benchmark)[0]
    assert relevance.picture == square(image, relevance.picture.width, resize, MEAN)
    assert np.array_equal(encoder.prepare(file.getvalue()), image_transform(IMAGE_SIZE, resize=resize)(image))
    preprocessing = encoder.protocol()["preprocessing"]
    assert [word in str(preprocessing) for word in ("crop", "both sides", "padded")] == [
        resize == name for name in RESIZES
    ]


@pytest.mark.slow
def test_the_report_shows_scores_figures_and_reasons(tmp_path: Path) -> None:
    params = make_params()
    write_project(tmp_path, params)
    dot = io.BytesIO()
    Image.new("RGB", (4, 4)).save(dot, "png")
    for name in ("alpha", "gamma"):
        path = tmp_path / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        values = {"on_named_object": 0.1, "named_object_area": 0.04, "on_named_object_over_chance": 2.5}
        values |= {"cls_entropy": 0.9, "length_entropy": 0.97} | ({"corner1_entropy": 0.8} if name == "gamma" else {})
        intervals = {"on_named_object_over_chance": [2.25, 2.75]}
        attention = {
            "values": values,
            "intervals": intervals,
            "left_out": {"texts": "too dark"} if name == "alpha" else {},
        }
        data["benchmarks"]["scenes"]["attention"] = {"0": attention}
        path.write_text(json.dumps(data))
        folder = tmp_path / params.paths.metrics / "attention" / name
        folder.mkdir(parents=True)
        (folder / "scenes-relevance.png").write_bytes(dot.getvalue())
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    table = (tmp_path / "report" / "tables" / "scenes-attention.csv").read_text().splitlines()
    ratio = "on_named_object_over_chance"
    assert table[0] == f"ablation,on_named_object,{ratio},{ratio}.low,{ratio}.high,cls_entropy,corner1_entropy"
    assert [line.split(",")[0] for line in table[1:]] == ["alpha", "gamma", "uniform"]
    assert table[1].split(",")[2:5] == ["2.5", "2.25", "2.75"]
    assert table[3].split(",")[1:] == ["0.04", "1.0", "", "", "0.97", "0.97"]
    for text in (page.read_text(), (page.parent / "report.md").read_text()):
        assert "Where attention goes" in text
        assert "2.50 [2.25, 2.75]" in text
        assert "Not measured for alpha: too dark." in text
    assert (page.parent / "figures" / "scenes-attention-relevance-gamma.png").read_bytes() == dot.getvalue()
    assert "LoTLIP: relevance of patches" in page.read_text()


@pytest.mark.slow
def test_a_report_without_attention_has_no_section_about_it(tmp_path: Path) -> None:
    params = make_params()
    write_project(tmp_path, params)
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    assert "Where attention goes" not in page.read_text()
