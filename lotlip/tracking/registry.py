"""MLflow's model registry: the best model of a sweep gets a name if it passes the gate on long and short text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lotlip.tracking.config import RegistryConfig
from lotlip.tracking.mlflow import FINGERPRINT, VERSION, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

LINEAGE = ("data_hash", "git_commit", "ablation", "seed")  # tags of a run that are copied to its model version


@dataclass(frozen=True)
class Registration:
    """The outcome of a registration.

    Attributes:
        uri: "models:/NAME@ALIAS", which now loads the model; None if the gate refused it.
        version: of the model in the registry; None if the gate refused it.
        refusals: one line per reason, with metric, value and bound.
        note: why the model was not compared with the one that the alias pointed to; "" if it was, or if there was none.
    """

    uri: str | None
    version: str | None
    refusals: list[str]
    note: str = ""


def register(tracker: Tracker, run_id: str, settings: RegistryConfig, sweep: str | None = None) -> Registration:
    """Registers a run's model and points the alias to it, unless the gate refuses it.

    The gate requires the minimum values of `settings`, and that the model is not worse in these metrics than the one
    that the alias points to, unless that one has other data or benchmarks. A model is registered only once.

    Args:
        tracker: whose store has the run and the registry.
        run_id: of the run.
        settings: name, alias and gate.
        sweep: whose best model this is; recorded in the version's lineage.

    Raises:
        ValueError: the run lacks scores that the gate requires, or has no model.
    """
    client = tracker.client
    run = client.get_run(run_id)
    missing = sorted(settings.min_scores.keys() - run.data.metrics.keys())
    if missing:
        raise ValueError(
            f"run {run.info.run_name} ({run_id}) has no {', '.join(missing)}, which registry.min_scores of params.yaml "
            "requires; evaluate it, or name metrics that it has"
        )
    current = _current(client, settings)
    champion = client.get_run(current.run_id).data if current and current.run_id else None
    changed = changed_data(run.data.tags, champion.tags, settings) if champion else []
    note = ""
    if changed:
        note = (
            f"{' and '.join(changed)} changed since {settings.uri} was registered, so its scores were not compared and "
            "registry.max_score_drop was not applied"
        )
    refusals = refusal_reasons(run.data.metrics, champion.metrics if champion and not changed else {}, settings)
    if refusals:
        return Registration(None, None, refusals, note)
    version = _version(client, run, settings, sweep)
    if current is None or current.version != version.version:
        client.set_registered_model_alias(settings.model, settings.alias, version.version)
    return Registration(settings.uri, str(version.version), [], note)


def changed_data(tags: Mapping[str, str], current: Mapping[str, str], settings: RegistryConfig) -> list[str]:
    """Which data differ between two runs, in words; scores on other data cannot be compared.

    Args:
        tags: of a run.
        current: tags of the run of the model that the alias points to. A tag that one of them lacks, as runs of earlier
            versions do, is not compared.
        settings: whose metrics name the benchmarks.
    """
    benchmarks = dict.fromkeys(name.partition(".")[0] for name in settings.min_scores)
    data = {VERSION + name: f"benchmark {name}" for name in benchmarks}
    if not all(tag in tags and tag in current for tag in data):
        data["data_hash"] = "the shards"  # which may mean other held-out images
    return [what for tag, what in data.items() if tag in tags and tag in current and tags[tag] != current[tag]]


def refusal_reasons(scores: Mapping[str, float], current: Mapping[str, float], settings: RegistryConfig) -> list[str]:
    """Why the gate refuses a model, one line per reason; empty if it passes.

    Args:
        scores: of the model.
        current: scores of the model that the alias points to; empty if there is none to compare with.
        settings: the gate.
    """
    reasons = [
        f"{name} is {scores[name]:.4g}; registry.min_scores requires at least {bound:.4g}"
        for name, bound in settings.min_scores.items()
        if scores[name] < bound
    ]
    for name in settings.min_scores:
        if name in current and scores[name] < current[name] - settings.max_score_drop:
            reasons.append(
                f"{name} is {scores[name]:.4g}; {settings.uri} has {current[name]:.4g}, "
                f"and registry.max_score_drop allows a drop of {settings.max_score_drop:.4g}"
            )
    return reasons


def _current(client: MlflowClient, settings: RegistryConfig) -> ModelVersion | None:
    """The model version that the alias points to."""
    if not client.search_registered_models(f"name = '{settings.model}'"):
        return None
    if settings.alias not in client.get_registered_model(settings.model).aliases:
        return None
    return client.get_model_version_by_alias(settings.model, settings.alias)


def _version(client: MlflowClient, run: Run, settings: RegistryConfig, sweep: str | None) -> ModelVersion:
    """The version of the run's model, which is created if there is none."""
    fingerprint = run.data.tags[FINGERPRINT]
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise ValueError(
            f"run {run.info.run_name} ({run.info.run_id}) has scores but no model; run `python -m flows.restore`"
        )
    if not client.search_registered_models(f"name = '{settings.model}'"):
        client.create_registered_model(settings.model, description=_model_description(settings))
    same = f"name = '{settings.model}' and tags.`{FINGERPRINT}` = '{fingerprint}'"
    if found := client.search_model_versions(same, max_results=1):
        return found[0]
    model_id = outputs[-1].model_id
    scores = {name: run.data.metrics[name] for name in settings.min_scores}
    tags = {name: run.data.tags[name] for name in LINEAGE if name in run.data.tags}
    tags |= {FINGERPRINT: fingerprint, "params": json.dumps(run.data.params, sort_keys=True, allow_nan=False)}
    tags |= {name: f"{score:.6g}" for name, score in scores.items()}
    if sweep:
        tags["sweep"] = sweep
    return client.create_model_version(
        settings.model,
        source=client.get_logged_model(model_id).artifact_location,
        run_id=run.info.run_id,
        tags=tags,
        description=_version_description(run, scores, sweep),
        model_id=model_id,
    )


def _model_description(settings: RegistryConfig) -> str:
    """Describes the registered model."""
    bounds = ", ".join(f"{name} ≥ {bound:g}" for name, bound in settings.min_scores.items())
    return (
        f"The best models of sweeps. `{settings.uri}` is the last one that passed the gate: {bounds}, and not worse "
        f'than its predecessor on the same data.\n\n`mlflow.pyfunc.load_model("{settings.uri}")` loads it. Its input '
        "is a table with the columns `text` and `image`; its output are normalised features."
    )


def _version_description(run: Run, scores: Mapping[str, float], sweep: str | None) -> str:
    """Describes a model version."""
    of = f", the best of sweep {sweep}" if sweep else ""
    lines = [f"{run.info.run_name}{of}.", "", *(f"- {name}: {score:.4g}" for name, score in scores.items())]
    sources = ", ".join(
        f"{name} {run.data.tags[name][:12]}" for name in ("data_hash", "git_commit") if name in run.data.tags
    )
    return "\n".join([*lines, "", f"Made from {sources}; all parameters are in the tag `params`."])
