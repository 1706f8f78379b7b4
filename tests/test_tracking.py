"""MLflow: one run per fingerprint, curves without gaps or duplicates, and a lost store restored from files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow import __version__ as mlflow_version
from mlflow.store.db import utils as database

from lotlip.core.caches import lock
from lotlip.core.files import write_json
from lotlip.core.section import flatten
from lotlip.evaluate.records import BenchmarkScores
from lotlip.pretrain.records import Run
from lotlip.pretrain.sink import NullSink
from lotlip.tracking.mlflow import FINGERPRINT, LONGEST_PARAMETER, Tracker
from lotlip.tracking.sink import MlflowSink, open_sink
from lotlip.tracking.store import prepare_store, warn_on_failure
from tests.tiny_model import save_tiny_model

HISTORY = [{"step": step, "loss": 3.0 - step / 10, "learning_rate": 0.1 / step} for step in range(10, 130, 10)]
ROOT = Path(__file__).parent.parent
_numbers = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The store of this module, because creating its tables takes seconds. Artifacts are beside it."""
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
    stored = client.get_experiment_by_name(experiment)
    assert stored is not None
    return list(client.search_runs([stored.experiment_id]))


def curve(client: MlflowClient, run_id: str, name: str = "train.loss") -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def expected(name: str = "loss") -> list[tuple[int, float]]:
    return [(int(point["step"]), point[name]) for point in HISTORY]


def test_a_fingerprint_has_one_run(store, experiment, client):
    first = Tracker(store, experiment).ensure_run("f1", "lotlip-seed0", {"ablation": "lotlip"}, {"steps": 5})
    repeated = Tracker(store, experiment).ensure_run("f1", "another name", {}, {"steps": 6})
    other = Tracker(store, experiment).ensure_run("f2", "lotlip-seed1", {"ablation": "lotlip"}, {"steps": 5})
    assert first == repeated != other
    assert len(runs(client, experiment)) == 2
    run = client.get_run(first)
    assert run.info.run_name == "lotlip-seed0"
    assert run.data.tags["ablation"] == "lotlip"
    assert run.data.params == {"steps": "5"}


def test_an_experiment_may_be_created_by_another_program_meanwhile(store, monkeypatch):
    """A server has no lock for it."""
    first = Tracker(store, "created-meanwhile")
    found = MlflowClient.get_experiment_by_name
    answers = iter([None])
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda client, name: next(answers, found(client, name)))
    assert Tracker(store, "created-meanwhile")._experiment == first._experiment


@pytest.mark.integration
def test_two_processes_can_create_a_store_together(tmp_path):
    script = """
import sys
import mlflow.store.tracking.sqlalchemy_store  # takes seconds, so both processes import it before they start together
from lotlip.tracking.mlflow import Tracker

print("ready", flush=True)
sys.stdin.readline()
print(Tracker(sys.argv[1], "shared").ensure_run(sys.argv[2], "name", {}, {}), flush=True)
"""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = {**os.environ, "LOTLIP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, store, name], env=environment, cwd=tmp_path, text=True, **pipes)
        for name in ("first", "second")
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ended
    finally:
        for process in processes:
            process.kill()
    assert {run.info.run_id for run in runs(MlflowClient(store), "shared")} == {out.strip() for out, _ in ended}


def test_parameters_have_dotted_names(store, experiment, client):
    parameters = {"text": {"corner_tokens": 2, "config": {"hidden_size": 8}}, "seeds": [0], "long": "x" * 9000}
    run = client.get_run(Tracker(store, experiment).ensure_run("f", "n", {}, parameters))
    assert run.data.params.pop("long") == "x" * LONGEST_PARAMETER
    assert run.data.params == {"text.corner_tokens": "2", "text.config.hidden_size": "8", "seeds": "[0]"}


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1]}) == {"a.b.c": 1, "a.d": None, "e": [1]}
    assert flatten({}) == {}


