"""Sweeps: the trials of a grid, and their outcomes when they are run, fail, are killed or cancelled."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml
from pydantic import ValidationError

from flows.deployments import NIGHTLY, WEEKLY
from flows.runtime.fork_server import SOCKET
from flows.runtime.servers import free_port
from flows.sweep import runners
from flows.sweep.runners import DONE, FAILED, REUSED, WAITING, LocalRunner, Outcome, TrialRunner
from flows.sweep.sweep import _fork_server_for, main, time_left
from flows.sweep.trials import Sweep, Trial, make_grid, short_name, with_changes
from flows.sweep.workspaces import Experiment, Snapshot, set_params
from lotlip.config.params import Params, load_params
from lotlip.core.section import ConfigError, flatten
from lotlip.evaluate.records import BenchmarkScores
from tests.browser import PICTURES, TIMEOUT, chromium, needs_chromium
from tests.flows.test_cancel import await_that, post, send
from tests.flows.test_pool import git
from tests.tiny_pipeline import smallest
from tests.workspace import ROOT, Workspace

CORNERS, MASK, RATE = "pretrain.text.corner_tokens", "pretrain.text.corner_mask", "pretrain.optimizer.learning_rate"


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def names(grid: list[Trial]) -> list[str]:
    return [point.experiment({}) for point in grid]


@pytest.mark.slow
def test_a_grid_has_a_trial_for_each_configuration_and_seed(params):
    grid = make_grid(Sweep(name="grid", corner_tokens=[1, 2], sub_captions=[1, 3, 5], seeds=[0, 1]), params)
    assert len(grid) == len(set(names(grid))) == 12
    chosen = grid[-1].params.pretrain
    assert (chosen.text.corner_tokens, chosen.long_texts.sub_captions, chosen.seeds) == (2, 5, [1])
    assert grid[-1].configuration == {CORNERS: 2, "pretrain.long_texts.sub_captions": 5}


def test_an_empty_sweep_is_params_yaml_with_each_of_its_seeds(params):
    grid = make_grid(Sweep(name="plain"), params)
    assert [point.seed for point in grid] == params.pretrain.seeds
    assert grid[0].params.pretrain.text == params.pretrain.text
    assert grid[0].base == "lotlip"


@pytest.mark.slow
def test_equivalent_trials_are_merged(params):
    assert len(make_grid(Sweep(name="masks", corner_tokens=[0, 2], corner_mask=[True, False], seeds=[0]), params)) == 3
    long_texts = {"pretrain.long_texts.per_image": [1, 2]}
    assert len(make_grid(Sweep(name="drawn", sub_captions=[0, 1], other=long_texts, seeds=[0]), params)) == 3
    sampled = {"pretrain.long_texts.sampler": ["window", "all"]}
    grid = make_grid(Sweep(name="sampled", sub_captions=[1, 3], other=sampled, seeds=[0]), params)
    assert [name.split("-c")[0] for name in names(grid)] == ["m2-k1", "m2-kall", "m2-k3"]
    assert len(make_grid(Sweep(name="twice", corner_tokens=[2, 2], seeds=[0, 0]), params)) == 1


def test_a_trial_has_the_same_name_in_every_sweep(params):
    corner_tokens = params.pretrain.text.corner_tokens
    grid = make_grid(Sweep(name="one", corner_tokens=[corner_tokens], seeds=[0]), params)
    assert names(grid) == names(make_grid(Sweep(name="two", seeds=[0]), params))
    assert names(make_grid(Sweep(name="other", other={RATE: [0.5]}, seeds=[0]), params)) != names(grid)
    (trial,) = grid
    assert trial.experiment({"code": "a"}) != trial.experiment({"code": "b"})


def test_an_unknown_parameter_is_an_error_with_a_suggestion(params):
    with pytest.raises(
        ConfigError, match=r"pretrain\.optimizer\.learning_rat: unknown key; did you mean 'learning_rate'"
    ):
        make_grid(Sweep(name="typo", other={"pretrain.optimizer.learning_rat": [0.1]}), params)


def test_all_errors_of_a_grid_are_reported_at_once(params):
    with pytest.raises(ConfigError) as refused:
        make_grid(Sweep(name="wrong", other={RATE: [0.1, -1.0], "evaluate.batch_size": [0]}, seeds=[0]), params)
    assert "learning_rate" in str(refused.value)
    assert "batch_size" in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"corner_tokens": [17]}, "less than or equal to 16"),
        ({"other": {"tracking.uri": ["x"]}}, "settings that decide results"),
        ({"other": {RATE: []}}, "has no values"),
        ({"other": {CORNERS: [1]}}, "list its values in corner_tokens"),
        ({"parallelism": 0}, "greater than or equal to 1"),
        ({"budget": 3}, "Extra inputs"),
    ],
)
def test_an_invalid_sweep_is_an_error(wrong: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        Sweep.model_validate({"name": "wrong", **wrong})


@pytest.mark.slow
def test_the_scheduled_sweeps_are_valid_for_params_yaml(params):
    assert 1 < len(make_grid(NIGHTLY, params)) < len(make_grid(WEEKLY, params))


def test_trials_run_one_after_another_here_and_side_by_side_on_a_pool():
    assert Sweep(name="here").parallel == 1
    assert Sweep(name="there", pool="gpu").parallel == 32
    assert Sweep(name="there", pool="gpu", parallelism=2).parallel == 2


@pytest.mark.integration
def test_the_time_left_is_estimated_from_finished_trials():
    done, reused, waiting = Outcome(DONE), Outcome(REUSED), Outcome(WAITING)
    assert time_left(60, [reused, waiting, waiting], 2) == ""
    assert (
        time_left(180, [done, *[waiting] * 5], 2) == ", about 6.0 minutes left"
    )  # one full and two half trials in 3 minutes
    assert time_left(180, [done, Outcome(FAILED), *[reused] * 9, waiting], 4) == ", about 0.6 minutes left"
    assert time_left(180, [done, reused], 2) == ""


def test_columns_with_the_same_last_word_get_distinct_names():
    keys = ["pretrain.text.config.dropout", "evaluate.dropout", "pretrain.steps"]
    assert [short_name(key, keys) for key in keys] == [keys[0], keys[1], "steps"]


@pytest.mark.slow
def test_parameters_are_set_without_touching_other_lines(tmp_path: Path):
    before = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(before)
    set_params(path, {CORNERS: 7, "pretrain.text.context_length": 96, "caption.captioners.llava.omission": 0.5})
    lines, ours = path.read_text().splitlines(), ("corner_tokens: 7", "context_length: 96", "omission: 0.5")
    assert {line.strip() for line in lines} - {line.strip() for line in before.splitlines()} == {
        line.strip() for line in set(lines) - set(before.splitlines()) if any(part in line for part in ours)
    }
    assert len(lines) == len(before.splitlines()) + 1  # the context length is a new line
    changed = load_params(path)
    assert (changed.pretrain.text.corner_tokens, changed.pretrain.text.context_length) == (7, 96)
    assert changed.caption.captioners["llava"].omission == 0.5


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        ({"context_lengths": [64, 192, 256]}, [64, 192, 256]),
        ({"other": {"pretrain.loss.objective": ["siglip"]}}, ["siglip"]),
        ({"other": {"pretrain.short_texts.random_offset": [True, False]}}, [True, False]),
        ({"other": {"pretrain.loss.short_loss_fraction": [None, 0.5]}}, [None, 0.5]),
    ],
)
def test_a_value_needs_to_be_valid_only_for_the_ablation_that_is_trained(params, wanted: dict[str, Any], values):
    grid = make_grid(Sweep.model_validate({"name": "methods", "seeds": [0], **wanted}), params)
    (key,) = grid[0].configuration
    assert [flatten(trial.params.model_dump())[key] for trial in grid] == values
    with pytest.raises(ConfigError, match="late-interaction does not support corner tokens"):
        make_grid(Sweep(name="wrong", other={"pretrain.similarity": ["late-interaction"]}), params)


@pytest.mark.parametrize("compute", [{}, {"ablations": {"lotlip": {"zero_stage": 1}, "lit": {"zero_stage": 2}}}])
def test_a_checkout_has_only_the_ablation_that_the_trial_trains(params, tmp_path, compute: dict[str, Any]):
    project = Params.model_validate(params.model_dump(mode="json", exclude_unset=True) | {"compute": compute})
    sweep = Sweep(name="methods", seeds=[3], other={"pretrain.short_texts.random_offset": [True]})
    (trial,) = make_grid(sweep, project)
    file = tmp_path / "params.yaml"
    file.write_text((ROOT / "params.yaml").read_text())
    set_params(file, {"compute": compute})
    set_params(file, trial.overrides)
    written = load_params(file)
    assert written == trial.params
    assert (written.names, written.pretrain.seeds) == (["lotlip"], [3])
    assert written.training_compute("lotlip") == project.training_compute("lotlip")
    expected = project.pretrain.model_copy(update={"seeds": [3], "short_texts": trial.params.pretrain.short_texts})
    assert trial.identity() == {**project.decisive_sections(), "pretrain": expected.effective()}


PUBLISHED = {"kind": "coco", "folder": "mine", "partial": True}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"pretrain": {"text": {"pretrained": "mine"}}}, {"pretrain@lotlip"}),
        ({"pretrain": {"start": "mine"}, "image_tower": {"kind": "start"}}, {"pretrain@lotlip"}),
        ({"evaluate": {"benchmarks": {"coco": PUBLISHED}}}, {"evaluate@lotlip"}),
        ({}, set()),
    ],
)
def test_a_trial_has_a_new_name_when_files_that_dvc_does_not_watch_change(
    params, tmp_path, monkeypatch, changes: dict[str, Any], stages: set[str]
):
    monkeypatch.chdir(tmp_path)
    data = params.model_dump(mode="json", exclude_unset=True) | only("lotlip") | {"registry": None}
    Path("mine").mkdir()
    found = []
    for weights in ("old", "new", "old"):
        Path("mine/model.safetensors").write_text(weights)
        (trial,) = make_grid(Sweep(name="s", seeds=[0]), Params.model_validate(data | changes))
        runner: Any = object.__new__(LocalRunner)
        runner.inputs, runner._hashes, runner.snapshot = {"code": "a"}, {}, SimpleNamespace(root=tmp_path)
        found.append(runner.experiment(trial).name)
        assert runner.experiment(trial).name == found[-1]
        assert trial.unwatched_stages() == stages
    assert found[0] == found[2]
    assert (found[0] == found[1]) is (not stages)
    assert (found[0] == trial.experiment({"code": "a"})) is (not stages)


# --- finished trials ------------------------------------------------------------------------------------------------


def finish(root: Path, name: str, content: dict[str, Any]) -> Experiment:
    """Makes an experiment of a project, whose params.yaml had this content."""
    git(root, "init", "--quiet")
    (root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    git(root, "add", "params.yaml")
    git(root, "commit", "--quiet", "--message", name)
    commit = git(root, "rev-parse", "HEAD").strip()
    git(root, "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/{name}", commit)
    return Experiment(root, name)


def only(ablation: str) -> dict[str, Any]:
    """Sections of a params.yaml with one ablation."""
    return {"ablations": {ablation: {}}, "finetune": {}, "reproduce": {}, "tables": {}, "findings": {}}


def with_values(params: Params, **values: Any) -> dict[str, Any]:
    """The content of a params.yaml with other values of `pretrain`."""
    return with_changes(params.model_dump(mode="json", exclude_unset=True), {"pretrain": values})


@pytest.mark.slow
def test_all_settings_of_a_trial_are_applied_whatever_its_sweep_varied(params, tmp_path, monkeypatch, capsys):
    finish(tmp_path, "m2-s7", with_values(params, seeds=[7]))
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    image_tower = {"kind": "packaged"}
    set_params(Path("params.yaml"), {CORNERS: 4, "pretrain.text.context_length": 96, "ingest.source.seed": 3})
    set_params(Path("params.yaml"), {"evaluate.benchmarks.more": {"kind": "held-out"}, "image_tower": image_tower})
    main(["--apply", "m2-s7"])
    applied = load_params()
    assert applied.decisive_sections() == params.decisive_sections()
    assert applied.pretrain.seeds == params.pretrain.seeds
    assert "# docs/findings.md says why" in Path("params.yaml").read_text()
    printed = capsys.readouterr().out
    for part in ("pretrain.text.corner_tokens = 2", "pretrain.text.context_length = 128", "ingest.source.seed = 2024"):
        assert part in printed
    main(["--apply", "m2-s7"])
    assert capsys.readouterr().out == "params.yaml already has the settings of m2-s7\n"


def test_ablations_that_do_not_go_with_applied_settings_are_named(params, tmp_path, monkeypatch):
    content = with_values(params, short_texts={"random_offset": True})
    finish(tmp_path, "m2", content | only("lotlip"))
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(ConfigError, match=r"params\.yaml cannot be used:(?s:.*)ablations\.filip"):
        main(["--apply", "m2"])
    assert "random_offset: true" in Path("params.yaml").read_text()


def test_a_finished_trial_is_read_after_its_ablation_and_folders_have_other_names(params, monkeypatch):
    monkeypatch.setattr(runners, "get_run_logger", lambda: logging.getLogger("test"))
    settings = Sweep(name="again", seeds=[0])
    data = params.model_dump(mode="json", exclude_unset=True)
    renamed = Params.model_validate(data | only("ours") | {"paths": {"models": "trained"}})
    (trial,) = make_grid(settings, params)
    (again,) = make_grid(settings, renamed)
    assert names([trial]) == names([again])
    scores = BenchmarkScores(seeds={0: {"long.text_to_image.r1": 0.5}})
    files = {
        "metrics/lotlip.json": SimpleNamespace(benchmarks={"scenes": scores}),
        "metrics/stages/pretrain-lotlip.json": SimpleNamespace(seconds=40),
        "metrics/stages/evaluate-lotlip.json": SimpleNamespace(seconds=20),
        "models/lotlip/run.json": "run",
    }
    experiment = SimpleNamespace(name="m2", params=lambda: params, read=lambda path, _: files[path.as_posix()])
    tracker = SimpleNamespace(
        uri="http://server", experiment_id="1", ensure_runs={"run": {"0": "id"}}.get, set_tags=lambda *_: None
    )
    runner: Any = SimpleNamespace(params=renamed, settings=settings, flow_run="", tracker=tracker, _lock=nullcontext())
    outcome = TrialRunner._outcome(runner, again, experiment, REUSED)  # type: ignore[arg-type]
    assert (outcome.scores, outcome.minutes, outcome.run_id) == ({"long.text_to_image.r1": 0.5}, 1.0, "id")


# --- run ------------------------------------------------------------------------------------------------------------


def run_sweep(workspace: Workspace, settings: dict[str, Any], **options: Any) -> subprocess.CompletedProcess[str]:
    return workspace.python("flows.sweep", json.dumps({"retries": 0, **settings}), **options)


def experiments(workspace: Workspace) -> dict[str, str]:
    """Name of an experiment → its commit."""
    lines = workspace.run("git", "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").stdout.splitlines()
    return {line.split()[0].rpartition("/")[2]: line.split()[1] for line in lines}


def artifact(workspace: Workspace, key: str) -> Any:
    """Content of Prefect's newest artifact with this key."""
    query = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    (newest,) = post(workspace.environment, "artifacts/filter", query)
    return json.loads(newest["data"]) if newest["type"] == "table" else newest["data"]


