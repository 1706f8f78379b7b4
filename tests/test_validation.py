"""Gates pass clean data and describe each defect."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lotlip.caption.config import CaptionConfig
from lotlip.caption.gate import gate_caption
from lotlip.core.checks import Check, GateFailed
from lotlip.data.partitions import write_captions
from lotlip.data.records import Caption, Failure, ImageRecord, Unit, UnitReport
from lotlip.evaluate.config import EvaluateConfig
from lotlip.evaluate.gate import gate_evaluate
from lotlip.image_tower.config import SceneTowerConfig, TimmTowerConfig
from lotlip.image_tower.gate import gate_image_tower
from lotlip.pretrain.gate import gate_pretrain
from lotlip.report.gate import gate_report
from tests.partitions import write_partition
from tests.test_gate import gate_error

pytestmark = pytest.mark.usefixtures("without_pages")

KEYS = {f"{split}/part-00000": [f"{split}-{number}" for number in range(10)] for split in ("train", "val")}
BROKEN = Failure("train-9", "train-9.png", "the image is broken", "unreadable")


def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "png")
    return file.getvalue()


def record(key: str, **changes: Any) -> ImageRecord:
    data = image()
    return replace(ImageRecord(key, data, "png", f"raw {key}", 4, 4, hashlib.sha256(data).hexdigest()), **changes)


def caption(key: str, **changes: Any) -> Caption:
    text = f"A dog {key}. It runs."
    return replace(Caption(key, "llava", text, [f"A dog {key}", "It runs"], 5, "stop", "r", ""), **changes)


def ingest(folder: Path, items: dict[str, Sequence[ImageRecord | Failure]] | None = None) -> list[UnitReport]:
    """Two partitions; `items` replaces the items of a unit."""
    every = {name: [record(key) for key in keys] for name, keys in KEYS.items()} | (items or {})
    units = {name: Unit(name.split("/")[0], 0, tuple(map(str, range(len(unit))))) for name, unit in every.items()}
    return [write_partition(units[name], unit, folder) for name, unit in every.items()]


def captions(folder: Path, items: dict[str, Sequence[Caption | Failure]] | None = None) -> list[UnitReport]:
    every = {name: [caption(key) for key in keys] for name, keys in KEYS.items()} | (items or {})
    return [write_captions(name, unit, len(unit), folder) for name, unit in every.items()]


# --- image tower --------------------------------------------------------------------------------------------------

FEATURES = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def test_image_tower_passes(tmp_path):
    checks = gate_image_tower(SceneTowerConfig(kind="scenes"), {"shape": 0.8, "colour": 0.6}, FEATURES, tmp_path)
    assert checks[-1].observed == "70 % (shape 80 %, colour 60 %)"
    gate_image_tower(TimmTowerConfig(kind="timm", model="vit"), {}, FEATURES, tmp_path)


@pytest.mark.parametrize("accuracy", [{"shape": 0.8, "colour": 0.3}, {}])
def test_image_tower_fails_on_low_accuracy(tmp_path, accuracy):
    settings = SceneTowerConfig(kind="scenes", min_accuracy=0.6)
    line = gate_error(lambda report: gate_image_tower(settings, accuracy, FEATURES, report), tmp_path)
    assert "mean accuracy over attributes is at least 60 %: found " in line
    assert ("55 %" if accuracy else "nothing") in line


def test_image_tower_fails_on_equal_features(tmp_path):
    settings = TimmTowerConfig(kind="timm", model="vit")
    line = gate_error(lambda report: gate_image_tower(settings, {}, np.ones((8, 4)), report), tmp_path)
    assert "features differ from image to image" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_tower_fails_on_non_finite_features(tmp_path, value):
    features = FEATURES.copy()
    features[3, 2] = value
    with pytest.raises(GateFailed, match="no NaN or infinity: found 1"):
        gate_image_tower(TimmTowerConfig(kind="timm", model="vit"), {}, features, tmp_path)


# --- caption ------------------------------------------------------------------------------------------------------

CAPTION = CaptionConfig(max_failure_share=0.1, max_repeated_share=0.2)


@pytest.mark.slow
def test_caption_passes(tmp_path):
    repeated = [caption(key, text="A dog.") for key in KEYS["train/part-00000"][:4]]
    rest = [caption(key) for key in KEYS["train/part-00000"][4:]]
    checks = gate_caption(CAPTION, tmp_path, captions(tmp_path, {"train/part-00000": repeated + rest}), tmp_path / "r")
    assert "15 %" in [check.observed for check in checks]  # three of twenty repeat the first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("items", "line"),
    [
        ([caption("t0"), BROKEN, BROKEN], "failed is at most 10 %: found 15.4 % (2 unreadable)"),
        ([caption("t0", text="")], "no empty caption: found 1 of 2 do not: train/part-00000 (1)"),
        ([caption("t0", text=None)], "no empty caption: found 1 of 2 do not: train/part-00000 (1)"),
        ([caption("t0", sub_captions=[])], "at least 1 sub-caption: found 1 of 2 do not: train/part-00000 (1)"),
        ([caption("t0"), caption("t0", text="Other.")], "no image has two captions: found 1"),
        (
            [caption(f"t{number}", text="A dog.") for number in range(5)],
            "equal another is at most 20 %: found 26.7 %",
        ),
    ],
    ids=["failures", "empty", "null", "unsplit", "repeated-key", "repeated-text"],
)
def test_caption_fails_on(tmp_path, items, line):
    reports = captions(tmp_path, {"train/part-00000": items})
    assert line in gate_error(lambda report: gate_caption(CAPTION, tmp_path, reports, report), tmp_path / "report")


@pytest.mark.slow
def test_caption_fails_without_captions(tmp_path):
    assert "there are captions" in gate_error(
        lambda report: gate_caption(CAPTION, tmp_path, [], report), tmp_path / "report"
    )


# --- pretrain -----------------------------------------------------------------------------------------------------


def history() -> pd.DataFrame:
    rows = [
        {
            "seed": seed,
            "step": 10 * (row + 1),
            "loss": 4.0 - 0.1 * row,
            "temperature": 14.0,
            "learning_rate": 1e-3,
            "samples_per_second": 100.0,
        }
        for seed in (0, 1)
        for row in range(20)
    ]
    return pd.DataFrame(rows)


def pretrain(rows: pd.DataFrame) -> Callable[[Path], list[Check]]:
    return lambda report: gate_pretrain([0, 1], 0.9, rows, 4.0, report)


def test_pretrain_passes(tmp_path):
    assert all(check.success for check in pretrain(history())(tmp_path))


@pytest.mark.parametrize(("column", "value"), [("loss", np.nan), ("loss", np.inf), ("temperature", np.nan)])
def test_pretrain_fails_on_non_finite_values(tmp_path, column, value):
    rows = history()
    rows.loc[7, column] = value
    line = gate_error(pretrain(rows), tmp_path)
    assert line == "loss and temperature are numbers at every step: found 1 of 40 do not: seed 0 step 80 (1)"


def test_pretrain_fails_on_a_loss_near_chance(tmp_path):
    rows = history()
    rows.loc[rows["seed"] == 1, "loss"] = 3.9
    line = gate_error(pretrain(rows), tmp_path)
    assert "at most 90 % of guessing's (4): found 1 of 2 do not: seed 1 (97.5 %)" in line


@pytest.mark.slow
def test_pretrain_averages_the_last_tenth_of_the_rows(tmp_path):
    rows = history()
    rows.loc[19, "loss"] = 5.0  # with the row before: (2.2 + 5) / 2 = 3.6, 90 % of the chance loss
    pretrain(rows)(tmp_path)
    rows.loc[19, "loss"] = 5.1
    assert "seed 0 (91.2 %)" in gate_error(pretrain(rows), tmp_path)


@pytest.mark.slow
def test_pretrain_fails_on_decreasing_steps(tmp_path):
    rows = history()
    rows.loc[25, "step"] = rows.loc[24, "step"]
    assert "steps go up: found 1 of 40 do not: seed 1 step 50 (0)" in gate_error(pretrain(rows), tmp_path)


@pytest.mark.parametrize("value", [0.0, -1.0, 100.5])
def test_pretrain_fails_on_a_temperature_out_of_bounds(tmp_path, value):
    rows = history()
    rows.loc[3, "temperature"] = value
    assert "temperature is above 0 and at most 100: found 1 of 40" in gate_error(pretrain(rows), tmp_path)


def test_pretrain_fails_on_a_seed_without_a_curve(tmp_path):
    rows = history()
    assert "every seed has a curve: found 1" in gate_error(pretrain(rows[rows["seed"] == 0]), tmp_path)


# --- evaluate -----------------------------------------------------------------------------------------------------

EVALUATE = EvaluateConfig(benchmarks={"scenes": {"kind": "scenes", "size": 100}}, min_score_over_chance=2)


def scores() -> pd.DataFrame:
    metrics = ["short.image_to_text.r1", "short.text_to_image.r1", "long.image_to_text.r1"]
    rows = [("scenes", seed, metric, 0.5, 0.01) for seed in (0, 1) for metric in metrics]
    return pd.DataFrame(rows, columns=["benchmark", "seed", "metric", "value", "chance"])


def evaluate(rows: pd.DataFrame) -> Callable[[Path], list[Check]]:
    return lambda report: gate_evaluate(EVALUATE, rows, report)


def test_evaluate_passes(tmp_path):
    rows = scores()
    rows.loc[2, "value"] = 0.0  # long text may be at chance
    assert all(check.success for check in evaluate(rows)(tmp_path))


@pytest.mark.parametrize("value", [1.5, -0.1])
def test_evaluate_fails_on_a_score_outside_0_and_1(tmp_path, value):
    rows = scores()
    rows.loc[5, "value"] = value
    line = gate_error(evaluate(rows), tmp_path)
    assert line == f"every score is from 0 to 1: found 1 of 6 do not: scenes long.image_to_text.r1 seed 1 ({value})"


def test_evaluate_fails_on_a_missing_score(tmp_path):
    rows = scores()
    rows.loc[5, "value"] = np.nan
    assert "every score is a number: found 1 of 6 do not: scenes long" in gate_error(evaluate(rows), tmp_path)


def test_evaluate_fails_on_short_text_at_chance(tmp_path):
    rows = scores()
    rows.loc[1, "value"] = 0.015
    line = gate_error(evaluate(rows), tmp_path)
    assert "is at least 2 times chance: found 1 of 4 do not: scenes short.text_to_image.r1 seed 0 (1.5)" in line


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["long.image_to_text.r1", "classification.top1"])
def test_evaluate_checks_long_text_and_classes_where_there_is_no_short_text(tmp_path, metric):
    other = scores().loc[[2, 5]].assign(benchmark="other", metric=metric)
    rows = pd.concat([scores(), other], ignore_index=True)
    assert all(check.success for check in evaluate(rows)(tmp_path))
    rows.loc[7, "value"] = 0.015
    line = gate_error(evaluate(rows), tmp_path)
    assert f"is at least 2 times chance: found 1 of 6 do not: other {metric} seed 1 (1.5)" in line


def test_a_model_of_long_captions_is_checked_on_long_text(tmp_path):
    rows = scores()
    rows.loc[1, "value"] = 0.0
    assert all(check.success for check in gate_evaluate(EVALUATE, rows, tmp_path / "a", learns_short=False))
    short = scores().loc[[0, 3]].assign(benchmark="short-only", value=0.0)
    both = pd.concat([rows, short], ignore_index=True)
    assert all(check.success for check in gate_evaluate(EVALUATE, both, tmp_path / "c", learns_short=False))
    assert all(check.success for check in gate_evaluate(EVALUATE, short, tmp_path / "d", learns_short=False))
    rows.loc[5, "value"] = 0.015
    line = gate_error(lambda report: gate_evaluate(EVALUATE, rows, report, learns_short=False), tmp_path / "b")
    assert "R@1 of long text (or top-1) is at least 2 times chance: found 1 of 2 do not: scenes long" in line


def test_evaluate_fails_on_a_benchmark_without_a_score_to_check(tmp_path):
    other = scores().loc[[2]].assign(benchmark="other", metric="long.image_to_text.r5")
    line = gate_error(evaluate(pd.concat([scores(), other])), tmp_path)
    assert line == "every benchmark has R@1 or top-1 accuracy: found 1 (other)"


def test_evaluate_fails_without_a_score(tmp_path):
    assert "there are scores: found 0" in gate_error(evaluate(scores()[:0]), tmp_path)


# --- evaluate: comparison with the starting model -----------------------------------------------------------------


def with_start(limit: float, start: dict[str, float], rows: pd.DataFrame) -> Callable[[Path], list[Check]]:
    settings = EVALUATE.model_copy(update={"max_short_text_loss": limit, "baselines": ["start"]})
    return lambda report: gate_evaluate(settings, rows, report, start)


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "start"), [(0.5, 0.3), (0.38, 0.4), (0.5, 0.0)])  # 1 - 0.38 / 0.4 > 0.05
def test_a_model_may_lose_recall_of_its_start_up_to_the_limit(tmp_path, trained, start):
    checks = with_start(0.05, {"scenes": start}, scores().assign(value=trained))(tmp_path)
    assert all(check.success for check in checks)
    assert [check.key for check in checks][-1] == "evaluate.max_short_text_loss"


@pytest.mark.slow
def test_a_larger_loss_of_recall_fails_and_shows_both_scores(tmp_path):
    rows = scores()
    rows.loc[rows["seed"] == 1, "value"] = [0.3, 0.5, 0.9]
    line = gate_error(with_start(0.1, {"scenes": 0.5}, rows), tmp_path)
    assert line == (
        "R@1 of short text (mean of both directions) is at most 10 % below the start's; otherwise give short texts a "
        "larger share of the loss, lower the learning rate or train fewer steps: found 1 of 2 do not: scenes seed 1: "
        "R@1 40 %, start 50 % (20 %); evaluate.max_short_text_loss in params.yaml sets the limit"
    )


@pytest.mark.slow
def test_the_start_is_not_compared_without_a_limit(tmp_path):
    checks = gate_evaluate(EVALUATE, scores(), tmp_path, {"scenes": 1.0})
    assert not any(check.key == "evaluate.max_short_text_loss" for check in checks)


@pytest.mark.slow
def test_a_limit_needs_short_texts_and_scores_of_the_start(tmp_path):
    rows = scores()
    line = gate_error(with_start(0.1, {}, rows[rows["metric"] == "long.image_to_text.r1"]), tmp_path)
    assert line.startswith("a benchmark has short texts to compare with the start; add one, or set the limit to null")
    with pytest.raises(ValueError, match="benchmark scenes: the scores of `start` do not include it; run `dvc repro"):
        with_start(0.1, {"other": 0.5}, rows)(tmp_path)


# --- report -------------------------------------------------------------------------------------------------------

PAGE = (
    '<html><style>p {background: url("data:image/png;base64,xx")}</style>'
    '<a href="https://arxiv.org/abs/2410.05249">paper</a><a href="#top">up</a><img src="data:image/png;base64,xx">'
)


def test_report_passes(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(PAGE)
    assert all(check.success for check in gate_report(page, 1, tmp_path / "report"))


@pytest.mark.parametrize(
    "extra",
    [
        '<img src="https://example.org/a.png">',
        '<script src="http://example.org/a.js"></script>',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        '<img src="figures/a.png">',
        "<style>@import url('https://example.org/a.css')</style>",
        '<style>@import "a.css";</style>',
        '<p style="background: url(figures/a.png)">',
    ],
)
def test_report_fails_on_a_page_that_loads_another_file(tmp_path, extra):
    page = tmp_path / "index.html"
    page.write_text(PAGE + extra)
    assert "index.html loads no other file: found 1 (" in gate_error(
        lambda to: gate_report(page, 1, to), tmp_path / "report"
    )


def test_report_fails_on_missing_images(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(PAGE)
    assert "shows at least 2 images: found 1" in gate_error(
        lambda report: gate_report(page, 2, report), tmp_path / "report"
    )


def test_report_fails_without_a_page(tmp_path):
    line = gate_error(lambda report: gate_report(tmp_path / "index.html", 0, report), tmp_path / "report")
    assert "index.html exists and is not empty (bytes): found 0" in line


def test_report_fails_on_a_broken_link(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(PAGE + '<a href="data-docs/ingest/index.html">pages</a>')
    line = "links only to existing files: found 1 (data-docs/ingest/index.html)"
    assert line in gate_error(lambda report: gate_report(page, 1, report), tmp_path / "report")
    (tmp_path / "data-docs" / "ingest").mkdir(parents=True)
    (tmp_path / "data-docs" / "ingest" / "index.html").touch()
    gate_report(page, 1, tmp_path / "report")