def test_a_sink_sends_every_step_in_batches(store, experiment, client):
    run_id = Tracker(store, experiment).ensure_run("f", "n", {}, {})
    sink = MlflowSink(store, run_id, steps_held=5)
    for number, point in enumerate(HISTORY, start=1):
        sink.log({"loss": point["loss"]}, int(point["step"]))
        sink._thread.submit(lambda: None).result()  # waits for the thread
        assert len(curve(client, run_id)) == number // 5 * 5  # sent in batches of 5
    sink.close()
    assert curve(client, run_id) == expected()
    sink.close()
    assert curve(client, run_id) == expected()


def test_an_unknown_run_is_an_error(store, experiment):
    Tracker(store, experiment)
    sink = MlflowSink(store, "0" * 32)
    sink.log({"loss": 1.0}, 1)
    with pytest.raises(Exception, match="0000"):
        sink.close()


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a server that has stopped."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://user:hidden@127.0.0.1:{port}"


def test_training_continues_without_its_store_after_one_warning(dead_server):
    warnings: list[str] = []
    with closing(open_sink(dead_server, "0" * 32, warnings.append)) as sink:
        for point in HISTORY * 5:
            sink.log({"loss": point["loss"]}, int(point["step"]))
    (line,) = warnings
    assert f"MLflow at {dead_server.replace('user:hidden@', '')}" in line
    assert "python -m flows.restore" in line
    assert "\n" not in line
    assert "hidden" not in line


def test_steps_missed_by_a_failing_store_are_sent_later(store, experiment, client):
    """Steps that could not be sent live are sent when the store is back."""
    tracker, warnings = Tracker(store, experiment), list[str]()
    run_id = tracker.ensure_run("f", "n", {}, {})
    sink = MlflowSink(store, run_id, steps_held=2, warn=warnings.append)
    for point in HISTORY[:4]:
        sink.log({"loss": point["loss"], "learning_rate": point["learning_rate"]}, int(point["step"]))
    sink._thread.submit(lambda: None).result()
    sink._run_id = "0" * 32  # as if the run were gone
    for point in HISTORY[4:]:
        sink.log({"loss": point["loss"], "learning_rate": point["learning_rate"]}, int(point["step"]))
    sink.close()
    assert len(warnings) == 1
    assert curve(client, run_id) == expected()[:4]
    tracker.log_history(run_id, HISTORY)
    assert curve(client, run_id) == expected()


@pytest.mark.parametrize("damage", ["truncated", "truncated in a page", "garbage", "a page of zeros"])
def test_a_damaged_store_is_an_error_with_a_remedy(store, tmp_path, damage):
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
    warnings: list[str] = []
    with warn_on_failure(address, warnings.append):
        Tracker(address, "lotlip")
    assert len(warnings) == 1
    assert str(file) in warnings[0]
    assert "flows.restore" in warnings[0]
    assert file.read_bytes() == damaged