def tags(workspace: Workspace) -> dict[str, dict[str, str]]:
    """Name of each run in MLflow → its tags and id."""
    client = workspace.mlflow()
    runs = client.search_runs([client.get_experiment_by_name("lotlip").experiment_id])
    return {run.info.run_name: {**run.data.tags, "id": run.info.run_id} for run in runs}


def running(workspace: Workspace) -> list[str]:
    """Processes that run in checkouts of trials."""
    processes = []
    for process in psutil.process_iter(["pid", "cwd", "cmdline", "status"]):
        inside = (process.info["cwd"] or "").startswith(f"{workspace.folder}/.lotlip/sweeps/")
        if inside and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.append(f"{process.info['pid']} {process.info['cmdline']}")
    return processes


def with_others(params: dict[str, Any]) -> None:
    """Adds ablations that no trial trains."""
    params["ablations"]["filip"] = {"similarity": "late-interaction", "text": {"corner_tokens": 0}}
    params["finetune"] = {"longer": {"init_from": "lotlip", "pretrain": {"steps": 2}}}


@pytest.fixture(scope="module")
def done(make_workspace) -> Workspace:
    """A workspace with a finished sweep of two parallel trials."""
    workspace = make_workspace()
    workspace.change(smallest)
    workspace.change(lambda params: params["pretrain"].update(steps=6))
    workspace.change(with_others)
    before = (workspace.folder / "params.yaml").read_text()
    workspace.output = run_sweep(workspace, {"name": "two", "corner_tokens": [0, 1], "parallelism": 2}).stdout
    assert (workspace.folder / "params.yaml").read_text() == before
    return workspace


