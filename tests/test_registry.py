"""The registry: the best model of a sweep is registered with its lineage, or refused with reasons."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lotlip.config.params import Params, load_params
from lotlip.tracking.config import RegistryConfig
from lotlip.tracking.mlflow import FINGERPRINT, Tracker
from lotlip.tracking.registry import register
from tests.test_tracking import benchmark_scores, write_run
from tests.tiny_model import save_tiny_model

LONG, SHORT = "scenes.long.text_to_image.r1", "scenes.short.text_to_image.r1"
_numbers = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        yield f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def tracker(store: str) -> Tracker:
    return Tracker(store, f"registry-{next(_numbers)}")


@pytest.fixture
def settings() -> RegistryConfig:
    return RegistryConfig(model=f"model-{next(_numbers)}", min_scores={LONG: 0.3, SHORT: 0.2})


def candidate(tracker: Tracker, name: str, long: float, short: float, **more: str) -> str:
    """A finished run with scores and a model."""
    tags = {"ablation": name, "seed": "0", "data_hash": "d" * 16, "git_commit": "c" * 40, **more}
    run_id = tracker.ensure_run(name, name, tags, {"text": {"corner_tokens": 2}, "seed": 0})
    tracker.log_metrics(run_id, {LONG: long, SHORT: short})
    tracker.ensure_model(run_id, name, name, tags)
    return run_id


def versions(tracker: Tracker, settings: RegistryConfig) -> list[Any]:
    return list(tracker.client.search_model_versions(f"name = '{settings.model}'"))


def test_a_model_is_registered_with_its_lineage(tracker, settings):
    run = candidate(tracker, f"a{next(_numbers)}", 0.6, 0.25)
    registration = register(tracker, run, settings, "night")
    assert registration.refusals == []
    assert registration.uri == f"models:/{settings.model}@champion"
    version = tracker.client.get_model_version_by_alias(settings.model, "champion")
    assert version.run_id == run
    expected = {
        "data_hash": "d" * 16,
        "git_commit": "c" * 40,
        "sweep": "night",
        "seed": "0",
        LONG: "0.6",
        SHORT: "0.25",
    }
    assert expected.items() <= version.tags.items()
    assert version.tags[FINGERPRINT] == tracker.client.get_run(run).data.tags[FINGERPRINT]
    assert json.loads(version.tags["params"]) == {"text.corner_tokens": "2", "seed": "0"}
    assert "best of sweep night" in version.description


@pytest.mark.slow
def test_the_same_model_is_registered_once(tracker, settings):
    run = candidate(tracker, f"a{next(_numbers)}", 0.5, 0.5)
    assert register(tracker, run, settings) == register(tracker, run, settings)
    assert len(versions(tracker, settings)) == 1


@pytest.mark.parametrize(("scores", "metric", "bound"), [((0.5, 0.1), SHORT, "0.2"), ((0.2, 0.5), LONG, "0.3")])
def test_a_refusal_states_metric_value_and_bound(tracker, settings, scores, metric, bound):
    registration = register(tracker, candidate(tracker, f"a{next(_numbers)}", *scores), settings)
    assert (registration.uri, registration.version) == (None, None)
    (reason,) = registration.refusals
    assert reason == f"{metric} is {min(scores):.4g}; registry.min_scores requires at least {bound}"
    assert versions(tracker, settings) == []


@pytest.mark.slow
def test_a_worse_model_does_not_replace_the_champion(tracker, settings):
    first = candidate(tracker, f"a{next(_numbers)}", 0.5, 0.5)
    worse = candidate(tracker, f"a{next(_numbers)}", 0.6, 0.45)
    register(tracker, first, settings)
    (reason,) = register(tracker, worse, settings).refusals
    assert reason == f"{SHORT} is 0.45; {settings.uri} has 0.5, and registry.max_score_drop allows a drop of 0"
    assert tracker.client.get_model_version_by_alias(settings.model, "champion").run_id == first
    registration = register(tracker, worse, settings.model_copy(update={"max_score_drop": 0.05}))
    assert (registration.version, registration.refusals) == ("2", [])
    assert tracker.client.get_model_version_by_alias(settings.model, "champion").run_id == worse


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({}, {"data_hash": "e" * 16}, "the shards"),  # what the benchmarks are is not known
        ({"benchmark.scenes": "1"}, {"benchmark.scenes": "1", "data_hash": "e" * 16}, ""),  # other training data
        ({"benchmark.scenes": "1"}, {"benchmark.scenes": "2"}, "benchmark scenes"),
        ({"benchmark.other": "1"}, {"benchmark.other": "2"}, ""),  # no metric of the gate
        ({}, {"benchmark.scenes": "2"}, ""),  # not known
    ],
)
def test_scores_on_other_data_are_not_compared(tracker, settings, before, after, changed):
    first = candidate(tracker, f"a{next(_numbers)}", 0.5, 0.5, **before)
    assert register(tracker, first, settings).note == ""
    worse = candidate(tracker, f"a{next(_numbers)}", 0.4, 0.4, **after)
    registration = register(tracker, worse, settings)
    champion = tracker.client.get_model_version_by_alias(settings.model, "champion").run_id
    if changed:
        assert registration.note.startswith(
            f"{changed} changed since {settings.uri} was registered, so its scores were"
        )
        assert (champion, registration.refusals) == (worse, [])
    else:
        assert (champion, registration.note, len(registration.refusals)) == (first, "", 2)
    bad = register(tracker, candidate(tracker, f"a{next(_numbers)}", 0.1, 0.4, data_hash="f" * 16), settings)
    assert bad.refusals == [f"{LONG} is 0.1; registry.min_scores requires at least 0.3"]
    assert bad.note.startswith("the shards changed")


def test_a_run_without_scores_is_an_error(tracker, settings):
    failed = tracker.ensure_run(f"f{next(_numbers)}", "failed", {}, {})
    with pytest.raises(ValueError, match=f"has no {LONG}, {SHORT}, which registry.min_scores"):
        register(tracker, failed, settings)


@pytest.mark.slow
def test_the_alias_loads_the_model(tracker, settings, tmp_path, tiny_tower, monkeypatch):
    import mlflow

    saved: Path = save_tiny_model(tmp_path / "saved", tiny_tower)
    runs = tracker.log_scores(write_run(tmp_path, saved), benchmark_scores(), tmp_path)
    easy = settings.model_copy(update={"min_scores": {LONG: 0.1, SHORT: 0.1}})
    registration = register(tracker, runs["3"], easy)
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the model's code to it
    mlflow.set_tracking_uri(tracker.uri)
    try:
        loaded = mlflow.pyfunc.load_model(registration.uri)
    finally:
        mlflow.set_tracking_uri(None)
    assert len(loaded.predict([{"text": "A red dog. It runs."}, {"text": "A cat."}])) == 2


def test_min_scores_need_short_and_long_texts():
    params = load_params(Path(__file__).parents[1] / "params.yaml").model_dump(mode="json", exclude_unset=True)
    gate = {"min_scores": {LONG: 0.1}}
    with pytest.raises(ValueError, match="no metric on short text"):
        Params.model_validate(params | {"registry": gate})
    gate = {"min_scores": {LONG: 0.1, "other.short.text_to_image.r1": 0.1}}
    with pytest.raises(ValueError, match=r"registry requires other\.short"):
        Params.model_validate(params | {"registry": gate})


def test_reserved_aliases_are_errors():
    for alias in ("latest", "v1"):
        with pytest.raises(ValueError, match="MLflow reserves"):
            RegistryConfig(alias=alias, min_scores={LONG: 0.1, SHORT: 0.1})
