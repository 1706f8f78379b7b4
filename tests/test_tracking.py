"""MLflow: one run for a fingerprint, curves without gaps or doubles, and a lost store rebuilt from files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from mlflow import MlflowClient

from lotlip.core.files import write_json
from lotlip.core.section import flatten
from lotlip.evaluate.records import BenchmarkScores
from lotlip.pretrain.records import Run
from lotlip.tracking.mlflow import (
    FINGERPRINT,
    LONGEST_PARAMETER,
    MlflowSink,
    NullSink,
    Tracker,
    check_store,
    open_sink,
    warn_on_failure,
)
from tests.tiny_model import save_tiny_model

HISTORY = [{"step": step, "loss": 3.0 - step / 10, "learning_rate": 0.1 / step} for step in range(10, 130, 10)]
ROOT = Path(__file__).parent.parent
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


@pytest.mark.integration
def test_two_processes_that_create_a_store_at_once_share_it(tmp_path):
    script = """
import sys
import mlflow.store.tracking.sqlalchemy_store  # the seconds of the import, before both start at once
from lotlip.tracking.mlflow import Tracker

print("ready", flush=True)
sys.stdin.readline()
print(Tracker(sys.argv[1], "shared").ensure_run(sys.argv[2], "name", {}, {}), flush=True)
"""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = {**os.environ, "LOTLIP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [
        subprocess.Popen([sys.executable, "-c", script, store, name], env=environment, cwd=tmp_path, text=True, **pipes)
        for name in ("first", "second")
    ]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], ended
    finally:
        for process in both:
            process.kill()
    assert {run.info.run_id for run in runs(MlflowClient(store), "shared")} == {out.strip() for out, _ in ended}


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
        sink._thread.submit(lambda: None).result()  # what was handed to the thread before has been sent
        assert len(curve(client, run_id)) == number // 5 * 5  # held back until there are enough
    sink.close()
    assert curve(client, run_id) == expected()
    sink.close()
    assert curve(client, run_id) == expected()


def test_what_cannot_be_sent_is_an_error(store, experiment):
    Tracker(store, experiment)
    sink = MlflowSink(store, "0" * 32)
    sink.log({"loss": 1.0}, 1)
    with pytest.raises(Exception, match="0000"):
        sink.close()


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a server that has ended."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://user:hidden@127.0.0.1:{port}"


def test_training_goes_on_without_its_store_and_says_so_once(dead):
    said: list[str] = []
    with closing(open_sink(dead, "0" * 32, said.append)) as sink:
        for point in HISTORY * 5:
            sink.log({"loss": point["loss"]}, int(point["step"]))
    (line,) = said
    assert f"MLflow at {dead.replace('user:hidden@', '')}" in line
    assert "python -m flows.restore" in line
    assert "\n" not in line
    assert "hidden" not in line


def test_a_store_that_fails_half_way_loses_no_steps_for_good(store, experiment, client):
    """What was not sent live is sent when the store is back."""
    tracker, said = Tracker(store, experiment), list[str]()
    run_id = tracker.ensure_run("f", "n", {}, {})
    sink = MlflowSink(store, run_id, steps_held=2, warn=said.append)
    for point in HISTORY[:4]:
        sink.log({"loss": point["loss"], "learning_rate": point["learning_rate"]}, int(point["step"]))
    sink._thread.submit(lambda: None).result()
    sink._run_id = "0" * 32  # as if it were gone
    for point in HISTORY[4:]:
        sink.log({"loss": point["loss"], "learning_rate": point["learning_rate"]}, int(point["step"]))
    sink.close()
    assert len(said) == 1
    assert curve(client, run_id) == expected()[:4]
    tracker.log_history(run_id, HISTORY)
    assert curve(client, run_id) == expected()


@pytest.mark.parametrize("damage", ["truncated", "truncated in a page", "garbage", "a page of zeros"])
def test_a_damaged_store_is_named_with_its_remedy(store, tmp_path, damage):
    Tracker(store, "kept")
    good = Path(store.removeprefix("sqlite:///")).read_bytes()
    page, half = 4096, len(good) // 2
    damaged = {
        "truncated": good[: half // page * page],
        "truncated in a page": good[: page + 7],
        "garbage": b"garbage " * 1000,
        "a page of zeros": good[: 4 * page] + bytes(page) + good[5 * page :],
    }[damage]
    file = tmp_path / "mlflow.db"
    file.write_bytes(damaged)
    address = f"sqlite:///{file}"
    with pytest.raises(ValueError, match=r"mlflow\.db.*flows\.restore"):
        Tracker(address, "lotlip")
    said: list[str] = []
    with warn_on_failure(address, said.append):
        Tracker(address, "lotlip")
    assert len(said) == 1
    assert str(file) in said[0]
    assert "flows.restore" in said[0]
    assert file.read_bytes() == damaged


def test_a_store_that_is_not_a_file_or_is_not_there_yet_is_left_to_mlflow(store, tmp_path):
    check_store(store)
    check_store(f"sqlite:///{tmp_path / 'new.db'}")
    assert not (tmp_path / "new.db").exists()
    check_store("http://127.0.0.1:1")


def test_a_failure_of_tracking_is_a_warning_that_names_the_store(dead, monkeypatch):
    said: list[str] = []
    with warn_on_failure("sqlite:///mlflow.db", said.append):
        pass
    assert said == []
    with warn_on_failure(dead, said.append):
        Tracker(dead, "nothing")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    with warn_on_failure("sqlite:///mlflow.db", said.append):
        Tracker("sqlite:///mlflow.db", "nothing")
    assert len(said) == 2
    assert all("127.0.0.1" in line and "flows.restore" in line and "hidden" not in line for line in said)


def test_a_comparison_sees_runs_beyond_the_first_page(store, experiment, monkeypatch):
    monkeypatch.setattr("lotlip.tracking.mlflow.PAGE", 2)
    seen: list[Any] = []
    monkeypatch.setattr("lotlip.tracking.comparison.view", lambda runs, sweep: str(seen.append(len(runs))))
    tracker = Tracker(store, experiment)
    for number in range(5):
        tracker.ensure_run(f"f{number}", f"n{number}", {}, {})
    tracker.comparison_link("http://127.0.0.1:5000")
    assert seen == [5]


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> Path:
    """A saved model."""
    return save_tiny_model(tmp_path_factory.mktemp("tracking") / "model", tiny_tower)


def trained(folder: Path, saved: Path) -> Run:
    """A trained ablation on disk, as run.json tells of it."""
    for seed in (0, 3):
        shutil.copytree(saved, folder / f"seed-{seed}")
        write_json(folder / f"seed-{seed}" / "history.json", [{**point, "seed": seed} for point in HISTORY])
    return Run(
        ablation="lotlip",
        config={"steps": 12, "seeds": [0, 3]},
        data_hash="d" * 8,
        git_commit="c" * 8,
        fingerprints={"0": "abc-0", "3": "abc-3"},
    )


def scored(first: float = 0.25, **more: Any) -> dict[str, BenchmarkScores]:
    """What evaluation found of both seeds."""
    seeds = {
        0: {"long.text_to_image.r1": first, "short.text_to_image.r1": 0.125},
        3: {"long.text_to_image.r1": 0.5, "short.text_to_image.r1": 0.125},
    }
    protocol = {"image_size": 16, "texts": "unseen frames"}
    return {"scenes": BenchmarkScores(seeds=seeds, protocol=protocol, **more)}


def logged_models(client: MlflowClient, experiment: str) -> dict[str, Any]:
    """Seed → MLflow's model; each seed has one."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    models = client.search_logged_models([found.experiment_id])
    by_seed = {made.tags["seed"]: made for made in models}
    assert len(models) == len(by_seed)
    return by_seed


