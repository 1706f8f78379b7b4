"""The complete pipeline, run like a user on tiny data."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from safetensors.torch import load_file, save_file

from flows.reproduce import dvc_runs
from flows.runtime.servers import START_TIMEOUT_SECONDS, free_port, is_free
from lotlip.config.params import Reproduce, load_params
from lotlip.core.files import sha256_files, write_record
from lotlip.evaluate.records import StartScores, made_with
from tests.tiny_baselines import save_clip
from tests.workspace import ROOT, Workspace, tiny

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def reproduced(make_workspace) -> Workspace:
    workspace = make_workspace()
    longer = yaml.safe_load((workspace.folder / "params.yaml").read_text())["finetune"]["long-clip"]
    workspace.change(tiny)
    workspace.change(lambda params: params.update(finetune={"long-clip": longer}))
    workspace.change(lambda params: params["caption"]["captioners"].pop("instructblip"))
    workspace.output = workspace.python("flows.reproduce", alone=True).stdout
    return workspace


@pytest.mark.parametrize(
    ("chosen", "arguments", "runs"),
    [
        ([], [], [[]]),
        (
            ["lotlip", "long-clip"],
            [],
            [["evaluate@lotlip", "evaluate-finetune@long-clip"], ["--single-item", "report"]],
        ),
        (["lotlip"], ["--all"], [[]]),
        (["lotlip"], ["shard"], [["shard"]]),
    ],
)
def test_the_runs_of_dvc_follow_the_command_line(
    chosen: list[str], arguments: list[str], runs: list[list[str]]
) -> None:
    params = load_params(ROOT / "params.yaml").model_copy(update={"reproduce": Reproduce(ablations=chosen)})
    assert dvc_runs(params, arguments) == runs


def test_the_pipeline_writes_a_report(reproduced: Workspace) -> None:
    assert "Done in" in reproduced.output
    page = (reproduced.folder / "report" / "index.html").read_text()
    assert "This is the demo" in page
    assert "Missing or outdated" not in page
    for ablation in ("lit", "lotlip", "long-clip"):
        assert ablation in page
    assert (reproduced.folder / "report" / "report.md").is_file()


def test_scores_are_stored_with_their_protocol(reproduced: Workspace) -> None:
    scores = json.loads((reproduced.folder / "metrics" / "lotlip.json").read_text())
    scenes = scores["benchmarks"]["scenes"]
    assert scenes["protocol"]["images"] == 60
    assert scenes["protocol"]["context_length"] == 128
    assert set(scenes["chance"]) <= set(scenes["seeds"]["0"])
    assert len(scenes["weights_sha256"]["0"]) == 64
    objects = load_params(ROOT / "params.yaml").ingest.source.most_objects
    assert len(scenes["reading"]["0"]["hard_negatives"]["by_position"]) == objects
    params = load_params(reproduced.folder / "params.yaml")
    current = made_with(params.evaluate, params.paths, params.caption.describing, reproduced.folder)
    assert scenes["made_with"] == current["scenes"]
    assert scores["config"]["text"]["corner_tokens"] == 2
    assert json.loads((reproduced.folder / "metrics" / "lit.json").read_text())["config"]["text"]["corner_tokens"] == 0


def test_every_flow_and_unit_is_in_prefect(reproduced: Workspace) -> None:
    with sqlite3.connect(reproduced.folder / ".prefect" / "prefect.db") as store:
        flows = store.execute(
            "select flow.name, flow_run.state_type, count(*) from flow_run join flow on flow.id = flow_run.flow_id "
            "group by 1, 2"
        ).fetchall()
        units = store.execute("select count(*) from task_run where state_type = 'COMPLETED'").fetchone()[0]
    single_runs = dict.fromkeys(("baselines", "image-tower", "ingest", "report", "shard"), 1)
    assert {name: count for name, _, count in flows} == {**single_runs, "caption": 2, "evaluate": 3, "pretrain": 3}
    assert {state for _, state, _ in flows} == {"COMPLETED"}
    assert units == 5 + 2 * 5 + 4 + 3  # partitions, partitions of each captioner, shards, benchmark of each ablation


def test_mlflow_has_a_run_for_each_ablation_and_seed(reproduced: Workspace) -> None:
    client = reproduced.mlflow()
    experiment = client.get_experiment_by_name("lotlip")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"lit-seed0", "lotlip-seed0", "long-clip-seed0"}
    run = runs["lotlip-seed0"]
    assert run.info.status == "FINISHED"
    assert run.data.params["text.corner_tokens"] == "2"
    assert run.data.params["seed"] == "0"
    assert {"ablation", "data_hash", "git_commit"} <= set(run.data.tags)
    scenes = json.loads((reproduced.folder / "metrics" / "lotlip.json").read_text())["benchmarks"]["scenes"]
    for name, value in scenes["seeds"]["0"].items():
        assert run.data.metrics[f"scenes.{name}"] == pytest.approx(value)
    accuracy = scenes["reading"]["0"]["hard_negatives"]["accuracy"]["value"]
    assert run.data.metrics["scenes.reading.hard_negatives.accuracy"] == pytest.approx(accuracy)
    for curve in ("loss", "temperature", "learning_rate", "samples_per_second"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, f"train.{curve}")] == [2, 4, 6]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"figures"}
    models = client.search_logged_models([experiment.experiment_id])
    assert {model.name for model in models} == set(runs)
    assert {model.source_run_id for model in models} == {run.info.run_id for run in runs.values()}


# --- a fresh clone with DVC's outputs, and no MLflow store ---------------------------------------------------------


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def store_contents(folder: Path) -> dict[str, Any]:
    """Name of a run → its stored contents without ids, times and user."""
    from mlflow import MlflowClient

    client = MlflowClient(store(folder))
    experiment = client.get_experiment_by_name("lotlip")
    assert experiment is not None
    by_name: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.run_name not in by_name
        figures = client.list_artifacts(run.info.run_id, "figures/scenes")
        (output,) = run.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        model_folder = Path(model.artifact_location.removeprefix("file://"))
        by_name[run.info.run_name] = {
            "status": run.info.status,
            "tags": {key: value for key, value in run.data.tags.items() if key not in ("mlflow.user",)},
            "params": run.data.params,
            "metrics": run.data.metrics,
            "loss": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train.loss")],
            "figures": {Path(file.path).name: file.file_size for file in figures},
            "model": (model.name, model.status, sha256_files([model_folder / "data" / "model.safetensors"])),
        }
    return by_name


@pytest.fixture(scope="module")
def clone(reproduced: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of the checkout, without an MLflow store, after `dvc pull`."""
    remote, published, clone = (tmp_path_factory.mktemp("restore") / name for name in ("remote", "published", "clone"))
    reproduced.run("dvc", "remote", "add", "--local", "--default", "here", str(remote))  # --local: not committed
    reproduced.run("dvc", "push", "--quiet")
    subprocess.run(["git", "clone", "--quiet", reproduced.folder, published], check=True)
    for name in ("params.yaml", "dvc.lock"):
        (published / name).write_bytes((reproduced.folder / name).read_bytes())
    git = ["git", "-C", str(published), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "add", "params.yaml", "dvc.lock"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "ran"], check=True)
    subprocess.run(["git", "clone", "--quiet", published, clone], check=True)
    run(reproduced, clone, "-m", "dvc", "remote", "add", "--local", "--default", "here", str(remote))
    run(reproduced, clone, "-m", "dvc", "pull", "--quiet")
    return clone