def test_a_new_store_is_a_copy_of_the_first_one(tmp_path, monkeypatch):
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    initialize = Mock(wraps=database._initialize_tables)
    monkeypatch.setattr(database, "_initialize_tables", initialize)
    for name in ("first", "second"):
        store = f"sqlite:///{tmp_path / name / 'mlflow.db'}"
        Tracker(store, name)
        experiments = {e.name: e.artifact_location for e in MlflowClient(tracking_uri=store).search_experiments()}
        assert set(experiments) == {"Default", name}
        assert all(place.startswith(str(tmp_path / "mlruns")) for place in experiments.values())
    assert initialize.call_count == 1


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "sqlite:///:memory:", "sqlite:///new.db?timeout=9", "sqlite:///."]
)
def test_other_stores_are_left_alone(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_store(uri)
    assert not list(tmp_path.iterdir())


def test_a_store_in_the_middle_of_its_creation_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("LOTLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mlflow.db").touch()
    opening = threading.Thread(target=prepare_store, args=[f"sqlite:///{tmp_path / 'mlflow.db'}"])
    with lock(tmp_path / "cache" / "databases" / f"mlflow-{mlflow_version}.lock"):
        opening.start()
        opening.join(0.3)
        assert opening.is_alive()
    opening.join(60)
    assert not opening.is_alive()


def test_an_existing_store_is_not_changed(store, client):
    client.search_experiments()
    file = Path(store.removeprefix("sqlite:///"))
    before = file.read_bytes()
    prepare_store(store)
    assert file.read_bytes() == before


def test_a_failure_of_tracking_is_a_warning_naming_the_store(dead_server, monkeypatch):
    warnings: list[str] = []
    with warn_on_failure("sqlite:///mlflow.db", warnings.append):
        pass
    assert warnings == []
    with warn_on_failure(dead_server, warnings.append):
        Tracker(dead_server, "nothing")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    with warn_on_failure("sqlite:///mlflow.db", warnings.append):
        Tracker("sqlite:///mlflow.db", "nothing")
    assert len(warnings) == 2
    assert all("127.0.0.1" in line and "flows.restore" in line and "hidden" not in line for line in warnings)


def test_a_comparison_reads_all_pages_of_runs(store, experiment, monkeypatch):
    monkeypatch.setattr("lotlip.tracking.mlflow.PAGE", 2)
    counts: list[Any] = []
    monkeypatch.setattr("lotlip.tracking.comparison.view", lambda runs, sweep: str(counts.append(len(runs))))
    tracker = Tracker(store, experiment)
    for number in range(5):
        tracker.ensure_run(f"f{number}", f"n{number}", {}, {})
    tracker.comparison_link("http://127.0.0.1:5000")
    assert counts == [5]


def test_history_is_not_sent_twice(store, experiment, client):
    tracker = Tracker(store, experiment)
    run_id = tracker.ensure_run("f", "n", {}, {})
    for _ in range(2):
        tracker.log_history(run_id, HISTORY)
        assert curve(client, run_id) == expected()
        assert curve(client, run_id, "train.learning_rate") == expected("learning_rate")
    assert curve(client, run_id, "train.step") == []
    tracker.log_history(run_id, [])


def test_history_adds_steps_that_a_killed_run_missed(store, experiment, client):
    tracker = Tracker(store, experiment)
    run_id = tracker.ensure_run("f", "n", {}, {})
    sink = MlflowSink(store, run_id)
    for point in HISTORY[:3] + HISTORY[8:]:
        sink.log({"loss": point["loss"]}, int(point["step"]))
    sink.close()
    tracker.log_history(run_id, HISTORY)
    assert curve(client, run_id) == expected()


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> Path:
    """A saved model."""
    return save_tiny_model(tmp_path_factory.mktemp("tracking") / "model", tiny_tower)


def write_run(folder: Path, saved_model: Path) -> Run:
    """Writes a trained ablation, and returns its run.json."""
    for seed in (0, 3):
        shutil.copytree(saved_model, folder / f"seed-{seed}")
        write_json(folder / f"seed-{seed}" / "history.json", [{**point, "seed": seed} for point in HISTORY])
    return Run(
        ablation="lotlip",
        config={"steps": 12, "seeds": [0, 3]},
        data_hash="d" * 8,
        git_commit="c" * 8,
        fingerprints={"0": "abc-0", "3": "abc-3"},
    )


def benchmark_scores(first: float = 0.25, **more: Any) -> dict[str, BenchmarkScores]:
    """Scores of both seeds."""
    seeds = {
        0: {"long.text_to_image.r1": first, "short.text_to_image.r1": 0.125},
        3: {"long.text_to_image.r1": 0.5, "short.text_to_image.r1": 0.125},
    }
    protocol = {"image_size": 16, "texts": "unseen frames", "version": "1a2b"}
    return {"scenes": BenchmarkScores(seeds=seeds, protocol=protocol, **more)}


def logged_models(client: MlflowClient, experiment: str) -> dict[str, Any]:
    """Seed → its only model in MLflow."""
    stored = client.get_experiment_by_name(experiment)
    assert stored is not None
    models = client.search_logged_models([stored.experiment_id])
    by_seed = {model.tags["seed"]: model for model in models}
    assert len(models) == len(by_seed)
    return by_seed


def files(model: Any) -> dict[str, bytes]:
    """Path → content of every file that MLflow stores for a model."""
    folder = Path(model.artifact_location.removeprefix("file://"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_lost_store_is_restored_from_files(store, experiment, client, tmp_path, saved_model):
    run = write_run(tmp_path, saved_model)
    for _ in range(2):  # the second call adds nothing
        Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
        by_seed = {mlflow_run.data.tags["seed"]: mlflow_run for mlflow_run in runs(client, experiment)}
        assert sorted(by_seed) == ["0", "3"]
        for seed, score in (("0", 0.25), ("3", 0.5)):
            mlflow_run = by_seed[seed]
            assert mlflow_run.info.status == "FINISHED"
            assert mlflow_run.info.run_name == f"lotlip-seed{seed}"
            assert mlflow_run.data.tags["data_hash"] == "d" * 8
            assert mlflow_run.data.tags["benchmark.scenes"] == "1a2b"
            assert mlflow_run.data.params["seed"] == seed
            assert mlflow_run.data.metrics["scenes.long.text_to_image.r1"] == score
            assert curve(client, mlflow_run.info.run_id) == expected()
            assert {file.path for file in client.list_artifacts(mlflow_run.info.run_id)} == {"figures"}
            assert client.list_artifacts(mlflow_run.info.run_id, "figures/scenes")


@pytest.mark.slow
def test_attention_scores_and_figures_are_logged(store, experiment, client, tmp_path, saved_model):
    attention = {
        seed: {"values": {"on_named_object": score}, "intervals": {}, "left_out": {}}
        for seed, score in ((0, 0.25), (3, 0.5))
    }
    results = benchmark_scores(attention=attention)
    figures = tmp_path / "attention"
    figures.mkdir()
    for name in ("scenes-relevance", "scenes-val-relevance"):  # the second belongs to another benchmark
        (figures / f"{name}.png").write_bytes(name.encode())
    Tracker(store, experiment).log_scores(write_run(tmp_path, saved_model), results, tmp_path, figures)
    for run in runs(client, experiment):
        seed = run.data.tags["seed"]
        assert run.data.metrics["scenes.attention.on_named_object"] == {"0": 0.25, "3": 0.5}[seed]
        stored_files = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures/scenes")}
        expected_files = {"loss.png", "recall.png"} | ({"attention-relevance.png"} if seed == "0" else set())
        assert stored_files == expected_files


@pytest.mark.slow
def test_the_model_of_each_seed_is_logged_with_its_run(store, experiment, client, tmp_path, saved_model):
    run = write_run(tmp_path, saved_model)
    before: dict[str, dict[str, bytes]] = {}
    for _ in range(2):  # the second call changes nothing
        Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
        models = logged_models(client, experiment)
        assert sorted(models) == ["0", "3"]
        for seed, model in models.items():
            assert model.status == "READY"
            assert model.name == f"lotlip-seed{seed}"
            assert model.tags[FINGERPRINT] == f"abc-{seed}"
            assert model.tags["ablation"] == "lotlip"
            source_run = client.get_run(model.source_run_id)
            assert source_run.data.tags["seed"] == seed
            assert source_run.outputs is not None
            assert [output.model_id for output in source_run.outputs.model_outputs] == [model.model_id]
            metrics = [(metric.key, metric.value) for metric in model.metrics]
            assert sorted(metrics) == sorted(flatten(benchmark_scores()["scenes"].seeds[int(seed)], "scenes.").items())
        after = {seed: files(model) for seed, model in models.items()}
        assert before in ({}, after)
        before = after
    for seed, stored in before.items():
        folder = tmp_path / f"seed-{seed}"
        for name in ("history.json", "model.safetensors", "tokenizer.json"):
            assert stored[f"data/{name}"] == (folder / name).read_bytes()
        provenance = json.loads(stored["data/config.json"])["provenance"]
        assert provenance["scores"] == {"scenes": benchmark_scores()["scenes"].seeds[int(seed)]}
        assert provenance["protocol"] == {"scenes": benchmark_scores()["scenes"].protocol}
        assert b"unseen frames" in stored["data/README.md"]
    assert (
        json.loads((tmp_path / "seed-0" / "config.json").read_text())["provenance"] is None
    )  # the stage's file is unchanged


@pytest.mark.slow
def test_a_stored_model_is_not_sent_again(store, experiment, client, tmp_path, saved_model, monkeypatch):
    run = write_run(tmp_path, saved_model)
    Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
    sent: list[str] = []
    send = MlflowClient.log_model_artifacts
    monkeypatch.setattr(
        MlflowClient, "log_model_artifacts", lambda self, model, folder: (sent.append(model), send(self, model, folder))
    )
    Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
    assert sent == []
    models = logged_models(client, experiment)
    shutil.rmtree(models["0"].artifact_location.removeprefix("file://"))
    Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
    assert sent == [models["0"].model_id]
    assert files(models["0"])
    Tracker(store, experiment).log_scores(run, benchmark_scores(0.75), tmp_path)  # its model card holds the scores
    assert sent == [models["0"].model_id] * 2


@pytest.mark.slow
def test_a_model_can_be_loaded_from_the_store(store, experiment, client, tmp_path, saved_model, monkeypatch):
    import mlflow

    from lotlip.retrieval.embedding import Embedder

    Tracker(store, experiment).log_scores(write_run(tmp_path, saved_model), benchmark_scores(), tmp_path)
    model = logged_models(client, experiment)["3"]
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the model's code to it
    mlflow.set_tracking_uri(store)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    finally:
        mlflow.set_tracking_uri(None)
    assert loaded.metadata.run_id == model.source_run_id
    features = loaded.predict([{"text": "A red dog. It runs."}])
    np.testing.assert_allclose(features, Embedder(saved_model).texts(["A red dog. It runs."]), atol=1e-6)


@pytest.mark.slow
def test_new_scores_replace_old_ones(store, experiment, client, tmp_path, saved_model):
    run = write_run(tmp_path, saved_model)
    for score in (0.25, 0.75, 0.25, 0.75):
        Tracker(store, experiment).log_scores(run, benchmark_scores(score), tmp_path)
    model = logged_models(client, experiment)["0"]
    metrics = [metric for metric in model.metrics if metric.key == "scenes.long.text_to_image.r1"]
    assert max(metrics, key=lambda metric: metric.timestamp).value == 0.75
    assert client.get_run(model.source_run_id).data.metrics["scenes.long.text_to_image.r1"] == 0.75
    config = json.loads(files(model)["data/config.json"])
    assert config["provenance"]["scores"]["scenes"]["long.text_to_image.r1"] == 0.75


@pytest.mark.slow
def test_a_model_of_a_killed_process_is_completed(store, experiment, client, tmp_path, saved_model, monkeypatch):
    run = write_run(tmp_path, saved_model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lotlip.retrieval.serving.save_served_model", Mock(side_effect=KeyboardInterrupt))
        Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
    (pending,) = logged_models(client, experiment).values()
    assert pending.status == "PENDING"
    Tracker(store, experiment).log_scores(run, benchmark_scores(), tmp_path)
    models = logged_models(client, experiment)
    assert {model.status for model in models.values()} == {"READY"}
    assert pending.model_id in [model.model_id for model in models.values()]


def test_ensure_runs_returns_the_planned_runs(store, experiment, client, tmp_path, saved_model):
    run = write_run(tmp_path, saved_model)
    planned = Tracker(store, experiment).ensure_runs(run)
    assert planned.keys() == {"0", "3"}
    assert Tracker(store, experiment).ensure_runs(run) == planned


def test_tags_and_status_of_a_run_are_set(store, experiment, client):
    tracker = Tracker(store, experiment)
    run_id = tracker.ensure_run("f", "n", {}, {})
    tracker.set_tags(run_id, {"model": "models/lotlip"})
    tracker.finish(run_id, "FAILED")
    run = client.get_run(run_id)
    assert run.data.tags["model"] == "models/lotlip"
    assert run.info.status == "FAILED"


def test_the_environment_overrides_the_parameter(store, experiment, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracker = Tracker("sqlite:////nowhere/at/all.db", experiment)
    assert tracker.uri == store
    tracker.ensure_run("f", "n", {}, {})
    assert len(runs(client, experiment)) == 1


def test_a_sink_without_a_run_does_nothing():
    sink = open_sink("sqlite:////nowhere/at/all.db", None, print)
    assert isinstance(sink, NullSink)
    sink.log({"loss": 1.0}, 1)
    sink.close()


def test_a_sink_with_a_run_sends_to_mlflow(store, experiment):
    run_id = Tracker(store, experiment).ensure_run("f", "n", {}, {})
    assert isinstance(open_sink(store, run_id, print), MlflowSink)
