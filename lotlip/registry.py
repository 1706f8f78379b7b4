"""MLflow's model registry: the best model of a sweep gets a name, if it passes the gate on long and short text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lotlip.config import Registry
from lotlip.tracking import FINGERPRINT, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

LINEAGE = ("data_hash", "git_commit", "ablation", "seed")  # of a run's tags, those that its version takes over


@dataclass(frozen=True)
class Registration:
    """What became of the best candidate.

    Attributes:
        run_id: of the best candidate.
        uri: "models:/NAME@ALIAS", which now loads it; None where the gate refused it.
        version: of the model in the registry; None where the gate refused it.
        refusals: a line for each reason, with metric, value and bound.
    """

    run_id: str
    uri: str | None
    version: str | None
    refusals: list[str]


def register_best(
    tracker: Tracker, candidates: Iterable[str], settings: Registry, sweep: str | None = None
) -> Registration:
    """Registers the best candidate and points the alias at it, unless the gate refuses it.

    Settings are ranked by the mean of their seeds, so that one lucky seed does not decide between them; of the best
    settings, the seed that scores highest is the candidate. The gate asks for the least values of `settings`, and that
    the candidate is no worse than what the alias points at, in the same metrics. The same model is registered once.

    Args:
        tracker: whose store has the runs, and the registry.
        candidates: ids of runs; those without scores, which failed, are passed over.
        settings: name, alias, measure and gate.
        sweep: named in the version's lineage.

    Raises:
        ValueError: no candidate has the scores that are asked for.
    """
    client = tracker.client
    runs = [client.get_run(run_id) for run_id in dict.fromkeys(candidates)]
    asked = {settings.measure, *settings.least}
    scored = [run for run in runs if asked <= run.data.metrics.keys()]
    if not scored:
        raise ValueError(
            f"of {len(runs)} runs none has all of {', '.join(sorted(asked))}, which `registry` of params.yaml asks "
            "for; have them evaluated, or name metrics that they have"
        )
    best = _best(scored, settings.measure)
    current = _current(client, settings)
    there = client.get_run(current.run_id).data.metrics if current and current.run_id else {}
    refusals = refused(best.data.metrics, there, settings)
    if refusals:
        return Registration(best.info.run_id, None, None, refusals)
    version = _version(client, best, settings, sweep)
    if current is None or current.version != version.version:
        client.set_registered_model_alias(settings.model, settings.alias, version.version)
    return Registration(best.info.run_id, settings.uri, str(version.version), [])


def refused(scores: Mapping[str, float], current: Mapping[str, float], settings: Registry) -> list[str]:
    """Why the gate refuses a model, a line for each reason; none: it passes.

    Args:
        scores: of the model.
        current: of the model that the alias points at; empty where there is none.
        settings: measure and gate.
    """
    reasons = [
        f"{name} is {scores[name]:.4g}; registry.least asks for at least {bound:.4g}"
        for name, bound in settings.least.items()
        if scores[name] < bound
    ]
    for name in dict.fromkeys([settings.measure, *settings.least]):
        if name in current and scores[name] < current[name] - settings.most_loss:
            reasons.append(
                f"{name} is {scores[name]:.4g}; {settings.uri} has {current[name]:.4g}, "
                f"and registry.most_loss lets it lose {settings.most_loss:.4g}"
            )
    return reasons


def _best(runs: Sequence[Run], measure: str) -> Run:
    """The highest seed of the settings with the highest mean; of equals, the first."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.data.params.items() if key not in ("seed", "seeds")}
        settings |= {key: run.data.tags.get(key, "") for key in ("ablation", "data_hash")}
        groups.setdefault(tuple(sorted(settings.items())), []).append(run)
    chosen = max(groups.values(), key=lambda seeds: sum(run.data.metrics[measure] for run in seeds) / len(seeds))
    return max(chosen, key=lambda run: run.data.metrics[measure])


def _current(client: MlflowClient, settings: Registry) -> ModelVersion | None:
    """What the alias points at."""
    if not client.search_registered_models(f"name = '{settings.model}'"):
        return None
    if settings.alias not in client.get_registered_model(settings.model).aliases:
        return None
    return client.get_model_version_by_alias(settings.model, settings.alias)


def _version(client: MlflowClient, run: Run, settings: Registry, sweep: str | None) -> ModelVersion:
    """The version that is the run's model, made when there is none."""
    fingerprint = run.data.tags[FINGERPRINT]
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise ValueError(
            f"run {run.info.run_name} ({run.info.run_id}) has scores but no model; `python -m flows.restore` writes it"
        )
    if not client.search_registered_models(f"name = '{settings.model}'"):
        client.create_registered_model(settings.model, description=_about(settings))
    for version in client.search_model_versions(f"name = '{settings.model}'"):
        if version.tags.get(FINGERPRINT) == fingerprint:
            return version
    model_id = outputs[-1].model_id
    scores = {name: run.data.metrics[name] for name in dict.fromkeys([settings.measure, *settings.least])}
    tags = {name: run.data.tags[name] for name in LINEAGE if name in run.data.tags}
    tags |= {FINGERPRINT: fingerprint, "params": json.dumps(run.data.params, sort_keys=True)}
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


def _about(settings: Registry) -> str:
    """The registered model in plain words."""
    bounds = ", ".join(f"{name} ≥ {bound:g}" for name, bound in settings.least.items())
    return (
        f"The best model by {settings.measure}. `{settings.uri}` is the last that passed the gate: {bounds}, and no "
        f'worse than the one before.\n\n`mlflow.pyfunc.load_model("{settings.uri}")` loads it: a table with the '
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