def run(workspace: Workspace, clone: Path, *arguments: str) -> str:
    """Runs Python in the clone, with the workspace's servers."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=clone,
        env={**workspace.environment, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.system
def test_the_store_is_restored_without_training(reproduced: Workspace, clone: Path) -> None:
    assert not (clone / "mlflow.db").exists()
    output = run(reproduced, clone, "-m", "flows.restore")
    assert "lit: 1 seeds, scores on scenes" in output
    assert "MLflow has 3 ablations" in output
    expected, restored = store_contents(reproduced.folder), store_contents(clone)
    assert set(restored) == set(expected) == {"lit-seed0", "lotlip-seed0", "long-clip-seed0"}
    for name, run_contents in expected.items():
        for field, value in run_contents.items():
            assert restored[name][field] == value, (name, field)
    assert not (clone / ".lotlip" / "work").exists()  # the working folder of stages
    run(reproduced, clone, "-m", "flows.restore")
    assert store_contents(clone) == restored


def test_the_report_is_pulled_and_can_be_rebuilt(reproduced: Workspace, clone: Path) -> None:
    assert "didn't change" in run(reproduced, clone, "-m", "dvc", "repro", "--dry", "report")
    assert "Running stage" not in run(reproduced, clone, "-m", "dvc", "repro", "--dry")
    before = {file.relative_to(clone): file.read_bytes() for file in (clone / "report").rglob("*") if file.is_file()}
    assert len(before) > 5
    run(reproduced, clone, "-m", "flows.stages.report")
    after = {file.relative_to(clone): file.read_bytes() for file in (clone / "report").rglob("*") if file.is_file()}
    assert after == before


def test_dvc_shows_metrics_and_plots(reproduced: Workspace, clone: Path) -> None:
    shown = run(reproduced, clone, "-m", "dvc", "metrics", "show", "--md")
    assert "scenes.long.text_to_image.r1" in shown
    assert "protocol" not in shown
    assert "metrics/summary/lotlip.json" in shown.replace("\\", "/")
    run(reproduced, clone, "-m", "dvc", "plots", "show", "--out", "drawn")
    page = (clone / "drawn" / "index.html").read_text()
    for what in ("Loss", "R@1 and accuracy", '"ablation": "lotlip"', "in_batch_recall"):
        assert what in page
    assert "<DVC_METRIC" not in page


def test_missing_outputs_are_an_error_with_a_remedy(reproduced: Workspace, clone: Path, tmp_path: Path) -> None:
    environment = {**reproduced.alone, "PYTHONPATH": str(clone)}
    (tmp_path / "params.yaml").write_bytes((clone / "params.yaml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "flows.restore"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "models has no trained ablations; run `dvc pull`" in done.stderr
    assert "Traceback" not in done.stderr


# --- changes -------------------------------------------------------------------------------------------------------


def test_an_unchanged_pipeline_runs_nothing(reproduced: Workspace) -> None:
    done = reproduced.run("dvc", "repro")
    assert "up to date" in done.stdout
    assert "Running stage" not in done.stdout


def test_a_changed_parameter_runs_dependent_stages(reproduced: Workspace) -> None:
    before = (reproduced.folder / "params.yaml").read_text()

    def stale() -> set[str]:
        """The stages that DVC considers stale before running any."""
        lines = reproduced.run("dvc", "repro", "--dry").stdout.splitlines()
        return {line.split("'")[1] for line in lines if line.startswith("Running stage")}

    try:
        reproduced.change(lambda params: params["report"].update(title="another"))
        assert stale() == {"report"}
        reproduced.change(lambda params: params["ablations"]["lit"].update(steps=5))
        reproduced.change(lambda params: params.update(compute={"workers": 1}))
        # evaluate@lit and finetuned ablations become stale when the model has changed
        assert stale() == {"pretrain@lit", "report"}
        reproduced.change(lambda params: params["caption"]["captioners"]["llava"].update(omission=0.5))
        assert {"caption@llava", "shard"} <= stale()
        assert not {"ingest", "image-tower", "caption@sharegpt4v"} & stale()
    finally:
        (reproduced.folder / "params.yaml").write_text(before)


@pytest.fixture(scope="module")
def previous_scores(reproduced: Workspace) -> dict[str, bytes]:
    """Repeats one ablation from its image tower on and evaluates the other, with an empty store.

    Returns the previous scores.
    """
    scores = {path.name: path.read_bytes() for path in (reproduced.folder / "metrics").glob("*.json")}
    stages = ("image-tower", "caption@llava", "shard", "pretrain@lotlip", "evaluate@lotlip", "evaluate@lit")
    reproduced.run("dvc", "repro", "--force", "--single-item", *stages, MLFLOW_TRACKING_URI=restored_store(reproduced))
    return scores


def restored_store(workspace: Workspace) -> str:
    return f"sqlite:///{workspace.folder}/rebuilt.db"


def test_ablations_share_the_image_features_of_the_frozen_tower(reproduced: Workspace) -> None:
    (kept,) = (reproduced.folder / ".lotlip" / "features").rglob("*.safetensors")
    assert kept.parent.name == "scenes"
    scores = [reproduced.folder / "metrics" / f"{name}.json" for name in ("lit", "lotlip", "long-clip")]
    # features that an ablation encodes again are written again; only the first to finish may have written these
    assert kept.stat().st_mtime < min(file.stat().st_mtime for file in scores)


@pytest.mark.system
def test_the_same_parameters_give_the_same_scores(reproduced: Workspace, previous_scores: dict[str, bytes]) -> None:
    after = (reproduced.folder / "metrics" / "lotlip.json").read_text()
    assert json.loads(after) == json.loads(previous_scores["lotlip.json"])


@pytest.mark.system
def test_evaluating_again_restores_a_lost_store(reproduced: Workspace, previous_scores: dict[str, bytes]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(restored_store(reproduced))
    runs = client.search_runs([client.get_experiment_by_name("lotlip").experiment_id])
    (run,) = (run for run in runs if run.info.run_name == "lit-seed0")  # it was not trained again
    assert len(client.get_metric_history(run.info.run_id, "train.loss")) == 3


def test_a_failing_gate_publishes_nothing(reproduced: Workspace) -> None:
    before = (reproduced.folder / "params.yaml").read_text()
    scores_before = (reproduced.folder / "metrics" / "lit.json").read_bytes()
    try:
        reproduced.change(lambda params: params["evaluate"].update(min_score_over_chance=60))
        done = reproduced.python("flows.stages.evaluate", "lit", check=False)
    finally:
        (reproduced.folder / "params.yaml").write_text(before)
    assert done.returncode == 1
    assert "error in evaluate lit: the gate after evaluate failed, nothing was published" in done.stderr
    assert "(or of long, or top-1) is at least 60 times chance" in done.stderr
    assert "Traceback" not in done.stderr
    assert (reproduced.folder / "metrics" / "lit.json").read_bytes() == scores_before
    gate = reproduced.folder / ".lotlip" / "gates" / "evaluate-lit"
    assert "60 times chance" in (gate / "gate.md").read_text()
    assert list((gate / "data_docs").rglob("index.html"))


@pytest.mark.system
def test_baselines_are_scored_again_when_their_files_change(reproduced: Workspace) -> None:
    before = (reproduced.folder / "params.yaml").read_text()
    weights = save_clip(reproduced.folder / "imported-clip") / "model.safetensors"
    scores = reproduced.folder / "metrics" / "baselines" / "scores.json"

    def repro() -> list[str]:
        return stages_run(reproduced.run("dvc", "repro", "evaluate@lit", "report").stdout)

    try:
        reproduced.change(lambda params: params["evaluate"].update(baselines=["imported-clip"]))
        assert repro() == ["baselines", "report"]  # ablations are not scored again
        first = scores.read_bytes()
        assert "imported-clip (not trained here)" in (reproduced.folder / "report" / "index.html").read_text()
        assert repro() == []
        save_file({name: 2 * weight for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
        output = reproduced.python("flows.reproduce", "evaluate@lit", "report").stdout
        assert "so all baselines are scored again: imported-clip" in output
        assert stages_run(output) == ["baselines", "report"]
        assert scores.read_bytes() != first
        assert "Nothing has changed" in reproduced.python("flows.reproduce", "evaluate@lit", "report").stdout
    finally:
        (reproduced.folder / "params.yaml").write_text(before)
    repro()
    assert json.loads(scores.read_text()) == {"models": []}


def stages_run(output: str) -> list[str]:
    """The stages that DVC ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.mark.parametrize("start", [pytest.param(0.0, marks=pytest.mark.system), 1.0])
