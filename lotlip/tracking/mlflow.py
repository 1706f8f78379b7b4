"""MLflow tracking: one run per ablation and seed, identified by its fingerprint."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotlip.core.code import ROOT, source_files
from lotlip.core.files import sha256_files, sha256_json
from lotlip.core.section import flatten
from lotlip.core.temporary import temporary_folder
from lotlip.evaluate.records import BenchmarkScores
from lotlip.pretrain.records import History, Run, read_history
from lotlip.tracking.sink import MlflowSink
from lotlip.tracking.store import exclusive, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as TrackedRun

    from lotlip.pretrain.config import PretrainConfig

FINGERPRINT = "lotlip.fingerprint"
CONTENT = "lotlip.content"  # hash of a model's files when they were sent
VERSION = "benchmark."  # before the name of a benchmark: the version of its data that the scores are of
NOTE = "mlflow.note.content"  # description on MLflow's pages, in Markdown
PAGE = 1000  # runs per request
LONGEST_PARAMETER = 6000  # MLflow's limit for a parameter's value


class Tracker:
    """Runs of one experiment. Logging twice with the same fingerprint updates one run.

    Args:
        uri: of the tracking server or store; the environment variable MLFLOW_TRACKING_URI overrides it.
        experiment: name of the experiment; created if it does not exist.
        base: settings that ablations differ from, for the runs' descriptions; None: differences are not listed.
    """

    def __init__(self, uri: str, experiment: str, base: PretrainConfig | None = None) -> None:
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
        self._base = base
        with exclusive(self.uri):
            self._client = open_store(self.uri)
            self._experiment = self._ensure_experiment(experiment)
        self._tag_experiment({"mlflow.experimentKind": "custom_model_development", NOTE: self._about()})

    def _ensure_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if existing := self._client.get_experiment_by_name(name):
            return existing.experiment_id
        try:
            return self._client.create_experiment(name)
        except MlflowException:  # another program may have created it on the same server
            if existing := self._client.get_experiment_by_name(name):
                return existing.experiment_id
            raise

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, for requests other than runs."""
        return self._client

    def comparison_link(self, server: str, sweep: str | None = None, mode: str = "CHART") -> str:
        """The URL of MLflow's comparison page for all runs, or a sweep's; updates its charts first.

        Args:
            server: MLflow's URL.
            sweep: its name; its runs have the tag `sweep.<name>`.
            mode: "CHART" or "TABLE".

        Raises:
            ValueError: the sweep's name contains a character that MLflow's filters do not allow.
        """
        from lotlip.tracking import comparison

        if sweep and not set(sweep).isdisjoint("'`\""):
            raise ValueError(f"the sweep's name {sweep} contains a quotation mark; choose another name")
        self._update_view(sweep)
        return comparison.address(server, self._experiment, sweep, mode)

    def _update_view(self, sweep: str | None = None) -> None:
        """Writes the view of a comparison page."""
        from lotlip.tracking import comparison

        tracked: list[TrackedRun] = []
        token = None
        while page := self._client.search_runs(
            [self._experiment], comparison.sweep_filter(sweep) if sweep else "", max_results=PAGE, page_token=token
        ):
            tracked += page
            token = page.token
            if not token:
                break
        runs = [comparison.ComparedRun(run.data.params, list(run.data.metrics), run.data.tags) for run in tracked]
        self._tag_experiment({comparison.SHARED_VIEW + comparison.view_name(sweep): comparison.view(runs, sweep)})

    def _about(self) -> str:
        """Describes the experiment, with links to its comparison."""
        from lotlip.tracking import comparison

        charts, table = (comparison.address("", self._experiment, None, mode)[1:] for mode in ("CHART", "TABLE"))
        return (
            "Every run is one seed of one ablation of LoTLIP: its parameters, curves and scores, and the trained model."
            f"\n\n**Compare all runs: [charts]({charts}) · [table]({table})**\n\n"
            "The tag `ablation` is the name in params.yaml; `data_hash` and `git_commit` identify the data and code. "
            "In metrics, `long` and `short` are the kinds of text and `r1` is R@1, as a fraction; `train.…` are curves."
        )

    def _tag_experiment(self, tags: Mapping[str, str]) -> None:
        """Sets the tags of the experiment whose values have changed."""
        known = self._client.get_experiment(self._experiment).tags
        for key, value in tags.items():
            if known.get(key) != value:
                self._client.set_experiment_tag(self._experiment, key, value)

    @property
    def experiment_id(self) -> str:
        """The experiment's id, as in URLs of MLflow's UI."""
        return self._experiment

    def ensure_run(self, fingerprint: str, name: str, tags: Mapping[str, str], parameters: Mapping[str, Any]) -> str:
        """The id of the run with this fingerprint, which is created if there is none.

        Args:
            fingerprint: of configuration, data and code; equal fingerprints mean the same run.
            name: shown in the UI.
            tags: such as ablation and seed.
            parameters: nested; shown with dotted names.
        """
        from mlflow.entities import Param, RunTag

        runs = self._client.search_runs([self._experiment], _fingerprint_filter(fingerprint), max_results=1)
        if runs:
            return runs[0].info.run_id
        run = self._client.create_run(self._experiment, run_name=name)
        self._client.log_batch(
            run.info.run_id,
            params=[Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in flatten(parameters).items()],
            tags=[RunTag(key, value) for key, value in {**tags, FINGERPRINT: fingerprint}.items()],
        )
        return run.info.run_id

    def ensure_runs(self, trained: Run) -> dict[str, str]:
        """Seed → id of its run, for a trained (or planned) ablation.

        Args:
            trained: its run.json.
        """
        from lotlip.tracking.comparison import run_note

        about = trained.model_dump(include={"ablation", "data_hash", "git_commit"})
        return {
            seed: self.ensure_run(
                fingerprint,
                f"{trained.ablation}-seed{seed}",
                {**about, "seed": seed, NOTE: run_note(trained, seed, self._base)},
                {**trained.config, "seed": seed},
            )
            for seed, fingerprint in trained.fingerprints.items()
        }

    def ensure_model(self, run_id: str, fingerprint: str, name: str, tags: Mapping[str, str]) -> LoggedModel:
        """The model with this fingerprint, which is created as an output of the run if there is none.

        Args:
            run_id: of the run that trained it.
            fingerprint: that of its run.
            name: shown in the UI.
            tags: such as ablation and seed.
        """
        from mlflow.entities import LoggedModelOutput

        models = self._client.search_logged_models([self._experiment], _fingerprint_filter(fingerprint), max_results=1)
        if models:
            model = models[0]
        else:
            all_tags = {**tags, FINGERPRINT: fingerprint}
            model = self._client.create_logged_model(self._experiment, name, run_id, all_tags)
        outputs = self._client.get_run(run_id).outputs
        if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], model: LoggedModel | None = None) -> None:
        """Sets final values in one write.

        Args:
            run_id: of the run.
            metrics: by name.
            model: that also gets these values; values that it already has are not sent again.
        """
        from mlflow.entities import Metric

        now, model_id = int(time.time() * 1000), model.model_id if model else None
        points = (model and model.metrics) or []
        known = {point.key: point.value for point in sorted(points, key=lambda point: point.timestamp)}  # the latest
        new = [
            Metric(name, value, now, 0, model_id=model_id)
            for name, value in metrics.items()
            if known.get(name) != value
        ]
        self._client.log_batch(run_id, metrics=new)

    def log_scores(
        self, trained: Run, results: Mapping[str, BenchmarkScores], folder: Path, attention: Path | None = None
    ) -> dict[str, str]:
        """Updates the run of every seed from the results on disk: curves, scores, figures and the model.

        The model is logged so that `mlflow.pyfunc.load_model` loads it and `mlflow models serve` serves it; its
        configuration and its card contain the scores. This rebuilds a lost store.

        Args:
            trained: run.json of the ablation.
            results: benchmark → results, as in metrics/<ablation>.json.
            folder: of the trained ablation.
            attention: folder with pictures of the first seed's attention maps, <benchmark>-<name>.png.

        Returns:
            Seed → id of its run.
        """
        from lotlip.report.figures import run_figures
        from lotlip.report.inputs import attention_pictures
        from lotlip.tracking.comparison import run_note

        runs = self.ensure_runs(trained)
        for seed, run_id in runs.items():
            history = read_history(folder, seed)
            self.log_history(run_id, history)
            scores = {benchmark: result.seeds[int(seed)] for benchmark, result in results.items()}
            tags = {"ablation": trained.ablation, "seed": seed}
            name = f"{trained.ablation}-seed{seed}"
            logged_model = self.ensure_model(run_id, trained.fingerprints[seed], name, tags)
            attention_of = {name: result.attention.get(int(seed), {}) for name, result in results.items()}
            numbers = {name: {"attention": scored.get("values", {})} for name, scored in attention_of.items()}
            reading_scores = {
                f"{benchmark}.reading.hard_negatives.accuracy": reading["hard_negatives"]["accuracy"]["value"]
                for benchmark, result in results.items()
                if (reading := result.reading.get(int(seed)))
            }
            self.log_metrics(run_id, flatten(scores) | flatten(numbers) | reading_scores, logged_model)
            for benchmark, metrics in scores.items():
                for file, image in run_figures(history, metrics).items():
                    self._log_file(run_id, image, f"figures/{benchmark}", file)
                if attention and seed == str(trained.config["seeds"][0]):
                    for kind, image in attention_pictures(attention, benchmark).items():
                        self._log_file(run_id, image, f"figures/{benchmark}", f"attention-{kind}.png")
            protocol = {benchmark: result.protocol for benchmark, result in results.items()}
            versions = {f"{VERSION}{name}": str(how["version"]) for name, how in protocol.items() if "version" in how}
            self.set_tags(run_id, {NOTE: run_note(trained, seed, self._base, results), **versions})
            self._log_model(logged_model, folder / f"seed-{seed}", {"scores": scores, "protocol": protocol})
            self.finish(run_id)
        self._update_view()
        return runs

    def log_history(self, run_id: str, history: History) -> None:
        """Sends the steps of a training history that the run lacks, after a kill or a failure of the store."""
        known = {metric.step for metric in self._client.get_metric_history(run_id, "train.loss")}
        sink = MlflowSink(self.uri, run_id, steps_held=len(history) + 1)
        for point in history:
            if point["step"] not in known:
                sink.log({name: value for name, value in point.items() if name != "step"}, int(point["step"]))
        sink.close()

    def _log_model(self, model: LoggedModel, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Writes a saved model in MLflow's format, unless the store already has it.

        Equal models give equal files, whenever they are written.
        """
        from mlflow.models import Model

        from lotlip.retrieval.serving import save_served_model

        parts = [file for file in folder.rglob("*") if file.is_file()] + source_files(ROOT / "lotlip")
        content = sha256_json([provenance, sha256_files(sorted(parts))])
        if (
            model.status == "READY"
            and model.tags.get(CONTENT) == content
            and self._client.list_logged_model_artifacts(model.model_id)
        ):
            return
        identity = Model(
            artifact_path=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model.model_id,
            model_uuid=model.model_id,
            utc_time_created=datetime.fromtimestamp(model.creation_timestamp / 1000, UTC).replace(tzinfo=None),
        )
        with temporary_folder("tracking") as scratch:
            save_served_model(folder, scratch / "model", provenance, identity)
            self._client.log_model_artifacts(model.model_id, str(scratch / "model"))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.set_logged_model_tags(model.model_id, {CONTENT: content})

    def _log_file(self, run_id: str, content: bytes, under: str, name: str) -> None:
        with temporary_folder("tracking") as scratch:
            folder = scratch / "artifacts"  # beside the owner's lock
            folder.mkdir()
            (folder / name).write_bytes(content)
            self._client.log_artifacts(run_id, str(folder), under)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Marks a run as "FINISHED" or "FAILED"; a run that already has this status keeps its end time."""
        if self._client.get_run(run_id).info.status != status:
            self._client.set_terminated(run_id, status)


def _fingerprint_filter(fingerprint: str) -> str:
    """MLflow's filter for a fingerprint."""
    return f"tags.`{FINGERPRINT}` = '{fingerprint}'"
