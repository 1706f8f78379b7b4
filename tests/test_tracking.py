"""MLflow: one run for a fingerprint, curves without gaps or doubles, and a lost store rebuilt from files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lotlip.config import flatten
from lotlip.files import write_json
from lotlip.tracking import LONGEST_PARAMETER, MlflowSink, NullSink, Tracker, open_sink

HISTORY = [{"step": step, "loss": 3.0 - step / 10, "learning_rate": 0.1 / step} for step in range(10, 130, 10)]
_numbers = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store of this module; making its tables takes seconds. Artifacts go beside it."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        yield f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def experiment() -> str:
    return f"test-{next(_numbers)}"


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(tracking_uri=store)


def runs(client: MlflowClient, experiment: str) -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def curve(client: MlflowClient, run_id: str, name: str = "train.loss") -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def expected(name: str = "loss") -> list[tuple[int, float]]:
    return [(int(point["step"]), point[name]) for point in HISTORY]


def test_a_fingerprint_has_one_run(store, experiment, client):
    first = Tracker(store, experiment).ensure_run("f1", "lotlip-seed0", {"ablation": "lotlip"}, {"steps": 5})
    again = Tracker(store, experiment).ensure_run("f1", "another name", {}, {"steps": 6})
    other = Tracker(store, experiment).ensure_run("f2", "lotlip-seed1", {"ablation": "lotlip"}, {"steps": 5})
    assert first == again != other
    assert len(runs(client, experiment)) == 2
    run = client.get_run(first)
    assert run.info.run_name == "lotlip-seed0"
    assert run.data.tags["ablation"] == "lotlip"
    assert run.data.params == {"steps": "5"}


def test_parameters_are_shown_by_dotted_names(store, experiment, client):
    parameters = {"text": {"corner_tokens": 2, "config": {"hidden_size": 8}}, "seeds": [0], "long": "x" * 9000}
    run = client.get_run(Tracker(store, experiment).ensure_run("f", "n", {}, parameters))
    assert run.data.params.pop("long") == "x" * LONGEST_PARAMETER
    assert run.data.params == {"text.corner_tokens": "2", "text.config.hidden_size": "8", "seeds": "[0]"}


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1]}) == {"a.b.c": 1, "a.d": None, "e": [1]}
    assert flatten({}) == {}


def test_a_sink_sends_every_step(store, experiment, client):
    run_id = Tracker(store, experiment).ensure_run("f", "n", {}, {})
    sink = MlflowSink(store, run_id, steps_held=5)
    for number, point in enumerate(HISTORY, start=1):
        sink.log({"loss": point["loss"]}, int(point["step"]))
        assert len(curve(client, run_id)) == number // 5 * 5  # held back until there are enough
    sink.close()
    assert curve(client, run_id) == expected()
    sink.close()
    assert curve(client, run_id) == expected()


def test_history_is_not_sent_twice(store, experiment, client):
    tracker = Tracker(store, experiment)
    run_id = tracker.ensure_run("f", "n", {}, {})
    for _ in range(2):
        tracker.log_history(run_id, HISTORY)
        assert curve(client, run_id) == expected()
        assert curve(client, run_id, "train.learning_rate") == expected("learning_rate")
    assert curve(client, run_id, "train.step") == []
    tracker.log_history(run_id, [])


def test_history_fills_what_a_killed_run_did_not_send(store, experiment, client):
    tracker = Tracker(store, experiment)
    run_id = tracker.ensure_run("f", "n", {}, {})
    sink = MlflowSink(store, run_id)
    for point in HISTORY[:3] + HISTORY[8:]:
        sink.log({"loss": point["loss"]}, int(point["step"]))
    sink.close()
    tracker.log_history(run_id, HISTORY)
    assert curve(client, run_id) == expected()


def model(folder: Path) -> dict[str, Any]:
    """A trained ablation on disk, as run.json tells of it."""
    for seed in (0, 3):
        (folder / f"seed-{seed}").mkdir(parents=True)
        write_json(folder / f"seed-{seed}" / "history.json", [{**point, "seed": seed} for point in HISTORY])
        (folder / f"seed-{seed}" / "model.safetensors").write_text("weights")
    return {
        "ablation": "lotlip",
        "config": {"steps": 12, "seeds": [0, 3]},
        "data_hash": "d" * 8,
        "git_commit": "c" * 8,
        "fingerprints": {"0": "abc-0", "3": "abc-3"},
    }


def test_a_lost_store_is_rebuilt_from_files(store, experiment, client, tmp_path):
    run = model(tmp_path)
    scores = {"long.text_to_image.r1": 0.25}
    results = {"scenes": {"seeds": {"0": scores, "3": {**scores, "long.text_to_image.r1": 0.5}}}}
    for _ in range(2):  # the second time nothing is added
        Tracker(store, experiment).log_scores(run, results, tmp_path)
        found = {made.data.tags["seed"]: made for made in runs(client, experiment)}
        assert sorted(found) == ["0", "3"]
        for seed, score in (("0", 0.25), ("3", 0.5)):
            made = found[seed]
            assert made.info.status == "FINISHED"
            assert made.info.run_name == f"lotlip-seed{seed}"
            assert made.data.tags["data_hash"] == "d" * 8
            assert made.data.params["seed"] == seed
            assert made.data.metrics["scenes.long.text_to_image.r1"] == score
            assert curve(client, made.info.run_id) == expected()
            files = {file.path for file in client.list_artifacts(made.info.run_id, "model")}
            assert files == {"model/history.json", "model/model.safetensors"}


def test_planned_and_finished_runs_are_the_same(store, experiment, client, tmp_path):
    run = model(tmp_path)
    planned = Tracker(store, experiment).ensure_runs(run)
    assert planned.keys() == {"0", "3"}
    assert Tracker(store, experiment).ensure_runs(run) == planned


def test_tags_and_the_end_of_a_run(store, experiment, client):
    tracker = Tracker(store, experiment)
    run_id = tracker.ensure_run("f", "n", {}, {})
    tracker.set_tags(run_id, {"model": "models/lotlip"})
    tracker.finish(run_id, "FAILED")
    run = client.get_run(run_id)
    assert run.data.tags["model"] == "models/lotlip"
    assert run.info.status == "FAILED"


def test_the_environment_goes_before_the_parameter(store, experiment, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracker = Tracker("sqlite:////nowhere/at/all.db", experiment)
    assert tracker.uri == store
    tracker.ensure_run("f", "n", {}, {})
    assert len(runs(client, experiment)) == 1


def test_without_a_run_nothing_is_tracked():
    sink = open_sink("sqlite:////nowhere/at/all.db", None)
    assert isinstance(sink, NullSink)
    sink.log({"loss": 1.0}, 1)
    sink.close()


def test_with_a_run_its_curves_go_there(store, experiment):
    run_id = Tracker(store, experiment).ensure_run("f", "n", {}, {})
    assert isinstance(open_sink(store, run_id), MlflowSink)
