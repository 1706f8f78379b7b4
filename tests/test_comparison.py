"""The comparison on MLflow's page, as stored in its tag and as shown by a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from flows.runtime.servers import listen, mlflow_server
from lotlip.evaluate.records import BenchmarkScores
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.records import Run
from lotlip.tracking.comparison import SHARED_VIEW, ComparedRun, address, decode, run_note, view, view_name
from lotlip.tracking.mlflow import NOTE, Tracker
from tests.browser import TIMEOUT, chromium, needs_chromium

SCORES = ("scenes.long.text_to_image.r1", "scenes.short.text_to_image.r1", "scenes.long.text_to_image.r5")


def run(ablation: str, seed: int = 0, **parameters: str) -> ComparedRun:
    return ComparedRun(
        {"seed": str(seed), **parameters}, [*SCORES, "train.loss"], {"ablation": ablation, "seed": str(seed)}
    )


def cards(state: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [card for card in state["compareRunCharts"] if card["type"] == kind]


def test_charts_show_what_differs_between_runs():
    state = decode(
        view([run("a", **{"text.corner_tokens": "0", "x": "1"}), run("b", **{"text.corner_tokens": "2", "x": "1"})])
    )
    assert [card["metricKey"] for card in cards(state, "BAR")] == list(SCORES[:2])  # long text first; R@5 is hidden
    assert {card["xaxis"]["key"] for card in cards(state, "SCATTER")} == {"text.corner_tokens"}  # not x
    assert cards(state, "PARALLEL") == []  # scatter charts suffice for one parameter
    assert [card["metricKey"] for card in cards(state, "LINE")] == ["train.loss"]
    assert state["selectedColumns"] == [
        "tags.`ablation`",
        "tags.`seed`",
        "params.`text.corner_tokens`",
        *(f"metrics.`{name}`" for name in SCORES[:2]),
    ]
    assert state["orderByKey"] == f"metrics.`{SCORES[0]}`"


def test_several_differences_are_a_chart_of_parallel_coordinates():
    state = decode(
        view(
            [
                run("a", **{"other": "1", "long_texts.sub_captions": "0"}),
                run("b", **{"other": "2", "long_texts.sub_captions": "3"}),
            ]
        )
    )
    (parallel,) = cards(state, "PARALLEL")
    assert parallel["selectedParams"] == ["long_texts.sub_captions", "other"]  # parameters of the paper come first
    assert parallel["selectedMetrics"] == list(SCORES[:2])


def test_every_chart_has_its_section():
    state = decode(view([run("a", **{"other": "1", "text.corner_mask": "True"}), run("b", **{"other": "2"})]))
    known = {section["uuid"] for section in state["compareRunSections"]}
    assert {card["metricSectionId"] for card in state["compareRunCharts"]} <= known
    uuids = [card["uuid"] for card in state["compareRunCharts"]]
    assert len(set(uuids)) == len(uuids)


def test_seeds_are_averaged_unless_that_would_mix_settings():
    several = [run("a", 0), run("a", 1), run("b", 0)]
    grouped = decode(view(several))["groupBy"]
    assert grouped == {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "ablation"}]}
    assert decode(view([*several, run("a", 1, steps="9")]))["groupBy"] is None  # a seed occurs twice
    assert decode(view([run("a"), run("b")]))["groupBy"] is None


def test_a_sweep_shows_only_its_runs():
    assert decode(view([run("a")], "night 1"))["searchFilter"] == "tags.`sweep.night 1` LIKE '%'"
    assert decode(view([run("a")]))["searchFilter"] == ""
    assert address("http://h:1/", "7", "a/b") == (
        "http://h:1/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=sweep-a%2Fb"
    )


def test_a_view_of_no_runs_can_be_opened():
    assert decode(view([]))["compareRunCharts"] == []


def test_a_view_of_many_parameters_fits_into_the_tag():
    parameters = [{f"section.parameter_{j}": str(i * j) for j in range(60)} for i in range(1, 3)]
    assert len(view([run("a", i, **each) for i, each in enumerate(parameters)])) < 20_000  # MLflow's limit


def write_run(ablation, config):
    """The run.json of an ablation."""
    return Run(ablation=ablation, config=config, data_hash="", git_commit="", fingerprints={})


def test_the_note_of_a_run_describes_it():
    base = PretrainConfig()
    config = base.model_copy(update={"text": base.text.model_copy(update={"corner_tokens": 4})}).model_dump(mode="json")
    results = {
        "scenes": BenchmarkScores(
            seeds={1: {"long.text_to_image.r1": 0.4821, "long.text_to_image.r5": 0.9}},
            intervals={1: {"long.text_to_image.r1": (0.451, 0.517)}},
        )
    }
    note = run_note(write_run("lotlip-m4", config), "1", base, results)
    assert "`lotlip-m4`, seed 1: 4 corner tokens behind the mask" in note
    assert "Differences from `pretrain` of params.yaml: text.corner_tokens = 4." in note
    assert "| scenes.long.text_to_image.r1 | 48.2 | 45.1 – 51.7 |" in note
    assert "r5" not in note


LOGIN = "lotlip:secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Tracker]]:
    """MLflow's server with runs of two sweeps."""
    folder = tmp_path_factory.mktemp("comparison")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        store = f"sqlite:///{folder / 'mlflow.db'}"
        tracker = Tracker(store, "compared")
        for corners in (0, 2, 4):
            for sweep in ("first", "second"):
                name = f"m{corners}-{sweep}"
                parameters = {
                    "text": {"corner_tokens": corners},
                    "long_texts": {"sub_captions": corners + 1},
                    "seed": 0,
                }
                tags = {"ablation": name, "seed": "0", f"sweep.{sweep}": "a flow run"}
                run_id = tracker.ensure_run(name, name, tags, parameters)
                tracker.log_metrics(run_id, dict.fromkeys(SCORES, 0.1 * (corners + 1)))
                tracker.log_history(run_id, [{"step": step, "loss": 3.0 - step / 10} for step in (10, 20)])
        yield stack.enter_context(mlflow_server(listen(), store, LOGIN)), tracker


