"""The stage `baselines` scores existing models like `lotlip evaluate`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.reproduce import remove_outdated_baselines
from flows.runtime import stage as stages
from flows.runtime.scratch import StageFailed
from flows.stages.baselines import baselines
from lotlip.config.params import load_params
from lotlip.evaluate import compare
from lotlip.evaluate.records import Baselines
from lotlip.evaluate.score_names import MAIN
from tests.conftest import TinySample
from tests.test_cli import program
from tests.test_compare import SCENES, write_scenes
from tests.tiny_baselines import save_clip, save_siglip
from tests.tiny_model import save_tiny_model

START = "data/image-tower/start"
SCORES = Path("metrics/baselines/scores.json")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_samples: list[TinySample]) -> Path:
    """A project with scenes, in which the flow runs without Prefect."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(stages, "_held", {})
    write_scenes(Path("data/ingest"), tiny_samples)
    return tmp_path


def score(*models: str) -> dict[str, Any]:
    """Runs the stage, and returns the scores by model."""
    params = {
        "ingest": {"source": {"kind": "folder", "path": "images"}},
        "image_tower": {"kind": "scenes"},
        "evaluate": {"benchmarks": {"scenes": {"kind": "scenes", "size": SCENES}}, "baselines": list(models)},
        "pretrain": {"long_texts": {"sub_captions": 0}},
        "ablations": {"lit": {}},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    baselines.fn()
    scores = Baselines.load(SCORES).models
    assert [one.model for one in scores] == list(models)
    return {one.model: one for one in scores}


@pytest.mark.slow
def test_scores_equal_those_of_lotlip_evaluate(project, monkeypatch, capsys, tiny_tower):
    save_clip(project / "clip")
    save_siglip(project / "siglip")
    save_tiny_model(project / START, tiny_tower)
    scores = score("start", "clip", "siglip")
    arguments = ["--benchmark", "scenes", "--data", "data/ingest", "--json"]
    assert program(monkeypatch, "evaluate", START, "clip", "siglip", *arguments) == 0
    expected = {one["model"]: one for one in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]}
    for name, address in (("start", START), ("clip", "clip"), ("siglip", "siglip")):
        result = scores[name].benchmarks["scenes"]
        assert result.scores == pytest.approx(expected[address]["scores"])
        assert result.protocol == {**expected[address]["protocol"], "command": "python -m flows baselines"}
    assert scores["start"].sha256 is None and scores["clip"].sha256 != scores["siglip"].sha256
    short = [expected[START]["scores"][metric] for metric in MAIN["short"]]
    stored = json.loads((SCORES.parent / "start.json").read_text())
    assert stored == {"short_text_r1": {"scenes": pytest.approx(sum(short) / 2)}}
    record = json.loads(Path("metrics/stages/baselines.json").read_text())
    assert record["samples"] > 3 * SCENES


def test_no_baselines_give_no_scores(project):
    assert score() == {}
    assert json.loads((SCORES.parent / "start.json").read_text()) == {"short_text_r1": {}}


def test_an_unknown_name_is_an_error_before_scoring(project, monkeypatch):
    monkeypatch.setattr(compare, "evaluate", lambda *_: pytest.fail("a model was scored"))
    save_clip(project / "clip")
    with pytest.raises(ValueError, match="there is no folder no/such-model, and no model of that name"):
        score("clip", "no/such-model")
    assert not SCORES.exists()


def test_the_start_needs_its_image_tower(project):
    with pytest.raises(StageFailed, match=r"start needs pretrain\.start and image_tower: {kind: start}; set both"):
        score("start")


@pytest.mark.slow
def test_scores_of_changed_files_are_removed_so_that_dvc_runs_the_stage(project, capsys):
    save_clip(project / "clip")
    score("clip")
    remove_outdated_baselines(load_params())
    assert SCORES.exists() and not capsys.readouterr().out
    with Path("clip/config.json").open("a") as file:
        file.write(" ")
    remove_outdated_baselines(load_params())
    assert not SCORES.exists()
    assert "scored again: clip" in capsys.readouterr().out