def files(made: Any) -> dict[str, bytes]:
    """All that MLflow stores of a model, by path."""
    folder = Path(made.artifact_location.removeprefix("file://"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_lost_store_is_rebuilt_from_files(store, experiment, client, tmp_path, saved):
    run = trained(tmp_path, saved)
    for _ in range(2):  # the second time nothing is added
        Tracker(store, experiment).log_scores(run, scored(), tmp_path)
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
            assert {file.path for file in client.list_artifacts(made.info.run_id)} == {"figures"}
            assert client.list_artifacts(made.info.run_id, "figures/scenes")


def test_where_attention_goes_is_logged_with_the_pictures_of_the_first_seed(store, experiment, client, tmp_path, saved):
    attention = {
        seed: {"values": {"on_named_object": share}, "intervals": {}, "left_out": {}}
        for seed, share in ((0, 0.25), (3, 0.5))
    }
    results = scored(attention=attention)
    pictures = tmp_path / "attention"
    pictures.mkdir()
    for name in ("scenes-relevance", "scenes-val-relevance"):  # the second is of another benchmark
        (pictures / f"{name}.png").write_bytes(name.encode())
    Tracker(store, experiment).log_scores(trained(tmp_path, saved), results, tmp_path, pictures)
    for run in runs(client, experiment):
        seed = run.data.tags["seed"]
        assert run.data.metrics["scenes.attention.on_named_object"] == {"0": 0.25, "3": 0.5}[seed]
        files_there = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures/scenes")}
        expected_files = {"loss.png", "recall.png"} | ({"attention-relevance.png"} if seed == "0" else set())
        assert files_there == expected_files


def test_every_seeds_model_is_one_of_its_run(store, experiment, client, tmp_path, saved):
    run = trained(tmp_path, saved)
    before: dict[str, dict[str, bytes]] = {}
    for _ in range(2):  # the second time nothing is added or changed
        Tracker(store, experiment).log_scores(run, scored(), tmp_path)
        models = logged_models(client, experiment)
        assert sorted(models) == ["0", "3"]
        for seed, made in models.items():
            assert made.status == "READY"
            assert made.name == f"lotlip-seed{seed}"
            assert made.tags[FINGERPRINT] == f"abc-{seed}"
            assert made.tags["ablation"] == "lotlip"
            its_run = client.get_run(made.source_run_id)
            assert its_run.data.tags["seed"] == seed
            assert its_run.outputs is not None
            assert [output.model_id for output in its_run.outputs.model_outputs] == [made.model_id]
            metrics = [(metric.key, metric.value) for metric in made.metrics]
            assert sorted(metrics) == sorted(flatten(scored()["scenes"].seeds[int(seed)], "scenes.").items())
        now = {seed: files(made) for seed, made in models.items()}
        assert before in ({}, now)
        before = now
    for seed, found in before.items():
        folder = tmp_path / f"seed-{seed}"
        for name in ("history.json", "model.safetensors", "tokenizer.json"):
            assert found[f"data/{name}"] == (folder / name).read_bytes()
        provenance = json.loads(found["data/config.json"])["provenance"]
        assert provenance["scores"] == {"scenes": scored()["scenes"].seeds[int(seed)]}
        assert provenance["protocol"] == {"scenes": scored()["scenes"].protocol}
        assert b"unseen frames" in found["data/README.md"]
    assert json.loads((tmp_path / "seed-0" / "config.json").read_text())["provenance"] is None  # the stage's own stays


def test_a_model_that_the_store_has_is_not_sent_again(store, experiment, client, tmp_path, saved, monkeypatch):
    run = trained(tmp_path, saved)
    Tracker(store, experiment).log_scores(run, scored(), tmp_path)
    sent: list[str] = []
    send = MlflowClient.log_model_artifacts
    monkeypatch.setattr(
        MlflowClient, "log_model_artifacts", lambda self, model, folder: (sent.append(model), send(self, model, folder))
    )
    Tracker(store, experiment).log_scores(run, scored(), tmp_path)
    assert sent == []
    models = logged_models(client, experiment)
    shutil.rmtree(models["0"].artifact_location.removeprefix("file://"))
    Tracker(store, experiment).log_scores(run, scored(), tmp_path)
    assert sent == [models["0"].model_id]
    assert files(models["0"])
    Tracker(store, experiment).log_scores(run, scored(0.75), tmp_path)  # its card tells the scores
    assert sent == [models["0"].model_id] * 2


def test_a_model_is_loaded_from_the_store(store, experiment, client, tmp_path, saved, monkeypatch):
    import mlflow

    from lotlip.retrieval.embedding import Embedder

    Tracker(store, experiment).log_scores(trained(tmp_path, saved), scored(), tmp_path)
    made = logged_models(client, experiment)["3"]
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the model's code there
    mlflow.set_tracking_uri(store)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{made.model_id}")
    finally:
        mlflow.set_tracking_uri(None)
    assert loaded.metadata.run_id == made.source_run_id
    found = loaded.predict([{"text": "A red dog. It runs."}])
    np.testing.assert_allclose(found, Embedder(saved).texts(["A red dog. It runs."]), atol=1e-6)


def test_new_scores_take_the_place_of_the_old(store, experiment, client, tmp_path, saved):
    run = trained(tmp_path, saved)
    for score in (0.25, 0.75, 0.25, 0.75):
        Tracker(store, experiment).log_scores(run, scored(score), tmp_path)
    made = logged_models(client, experiment)["0"]
    of_long = [metric for metric in made.metrics if metric.key == "scenes.long.text_to_image.r1"]
    assert max(of_long, key=lambda metric: metric.timestamp).value == 0.75
    assert client.get_run(made.source_run_id).data.metrics["scenes.long.text_to_image.r1"] == 0.75
    config = json.loads(files(made)["data/config.json"])
    assert config["provenance"]["scores"]["scenes"]["long.text_to_image.r1"] == 0.75


def test_a_model_that_a_killed_process_left_is_finished(store, experiment, client, tmp_path, saved, monkeypatch):
    run = trained(tmp_path, saved)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lotlip.retrieval.serving.save_served_model", Mock(side_effect=KeyboardInterrupt))
        Tracker(store, experiment).log_scores(run, scored(), tmp_path)
    (left,) = logged_models(client, experiment).values()
    assert left.status == "PENDING"
    Tracker(store, experiment).log_scores(run, scored(), tmp_path)
    models = logged_models(client, experiment)
    assert {made.status for made in models.values()} == {"READY"}
    assert left.model_id in [made.model_id for made in models.values()]


def test_planned_and_finished_runs_are_the_same(store, experiment, client, tmp_path, saved):
    run = trained(tmp_path, saved)
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
    sink = open_sink("sqlite:////nowhere/at/all.db", None, print)
    assert isinstance(sink, NullSink)
    sink.log({"loss": 1.0}, 1)
    sink.close()


def test_with_a_run_its_curves_go_there(store, experiment):
    run_id = Tracker(store, experiment).ensure_run("f", "n", {}, {})
    assert isinstance(open_sink(store, run_id, print), MlflowSink)