def test_the_gate_compares_short_text_scores_with_the_starting_model(reproduced: Workspace, start: float) -> None:
    before = (reproduced.folder / "params.yaml").read_text()
    folder = reproduced.folder / "metrics" / "baselines"
    stored = {file.name: file.read_bytes() for file in folder.iterdir()}
    changes = {"baselines": ["start"], "max_short_text_loss": 0.1}
    try:
        reproduced.change(lambda params: params["evaluate"].update(changes))
        StartScores(short_text_r1={"scenes": start}).write(folder / "start.json")
        write_record(folder, Path("metrics/baselines"))
        done = reproduced.python("flows.stages.evaluate", "lit", check=False)
    finally:
        (reproduced.folder / "params.yaml").write_text(before)
        for name, data in stored.items():
            (folder / name).write_bytes(data)
    assert done.returncode == (1 if start else 0), done.stderr
    if start:
        assert "R@1 of short text (mean of both directions) is at most 10 % below the start's" in done.stderr
        assert "scenes seed 0: R@1" in done.stderr and "start 100 %" in done.stderr


def test_a_missing_starting_model_is_an_error(reproduced: Workspace) -> None:
    before = (reproduced.folder / "params.yaml").read_text()
    try:
        reproduced.change(lambda params: params["evaluate"].update(baselines=["start"]))
        done = reproduced.python("flows.stages.baselines", check=False)
    finally:
        (reproduced.folder / "params.yaml").write_text(before)
    assert done.returncode == 1
    assert "data/image-tower/start does not exist: start needs pretrain.start and image_tower: {kind: start}" in (
        done.stderr
    )