@pytest.mark.system
def test_trials_are_experiments_that_can_be_applied_to_params_yaml(done: Workspace):
    assert [name.rpartition("-")[0] for name in sorted(experiments(done))] == ["m0-k3-c128-s0", "m1-k3-c128-s0"]
    assert not list((done.folder / ".lotlip" / "sweeps").glob("*/project"))
    name = max(experiments(done))
    assert Experiment(done.folder, name).params().names == ["lotlip"]
    before = (done.folder / "params.yaml").read_text()
    try:
        done.python("flows.sweep", "--apply", name)
        after = load_params(done.folder / "params.yaml")
    finally:
        (done.folder / "params.yaml").write_text(before)
    assert after.pretrain.text.corner_tokens == 1
    refused = done.python("flows.sweep", "--apply", "nothing", check=False)
    assert refused.returncode == 1
    assert "no experiment 'nothing'" in refused.stderr


@pytest.mark.system
def test_mlflow_runs_and_prefect_flow_runs_link_to_each_other(done: Workspace):
    table = {row["trial"]: row for row in artifact(done, "sweep-two")}
    assert set(table) == set(experiments(done))
    page = artifact(done, "sweep-two-result")
    assert "python -m flows.sweep --apply m" in page
    for name, run_tags in tags(done).items():
        row = table[name]
        assert row["status"] == "done"
        assert row["long.text_to_image.r1"].endswith("%")
        assert run_tags["id"] in row["MLflow"]
        assert run_tags["id"] in artifact(done, name)
        assert run_tags["trial"] == name
        base, _, run = run_tags["sweep.two"].partition("/runs/flow-run/")
        assert run_tags["prefect.flow_run"] == run_tags["sweep.two"]
        assert base == done.environment["PREFECT_API_URL"].removesuffix("/api")
        (answer,) = post(done.environment, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        assert (answer["name"], answer["state"]["type"]) == ("sweep-two", "COMPLETED")


@pytest.mark.system
def test_finished_trials_are_reused_and_failed_ones_retried_within_the_budget(done: Workspace):
    before, rates = experiments(done), [0.001, 1e30, 2e30]
    sweep = {"name": "rates", "corner_tokens": [1], "other": {RATE: rates}, "max_runs": 1, "retries": 1}
    ended = run_sweep(done, sweep, check=False)
    assert ended.returncode == 1
    assert "1 of 3 trials failed" in ended.stderr
    assert "Traceback" not in ended.stderr
    rows = artifact(done, "sweep-rates")
    assert [row["status"] for row in rows] == ["reused", "failed", "skipped"]
    assert "error in pretrain lotlip" in rows[1]["reason"]
    (task_run,) = post(done.environment, "task_runs/filter", {"task_runs": {"name": {"any_": [rows[1]["trial"]]}}})
    assert task_run["run_count"] == 2
    assert experiments(done) == before
    assert {"sweep.two", "sweep.rates"} <= set(tags(done)[rows[0]["trial"]])


@pytest.mark.system
def test_a_sweep_sends_its_logs_before_its_own_server_ends(done: Workspace):
    ended = run_sweep(done, {"name": "alone", "corner_tokens": [0, 1]}, alone=True)
    assert "2 reused" in ended.stdout + ended.stderr
    assert "Error logging to API" not in ended.stdout + ended.stderr


@pytest.mark.system
def test_a_sweep_has_a_fork_server_with_its_own_copy_of_the_code(done: Workspace, monkeypatch: pytest.MonkeyPatch):
    code = done.folder / "flows" / "clean.py"
    before = code.read_text()
    started = lambda environment, folder: nullcontext({**environment, "at": folder})  # noqa: E731
    monkeypatch.setattr("flows.sweep.sweep.fork_server", started)
    code.write_text("# changed, and not committed")
    try:
        snapshot = Snapshot.take(done.folder)
        code.write_text("# changed during the sweep")
        runner = local_runner(snapshot, {"OTHER": "kept"}, finished=["a"])
        with _fork_server_for(runner, ["a", "b"]):
            folder = runner.environment.pop("at")
            assert runner.environment == {"OTHER": "kept", "PYTHONPATH": str(folder)}
            assert (folder / "flows" / "clean.py").read_text() == "# changed, and not committed"
            assert (folder / "lotlip" / "__init__.py").is_file()
        assert not folder.exists()
    finally:
        code.write_text(before)


@pytest.mark.parametrize(("environment", "finished"), [({}, ["a", "b"]), ({SOCKET: "given"}, [])])
def test_a_sweep_starts_no_fork_server_that_it_does_not_need(monkeypatch, environment, finished):
    monkeypatch.setattr("flows.sweep.sweep.fork_server", None)
    runner = local_runner(None, environment, finished)
    with _fork_server_for(runner, ["a", "b"]):
        assert runner.environment == environment


def local_runner(snapshot: Snapshot | None, environment: dict[str, str], finished: list[str]) -> Any:
    """What a fork server is started for; trials and experiments are names."""
    return SimpleNamespace(
        snapshot=snapshot, environment=environment, experiment=lambda trial: trial, is_finished=finished.__contains__
    )


@pytest.fixture(scope="module")
def served(done: Workspace) -> Iterator[subprocess.Popen[bytes]]:
    """The program of `make serve`, with an existing Prefect server."""
    log = done.folder / ".lotlip" / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve"],
            cwd=done.folder,
            env={**done.environment, "MLFLOW_PORT": str(free_port())},
            stdout=output,
            stderr=output,
        )
    try:
        await_that(lambda: "Forms" in log.read_text(), "it listens")
        await_that(lambda: len(deployed_forms(done)) == 4, "the deployments exist", pause=1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(300)


def printed_address(workspace: Workspace, what: str) -> str:
    """The address that `make serve` printed after a word."""
    log = (workspace.folder / ".lotlip" / "serve.log").read_text()
    return next(text.split()[1] for text in log.splitlines() if text.startswith(what))


def deployed_forms(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Flow and name → deployment that Prefect's UI can start."""
    api = workspace.environment
    flows = {one["id"]: one["name"] for one in post(api, "flows/filter", {})}
    forms = {f"{flows[one['flow_id']]}/{one['name']}": one for one in post(api, "deployments/filter", {})}
    return {name: one for name, one in forms.items() if name.split("/")[0] in ("reproduce", "sweep")}


def start(workspace: Workspace, name: str, parameters: dict[str, Any]) -> httpx.Response:
    """Starts a deployment like Prefect's form."""
    path = f"deployments/{deployed_forms(workspace)[name]['id']}/create_flow_run"
    return send(workspace.environment, path, {"parameters": parameters})


def state_of(workspace: Workspace, run: str) -> str:
    """State of a flow run."""
    (found,) = post(workspace.environment, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return str(found["state_type"])


def await_end(workspace: Workspace, run: str) -> None:
    ended = ("COMPLETED", "FAILED", "CRASHED")
    await_that(lambda: state_of(workspace, run) in ended, "the flow run has ended", pause=1)


@pytest.mark.system
@pytest.mark.usefixtures("served")
def test_the_forms_validate_their_input_and_schedules_are_inactive(done: Workspace):
    schedules = {name: [one["active"] for one in form["schedules"]] for name, form in deployed_forms(done).items()}
    by_hand: dict[str, list[bool]] = {"reproduce/by-hand": [], "sweep/by-hand": []}
    assert schedules == {**by_hand, "sweep/nightly": [False], "sweep/weekly": [False]}
    wrong = start(done, "sweep/by-hand", {"settings": {"name": "x", "corner_tokens": [17]}})
    assert wrong.status_code == 409
    assert "17 is greater than the maximum of 16" in wrong.text
    assert start(done, "reproduce/by-hand", {"what": "some"}).status_code == 409


@pytest.mark.system
@pytest.mark.usefixtures("served")
def test_the_form_reproduces_an_ablation(done: Workspace):
    scores = done.folder / "metrics" / "lotlip.json"
    assert not scores.exists()
    run = start(done, "reproduce/by-hand", {"ablations": ["lotlip"]}).raise_for_status().json()["id"]
    await_end(done, run)
    assert state_of(done, run) == "COMPLETED", (done.folder / ".lotlip" / "serve.log").read_text()[-2000:]
    assert scores.exists()


@pytest.mark.system
@needs_chromium
@pytest.mark.usefixtures("served")
def test_a_browser_starts_a_sweep_through_the_form_and_opens_its_comparison(done: Workspace):
    from playwright.sync_api import Page, expect

    def screenshot(page: Page, name: str) -> None:
        if PICTURES:
            page.wait_for_timeout(3000)  # animations end
            page.screenshot(path=f"{PICTURES}/{name}.png")

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(TIMEOUT)
        page.goto(printed_address(done, "Forms"))
        page.get_by_placeholder("admin:pass").fill(done.environment["PREFECT_API_AUTH_STRING"])
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text("by-hand")).to_have_count(2)
        screenshot(page, "deployments")
        page.goto(f"{printed_address(done, 'Forms')}/deployment/{deployed_forms(done)['sweep/by-hand']['id']}/run")
        corners, name = (
            page.locator(".schema-form-property", has=page.get_by_text(label, exact=True)).last
            for label in ("Corner tokens (Optional)", "Name")
        )
        for place, number in enumerate(("1", "3")):
            corners.get_by_role("button", name="Add item").click()
            corners.get_by_role("spinbutton").nth(place).fill(number)
        name = name.get_by_role("textbox")
        name.fill("No Name")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("does not match").first).to_be_visible()
        name.fill("form")
        screenshot(page, "form")
        page.get_by_role("button", name="Submit").click()
        # The note with a link to the flow run disappears after seconds, possibly before a busy machine shows it.
        here = {"deployments": {"name": {"any_": ["by-hand"]}}, "flows": {"name": {"any_": ["sweep"]}}}
        await_that(lambda: bool(post(done.environment, "flow_runs/filter", here)), "the form has started a flow run")
        (flow_run,) = post(done.environment, "flow_runs/filter", here)
        page.goto("about:blank")  # Prefect's pages take a part of a core for as long as they are open
        await_end(done, flow_run["id"])
        page.goto(f"{done.environment['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{flow_run['id']}")
        expect(page.get_by_text("Completed").first).to_be_visible()
        page.get_by_text("Artifacts", exact=True).click()
        expect(page.get_by_text("1 done, 1 reused").first).to_be_visible()
        screenshot(page, "sweep")
        result = artifact(done, "sweep-form-result")
        (link,) = re.findall(r"\((http[^)]*viewStateShareKey=sweep-form)\)", result)
        log = (done.folder / ".lotlip" / "serve.log").read_text()
        user, password = re.search(r"log in as (\S+) with the password (\S+)", log).groups()
        credentials = {"username": user, "password": password}  # fetch() fails with credentials in the URL
        page = browser.new_page(viewport={"width": 1600, "height": 1200}, http_credentials=credentials)
        page.set_default_timeout(TIMEOUT)
        page.goto(link, wait_until="commit")
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 2")
        shown = page.inner_text("body")
        screenshot(page, "comparison")
    assert "2 matching runs" in " ".join(shown.split())
    assert "R@1 by corner tokens" in shown


@pytest.mark.system
def test_a_killed_or_cancelled_sweep_ends_its_processes_and_resumes(done: Workspace, served):
    done.change(lambda params: params["compute"]["training"].update(checkpoint_every=20, stop_at_chance_after=0))
    steps = {"pretrain.steps": [400]}
    sweep = {"name": "long", "other": steps, "corner_tokens": [2], "retries": 0}
    sweeps = done.folder / ".lotlip" / "sweeps"

    def has_checkpoint() -> bool:
        return any(sweeps.glob("m2-*/project/.lotlip/work/pretrain-*/*/checkpoints-0/step-*[0-9]"))

    command = [sys.executable, "-m", "flows.sweep", json.dumps(sweep)]
    process = subprocess.Popen(command, cwd=done.folder, env=done.environment, stdout=subprocess.DEVNULL)
    await_that(has_checkpoint, "the trial has a checkpoint")
    assert running(done)
    process.send_signal(signal.SIGKILL)
    process.wait()
    await_that(lambda: not running(done), "all of its processes have ended")

    (point,) = sweeps.glob("m2-*")
    run = start(done, "sweep/by-hand", {"settings": sweep}).raise_for_status().json()["id"]
    await_that(lambda: "resumes after step" in (point / "log.txt").read_text(), "training resumes")
    post(done.environment, f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    await_that(lambda: not running(done), "all of its processes have ended")
    assert served.poll() is None

    run_sweep(done, sweep)  # finishes the work of the first two
    assert artifact(done, "sweep-long")[0]["status"] == "done"
    assert "resumes after step" in (point / "log.txt").read_text()
