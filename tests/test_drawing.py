"""Figures: every text from outside is literal, and a figure that fails takes nothing else with it."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from lotlip.evaluate.attention_pictures import ImageRelevance, TextReading, draw_reading, draw_relevance
from lotlip.evaluate.encoders import Runner
from lotlip.figures import charts as drawing
from lotlip.figures.charts import SMALL, Line, Point, draw_figure, draw_lines, label_ends, literal, render
from lotlip.figures.intervals import Estimate
from lotlip.report import figures

HOSTILE = {
    "two dollar signs": "a $ _ ^ { price of $ 5",
    "a broken formula": r"$\frac{$ and $\undefined$",
    "one formula": "$x^2$",
    "backslashes": r"C:\new\text \n \$ \\",
    "marks of formulas": "a_b^c {d} ~ & # %",
    "control characters": "a\x00b\x07c\x1b[31m\x7f\x85",
    "a lone surrogate": "a\ud800b",
    "very long": "word " * 20_000 + "x" * 5_000,
    "right to left": "\u202eשלום עולם مرحبا",
    "no glyph": "\U0001f600 漢字 \ue000 \U0010ffff",
    "line breaks": "a\r\nb\u2028c\n\n\n",
    "nothing": "",
    "white space": " \t ",
    "markup": "<script>alert(1)</script> & ]]>",
}


@pytest.fixture(params=list(HOSTILE.values()), ids=list(HOSTILE))
def text(request: pytest.FixtureRequest) -> str:
    return request.param


def is_picture(png: bytes) -> bool:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return image.width > 50 and image.height > 50


def test_texts_of_data_do_not_stop_the_pictures_of_attention(text):
    maps = np.full((2, 4, 4), 1 / 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_picture(draw_relevance([ImageRelevance(Image.new("RGB", (160, 160)), [text, "a dog"], maps)]))
        shares = {"[CLS]": np.array([0.5, 0.5]), "by length": np.array([0.5, 0.5])}
        assert is_picture(draw_reading([TextReading([text, "a dog"], shares, {"[CLS]": 1.0})]))


@pytest.mark.slow
def test_names_do_not_stop_the_figures_of_scores(text):
    def draw(axes):
        points = [Point(1, Estimate(10.0)), Point(2, Estimate(20.0))]
        draw_lines(axes, [Line(text, "#000000", points)], [1, 2], "m", "R@1 (%)")
        label_ends(axes, [(2, 20, text, "#000000")])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg, png = render("hostile", SMALL, draw)
    assert is_picture(png)
    svg.encode()
    assert not {"\x00", "\x07", "\x1b"} & set(svg)


def test_dollar_signs_are_drawn_as_they_are():
    line = Line("from $5 to $6", "#000000", [Point(1, Estimate(10.0)), Point(2, Estimate(20.0))])
    svg, _ = render("dollars", SMALL, lambda axes: draw_lines(axes, [line], [1, 2], "m", "R@1 (%)"))
    assert "from $5 to $6" in svg


def test_literal_texts_have_no_control_characters_and_an_end():
    assert literal("a\x00b\nc\td") == "a\ufffdb c d"
    assert literal("abcdef", 4) == "abc…"
    assert literal("Größe 漢字 $x$") == "Größe 漢字 $x$"


def failing(axes):
    raise RuntimeError("no ink")


def test_a_figure_that_fails_says_why_and_stops_nothing(caplog):
    figure = draw_figure("loss", "Training loss", "", SMALL, failing)
    assert "no ink" in figure.problem and not figure.png and not figure.svg
    assert "Training loss" in caplog.text and "no ink" in caplog.text


def test_the_figures_of_a_run_that_can_be_drawn_are_kept(monkeypatch, caplog):
    real = drawing.render

    def render_all_but_loss(slug, *arguments):
        if slug == "loss":
            raise RuntimeError("no ink")
        return real(slug, *arguments)

    monkeypatch.setattr(drawing, "render", render_all_but_loss)
    found = figures.run_figures([{"step": 1, "loss": 2.0}], {"short.text_to_image.r1": 0.5})
    assert list(found) == ["recall.png"]
    assert "no ink" in caplog.text


@pytest.mark.slow
def test_a_benchmark_whose_pictures_fail_keeps_its_scores(monkeypatch, tmp_path, tiny_tower, tiny_samples):
    """The stage writes the scores first; what could not be drawn is written beside the pictures."""
    from lotlip.evaluate import ablation
    from lotlip.evaluate import attention_pictures as attention
    from lotlip.evaluate.benchmarks import Benchmark, ImageTexts
    from tests.tiny_model import save_tiny_model

    save_tiny_model(tmp_path / "model" / "seed-0", tiny_tower)
    samples = tiny_samples[:3]
    asked = Benchmark(
        "own",
        [sample.key for sample in samples],
        lambda number: samples[number].image,
        {"short": ImageTexts(["costs $ _ ^ { $", "a dog", "a dog"], [0, 1, 2])},
    )
    config = {"seeds": [0], "text": {"tokenizer": "bert-base-uncased"}, "image_tower": {"frozen": True}}

    def fail(seen):
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr(attention, "draw_relevance", fail)
        found = ablation.measure(tmp_path / "model", config, [asked], [], {}, Runner(2))
        ablation.draw(tmp_path / "model", config, [asked], Runner(2), tmp_path / "pictures")
    assert found.results["own"].seeds[0]["short.text_to_image.r1"] >= 0
    assert found.results["own"].ceiling["short.text_to_image.r1"] == pytest.approx(2 / 3)
    assert found.results["own"].protocol["repeated_short_texts"] == 1
    assert json.loads((tmp_path / "pictures" / "not-drawn.json").read_text()) == {"own": {"relevance": "no ink"}}
    ablation.draw(tmp_path / "model", config, [asked], Runner(2), tmp_path / "again")
    assert (tmp_path / "again" / "own-relevance.png").is_file()
    assert not (tmp_path / "again" / "not-drawn.json").exists()
