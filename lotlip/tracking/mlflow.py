"""MLflow tracking: one run per ablation and seed, identified by its fingerprint."""

from __future__ import annotations

import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lotlip.core.caches import cache_folder, lock
from lotlip.core.code import ROOT
from lotlip.core.databases import create_database
from lotlip.core.files import sha256_files, sha256_json
from lotlip.core.section import flatten
from lotlip.core.temporary import temporary_folder
from lotlip.evaluate.records import BenchmarkScores
from lotlip.pretrain.records import History, Run, read_history
from lotlip.pretrain.sink import NullSink, Sink

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as TrackedRun

    from lotlip.pretrain.config import PretrainConfig

FINGERPRINT = "lotlip.fingerprint"
CONTENT = "lotlip.content"  # hash of a model's files when they were sent
NOTE = "mlflow.note.content"  # description on MLflow's pages, in Markdown
TRACKING_WARNING = "tracking warning: "  # prefix of the line by which a training process reports a tracking failure
SQLITE = "sqlite:///"  # prefix of the URI of a store in a file
PAGE = 1000  # runs per request
LONGEST_PARAMETER = 6000  # MLflow's limit for a parameter's value


class MlflowSink:
    """Sends curves to an MLflow run, several steps at a time, from a separate thread.

    A write to the store takes as long as a training step, and importing MLflow as long as the rest of the start-up.

    Args:
        uri: of the tracking server or store.
        run_id: of the run.
        steps_held: number of steps that are sent at a time.
        warn: called with one line when the store fails; nothing more is sent afterwards, because tracking must neither
            end nor delay training. None: `close` raises the error.
    """

    def __init__(
        self, uri: str, run_id: str, steps_held: int = 10, warn: Callable[[str], object] | None = None
    ) -> None:
        self._uri, self._run_id = uri, run_id
        self._steps_held, self._warn = steps_held, warn
        self._held: list[tuple[int, int, dict[str, float]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._error: Exception | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records the values of one step; sends the recorded steps when there are enough."""
        self._held.append((int(time.time() * 1000), step, dict(metrics)))
        if len(self._held) >= self._steps_held:
            self._send()

    def close(self) -> None:
        """Sends the recorded steps and waits until everything has been sent, or sending has failed."""
        self._send()
        self._thread.shutdown()
        if self._error and not self._warn:
            raise self._error

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._thread.submit(self._log, held)

    def _log(self, held: list[tuple[int, int, dict[str, float]]]) -> None:
        if self._error:
            return
        try:
            from mlflow.entities import Metric

            points = [
                Metric(f"train.{name}", value, when, step)
                for when, step, metrics in held
                for name, value in metrics.items()
            ]
            _client(self._uri).log_batch(self._run_id, metrics=points)
        except Exception as error:
            self._error = error
            if self._warn:
                self._warn(failure(self._uri, error))


def open_sink(uri: str, run_id: str | None, warn: Callable[[str], object]) -> Sink:
    """The sink of a training run, which continues if the store fails; without a run, one that does nothing.

    Args:
        uri: of the tracking server or store.
        run_id: of the run.
        warn: called with one line when the store fails.
    """
    return MlflowSink(uri, run_id, warn=warn) if run_id else NullSink()


def failure(uri: str, error: Exception) -> str:
    """One line that names the store that failed, the reason, and the command that sends the missing data later."""
    reason = " ".join(str(error).split()) or type(error).__name__
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    if at:  # may contain a password
        uri, reason = (text.replace(user + at, "") for text in (uri, reason))
    return (
        f"MLflow at {uri} failed: {textwrap.shorten(reason, 300)}; only tracking is affected; "
        "run `python -m flows.restore` to send what is missing"
    )


@contextmanager
def warn_on_failure(uri: str, warn: Callable[[str], object]) -> Iterator[None]:
    """Turns a tracking failure in the block into a warning: results are on disk and can be sent later.

    Args:
        uri: of the tracking server or store; the environment variable MLFLOW_TRACKING_URI overrides it.
        warn: called with the line.
    """
    try:
        yield
    except Exception as error:
        warn(failure(os.environ.get("MLFLOW_TRACKING_URI") or uri, error))


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
        with _exclusive(self.uri):
            self._client = _client(self.uri)
            existing = self._client.get_experiment_by_name(experiment)
            self._experiment = existing.experiment_id if existing else self._client.create_experiment(experiment)
        self._tag_experiment({"mlflow.experimentKind": "custom_model_development", NOTE: self._about()})

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
            self.set_tags(run_id, {NOTE: run_note(trained, seed, self._base, results)})
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

        parts = [file for file in folder.rglob("*") if file.is_file()] + [*ROOT.glob("lotlip/**/*.py")]
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


@contextmanager
def _exclusive(uri: str) -> Iterator[None]:
    """Keeps other programs of this user from opening the same SQLite store during the block.

    MLflow creates the tables of a new store without a lock; if two processes do so at once, both fail.
    """
    if not uri.startswith(SQLITE):
        yield
        return
    name = sha256_json(str(Path(uri.removeprefix(SQLITE)).resolve()))[:16]
    with lock(cache_folder() / f"mlflow-{name}.lock", f"MLflow's store {uri}", wait=True):
        yield


def prepare_store(uri: str) -> None:
    """Creates MLflow's SQLite file with its tables, or checks the one that exists; other stores are left alone.

    Raises:
        ValueError: the file is damaged, or is not an SQLite file.
    """
    import sqlite3

    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or path.name == ":memory:" or path.is_dir():
        return
    if not path.exists() or not path.stat().st_size:  # an empty one may be in the middle of its creation
        # MLflow adds its default experiment, which names a folder for artifacts, when it opens a store that has none
        create_database(
            path,
            f"mlflow-{version('mlflow')}",
            migrate=lambda new: _open(f"{SQLITE}{new}"),
            clean="DELETE FROM experiments",
        )
    base = sqlite3.connect(path)
    try:
        result = base.execute("PRAGMA quick_check(1)").fetchone()
        problem = "" if result == ("ok",) else str(result[0])
    except sqlite3.OperationalError:  # locked by another process, so it can be opened
        problem = ""
    except sqlite3.DatabaseError as error:
        problem = str(error)
    finally:
        base.close()
    if problem:
        raise ValueError(
            f"{path} is damaged ({' '.join(problem.split())}); rename it and rebuild it with `python -m flows.restore`"
        )


def _client(uri: str) -> MlflowClient:
    # by default MLflow retries for many minutes to reach a server that has ended
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds
    # our own warning names the server once; each retry would add a line
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    prepare_store(uri)
    return _open(uri)


def _open(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
