"""MLflow's model registry: the best model of a sweep gets a name, if it passes the gate on long and short text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lotlip.tracking.config import RegistryConfig
from lotlip.tracking.mlflow import FINGERPRINT, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

LINEAGE = ("data_hash", "git_commit", "ablation", "seed")  # of a run's tags, those that its version takes over


@dataclass(frozen=True)
class Registration:
    """What became of a model.

    Attributes:
        uri: "models:/NAME@ALIAS", which now loads it; None where the gate refused it.
        version: of the model in the registry; None where the gate refused it.
        refusals: a line for each reason, with metric, value and bound.
    """

    uri: str | None
    version: str | None
    refusals: list[str]


def register(tracker: Tracker, run_id: str, settings: RegistryConfig, sweep: str | None = None) -> Registration:
    """Registers a run's model and points the alias at it, unless the gate refuses it.

    The gate asks for the least values of `settings`, and that the model is no worse in the same metrics than what the
    alias points at. The same model is registered once.

    Args:
        tracker: whose store has the run, and the registry.
        run_id: of the run.
        settings: name, alias and gate.
        sweep: of which it is the best; named in the version's lineage.

    Raises:
        ValueError: the run lacks scores that the gate asks for, or the model.
    """
    client = tracker.client
    run = client.get_run(run_id)
    missing = sorted(settings.min_scores.keys() - run.data.metrics.keys())
    if missing:
        raise ValueError(
            f"run {run.info.run_name} ({run_id}) has no {', '.join(missing)}, which registry.min_scores of params.yaml "
            "asks for; have it evaluated, or name metrics that it has"
        )
    current = _current(client, settings)
    there = client.get_run(current.run_id).data.metrics if current and current.run_id else {}
    refusals = refused(run.data.metrics, there, settings)
    if refusals:
        return Registration(None, None, refusals)
    version = _version(client, run, settings, sweep)
    if current is None or current.version != version.version:
        client.set_registered_model_alias(settings.model, settings.alias, version.version)
    return Registration(settings.uri, str(version.version), [])


def refused(scores: Mapping[str, float], current: Mapping[str, float], settings: RegistryConfig) -> list[str]:
    """Why the gate refuses a model, a line for each reason; none: it passes.

    Args:
        scores: of the model.
        current: of the model that the alias points at; empty where there is none.
        settings: the gate.
    """
    reasons = [
        f"{name} is {scores[name]:.4g}; registry.min_scores asks for at least {bound:.4g}"
        for name, bound in settings.min_scores.items()
        if scores[name] < bound
    ]
    for name in settings.min_scores:
        if name in current and scores[name] < current[name] - settings.max_score_drop:
            reasons.append(
                f"{name} is {scores[name]:.4g}; {settings.uri} has {current[name]:.4g}, "
                f"and registry.max_score_drop lets it lose {settings.max_score_drop:.4g}"
            )
    return reasons


def _current(client: MlflowClient, settings: RegistryConfig) -> ModelVersion | None:
    """What the alias points at."""
    if not client.search_registered_models(f"name = '{settings.model}'"):
        return None
    if settings.alias not in client.get_registered_model(settings.model).aliases:
        return None
    return client.get_model_version_by_alias(settings.model, settings.alias)


def _version(client: MlflowClient, run: Run, settings: RegistryConfig, sweep: str | None) -> ModelVersion:
    """The version that is the run's model, made when there is none."""
    fingerprint = run.data.tags[FINGERPRINT]
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise ValueError(
            f"run {run.info.run_name} ({run.info.run_id}) has scores but no model; `python -m flows.restore` writes it"
        )
    if not client.search_registered_models(f"name = '{settings.model}'"):
        client.create_registered_model(settings.model, description=_about(settings))
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
        description=_described(run, scores, sweep),
        model_id=model_id,
    )


def _about(settings: RegistryConfig) -> str:
    """The registered model in plain words."""
    bounds = ", ".join(f"{name} ≥ {bound:g}" for name, bound in settings.min_scores.items())
    return (
        f"The best models of sweeps. `{settings.uri}` is the last that passed the gate: {bounds}, and no worse than "
        f'the one before.\n\n`mlflow.pyfunc.load_model("{settings.uri}")` loads it: a table with the '
        "columns `text` and `image` in, normalised features out."
    )


def _described(run: Run, scores: Mapping[str, float], sweep: str | None) -> str:
    """A version in plain words."""
    of = f", the best of sweep {sweep}" if sweep else ""
    lines = [f"{run.info.run_name}{of}.", "", *(f"- {name}: {score:.4g}" for name, score in scores.items())]
    made = ", ".join(
        f"{name} {run.data.tags[name][:12]}" for name in ("data_hash", "git_commit") if name in run.data.tags
    )
    return "\n".join([*lines, "", f"Made from {made}; all parameters are in the tag `params`."])