@pytest.mark.system
def test_the_uis_show_finished_runs(reproduced: Workspace) -> None:
    prefect, mlflow = free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.ui"],
        cwd=reproduced.folder,
        env={**reproduced.alone, "PREFECT_PORT": str(prefect), "MLFLOW_PORT": str(mlflow)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        output = [process.stdout.readline() for _ in range(6)]
        assert output[0].split() == ["Prefect", f"http://127.0.0.1:{prefect}"]
        user, _, password = output[1].split()[-1].partition(":")
        assert output[2].split() == ["MLflow", f"http://127.0.0.1:{mlflow}"]
        assert output[3].split()[-1] == password
        assert output[4].split()[-1].startswith(f"http://127.0.0.1:{mlflow}/#/experiments/")
        assert "viewStateShareKey=comparison" in output[4]
        for path in (f"{prefect}/api/flow_runs/count", f"{mlflow}/api/2.0/mlflow/experiments/search"):
            assert httpx.post(f"http://127.0.0.1:{path}", json={}, timeout=START_TIMEOUT_SECONDS).status_code == 401
        with httpx.Client(timeout=START_TIMEOUT_SECONDS, auth=(user, password)) as client:
            settings = client.get(f"http://127.0.0.1:{prefect}/ui-settings").json()
            assert settings["api_url"] == f"http://127.0.0.1:{prefect}/api"
            assert client.post(f"http://127.0.0.1:{prefect}/api/flow_runs/count", json={}).json() >= 10
            search = {"max_results": 10, "filter": "name = 'lotlip'"}
            address = f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/experiments/search"
            runs_found = client.post(address, json=search).json()
        assert [experiment["name"] for experiment in runs_found["experiments"]] == ["lotlip"]
    finally:
        process.terminate()
    assert process.wait(START_TIMEOUT_SECONDS) == 128 + signal.SIGTERM
    assert is_free(prefect)
    assert is_free(mlflow)