@pytest.mark.integration
def test_the_experiment_has_a_note_and_views(server):
    address_, tracker = server
    link = tracker.comparison_link(address_)
    experiment = tracker.client.get_experiment_by_name("compared")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert link.removeprefix(f"{address_}/") in experiment.tags[NOTE]
    before = dict(experiment.tags)
    assert Tracker(tracker.uri, "compared").comparison_link(address_) == link
    assert tracker.client.get_experiment_by_name("compared").tags == before
    assert SHARED_VIEW + view_name(None) in before


@pytest.mark.integration
def test_a_sweep_name_that_breaks_the_filter_is_an_error(server):
    with pytest.raises(ValueError, match="quotation mark"):
        server[1].comparison_link(server[0], "tonight's")


@pytest.mark.system
@needs_chromium
def test_a_browser_shows_the_charts(server):
    link = server[1].comparison_link(server[0], "second")
    user, _, password = LOGIN.partition(":")
    credentials = {"username": user, "password": password}  # fetch() fails with credentials in the URL
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1600, "height": 2400}, http_credentials=credentials)
        page.set_default_timeout(TIMEOUT)
        page.goto(link, wait_until="commit")
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 4")  # the visible charts
        shown = page.inner_text("body")
    for title in (
        "R@1 by everything that differs",
        "R@1 by corner tokens",
        "R@1 by sub-captions",
        "Training",
        "m4-second",
    ):
        assert title in shown
    assert "3 matching runs" in " ".join(shown.split())
    assert "-first" not in shown  # from the other sweep
    assert "Error loading shared view" not in shown


def test_the_note_has_the_best_possible_score_when_texts_repeat():
    run = write_run("lit", {})
    scores = {"short.image_to_text.r1": 0.25, "short.text_to_image.r1": 0.125}
    result = BenchmarkScores(seeds={0: scores}, ceiling={"short.image_to_text.r1": 0.5069})
    note = run_note(run, "0", None, {"own": result})
    assert "| own.short.image_to_text.r1 | 25.0 |  | 50.7 |" in note
    assert "| own.short.text_to_image.r1 | 12.5 |  | 100.0 |" in note
    assert "best possible" not in run_note(run, "0", None, {"own": BenchmarkScores(seeds={0: scores})})
