"""Work pools: what workers push, what a sweep submits, the run cache, and the declared pools and deployments."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml
from dvc.repo import Repo
from dvc.stage import cache
from prefect.client.schemas.objects import WorkPoolStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled, State

from flows import deploy, pool
from flows.pool import WORKER_DIED
from flows.runtime.dvc import cache_trainings
from flows.runtime.scratch import StageFailed
from flows.sweep import pool_runner
from flows.sweep.pool_runner import FlowRuns, check_remotes, find_deployment, publish, reason
from flows.sweep.workspaces import Experiment, Snapshot
from lotlip.core.section import ConfigError
from tests.tiny_pipeline import ROOT


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker's clone of a bare repository."""
    source, clone_folder = tmp_path / "source", tmp_path / "clone"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", source], check=True)
    git(tmp_path, "clone", "--quiet", str(source), str(clone_folder))
    (clone_folder / "params.yaml").touch()
    git(clone_folder, "add", "--all")
    git(clone_folder, "commit", "--quiet", "--message", "start")
    git(clone_folder, "push", "--quiet", "origin", "HEAD:main")
    monkeypatch.chdir(clone_folder)
    monkeypatch.setattr(pool, "run_dvc", lambda arguments, environment: 0)
    return clone_folder


def test_the_lock_of_a_run_is_pushed_to_a_branch(clone: Path, tmp_path: Path):
    main = git(tmp_path / "source", "rev-parse", "main")
    for content in ("first", "second"):  # the second worker of a run starts from the main branch again
        git(clone, "reset", "--quiet", "--hard", "origin/main")
        (clone / "dvc.lock").write_text(content)
        pool.share("runs/blue-fox")
        assert git(tmp_path / "source", "show", "runs/blue-fox:dvc.lock") == content
    assert git(tmp_path / "source", "rev-parse", "main") == main
    assert git(tmp_path / "source", "rev-list", "--count", "main..runs/blue-fox").strip() == "1"


def test_a_failed_push_is_an_error_with_its_reason(clone: Path, monkeypatch: pytest.MonkeyPatch):
    (clone / "dvc.lock").touch()
    git(clone, "remote", "set-url", "origin", "/nowhere")
    with pytest.raises(StageFailed, match=r"(?s)`git push` failed: .*the outputs are in DVC's remote"):
        pool.share("runs/blue-fox")
    monkeypatch.setattr(pool, "run_dvc", lambda arguments, environment: 1)
    with pytest.raises(StageFailed, match="`dvc push` failed"):
        pool.share("runs/blue-fox")


# --- trials -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A colleague's project with uncommitted changes, and a bare repository as its origin."""
    folder, source = tmp_path / "project", tmp_path / "source"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", source], check=True)
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    Repo.init(str(folder)).close()
    (folder / "params.yaml").write_text("pretrain:\n  steps: 5  # short\n")
    (folder / "dvc.lock").write_text("old")
    (folder / "photos").mkdir()
    (folder / "photos" / "1.jpg").touch()
    (folder / ".gitignore").write_text("/photos\n/.lotlip\n")
    (folder / ".lotlip").mkdir()
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")
    git(folder, "remote", "add", "origin", str(source))
    (folder / "params.yaml").write_text("pretrain:\n  steps: 6  # short\n")
    return folder


def test_a_snapshot_is_published_once_with_what_is_not_committed(project: Path, tmp_path: Path):
    source = tmp_path / "source"
    first, second = (Snapshot.take(project).publish("corners") for _ in range(2))
    assert first == second
    assert git(source, "for-each-ref", "--format=%(refname)").split() == [f"refs/heads/sweeps/corners-{first[:8]}"]
    assert "steps: 6" in git(source, "show", f"{first}:params.yaml")
    assert git(source, "rev-parse", f"{first}^") == git(project, "rev-parse", "HEAD")
    (project / "params.yaml").write_text("pretrain:\n  steps: 7\n")
    third = Snapshot.take(project).publish("corners")
    assert "steps: 6" in git(source, "show", f"sweeps/corners-{first[:8]}:params.yaml")  # a worker may not have it yet
    assert "steps: 7" in git(source, "show", f"sweeps/corners-{third[:8]}:params.yaml")
    assert not git(project, "log", "--oneline", "--grep=Snapshot")


def test_a_snapshot_does_not_tell_dvc_that_some_stages_have_run(project: Path):
    lock = {"schema": "2.0", "stages": {name: {"cmd": "true"} for name in ("shard", "pretrain@a", "evaluate@a")}}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    tree = Snapshot.take(project, {"pretrain@a", "evaluate@a", "evaluate@b"}).tree
    expected = lock | {"stages": {"shard": {"cmd": "true"}}}
    assert yaml.safe_load(git(project, "show", f"{tree}:dvc.lock")) == expected
    assert yaml.safe_load((project / "dvc.lock").read_text()) == lock
    assert "steps: 6" in git(project, "show", f"{tree}:params.yaml")


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> list[list[str]]:
    """Enters a worker's clone, in which a shell script takes the place of training; returns the calls of DVC."""
    folder = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{tmp_path / 'source'}", str(folder))
    calls: list[list[str]] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pool, "supervised", lambda command: ["bash", "-c", script, *command])
    monkeypatch.setattr(pool, "run_dvc", lambda arguments, environment: calls.append(list(arguments)))
    monkeypatch.setattr(pool, "get_run_logger", lambda: SimpleNamespace(info=lambda *_: None))
    return calls


@pytest.mark.slow
def test_a_trial_on_a_worker_is_an_experiment_of_the_project(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    git(project, "push", "--quiet", "origin", "main")
    commit, changes = Snapshot.take(project).publish("corners"), {"pretrain.steps": 9}
    experiment = Experiment(project, "m1-abc")
    assert not experiment.fetch()
    calls = worker(
        tmp_path, monkeypatch, 'grep -q "steps: 9  # short" params.yaml && echo "$LOTLIP_RUN_CACHE $*" >dvc.lock'
    )
    pool.trial_on_pool.fn("m1-abc", commit, changes, "lotlip")
    assert calls == [["push", "--quiet", "--run-cache", "--with-deps", "evaluate@lotlip"]]
    assert experiment.fetch()
    revision = experiment.revision()
    assert json.loads(git(project, "show", "--no-patch", "--format=%B", str(revision))) == changes
    assert git(project, "show", f"{revision}:dvc.lock").strip() == "1 -m flows.reproduce --pull evaluate@lotlip"
    assert git(project, "show", f"{revision}:params.yaml") == "pretrain:\n  steps: 9  # short\n"
    head = git(project, "rev-parse", "HEAD").strip()
    assert git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split() == [
        f"refs/exps/{head[:2]}/{head[2:]}/m1-abc"
    ]
    assert git(project, "rev-parse", f"{revision}^").strip() == head
    pool.trial_on_pool.fn("m1-abc", "0" * 40, changes, "lotlip")  # the first worker died after its push
    assert len(calls) == 1


@pytest.mark.slow
def test_a_failed_trial_has_the_reason_of_its_stage(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git(project, "push", "--quiet", "origin", "main")
    commit = Snapshot.take(project).publish("corners")
    worker(tmp_path, monkeypatch, 'echo loading; echo "error in pretrain lotlip: the loss is nan" >&2; exit 1')
    with pytest.raises(StageFailed, match=r"^error in pretrain lotlip: the loss is nan$"):
        pool.trial_on_pool.fn("m1-abc", commit, {"pretrain.steps": 9}, "lotlip")
    assert not git(tmp_path / "source", "for-each-ref", "refs/heads/trials")
    with pytest.raises(StageFailed, match="`git fetch` failed"):
        pool.trial_on_pool.fn("m1-abc", "0" * 40, {}, "lotlip")


def test_a_project_without_remotes_cannot_use_a_pool(project: Path):
    with pytest.raises(StageFailed, match="`dvc remote add --default NAME URL`"):
        check_remotes(project)
    (project / ".dvc" / "config.local").write_text("[core]\n    remote = team\n['remote \"team\"']\n    url = /data\n")
    check_remotes(project)
    git(project, "remote", "remove", "origin")
    with pytest.raises(StageFailed, match="`git remote add origin URL`"):
        check_remotes(project)


def test_files_that_workers_lack_and_refused_pushes_are_errors(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inputs = [("ingest.source.path", Path("photos")), ("a", Path("params.yaml")), ("b", Path("/data/photos"))]
    params: Any = SimpleNamespace(inputs=lambda: inputs)
    with pytest.raises(StageFailed, match=r"(?s)workers cannot read.*ingest\.source\.path: photos$"):
        publish(Snapshot.take(project), params, "corners", {})
    (project / "photos.dvc").touch()
    git(project, "add", "photos.dvc")
    git(project, "commit", "--quiet", "--message", "photos")
    ended = SimpleNamespace(returncode=1, stderr="Collecting\nERROR: failed to connect to s3 (dvc/files)\n")
    with monkeypatch.context() as patch:
        patch.setattr(pool_runner.subprocess, "run", lambda *_, **__: ended)
        patch.setattr(Snapshot, "lacks", lambda *_: False)
        with pytest.raises(StageFailed, match=r"`dvc push` .* failed: ERROR: failed to connect to s3"):
            publish(Snapshot("", "", "", Path()), params, "corners", {})  # type: ignore[arg-type]
    snapshot = Snapshot.take(project)
    assert not any(snapshot.lacks(path) for _, path in inputs)
    hook = tmp_path / "source" / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho branches are protected\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(StageFailed, match=r"(?s)git push failed .*branches are protected"):
        snapshot.publish("corners")


class Server:
    """What `pool_runner` uses of Prefect's API."""

    def __init__(self) -> None:
        self.deployment, self.pools = uuid4(), ["cpu", "gpu"]
        self.runs: dict[UUID, SimpleNamespace] = {}
        self.keys: dict[str, UUID] = {}
        self.polled: Callable[[SimpleNamespace], object] = lambda run: None

    def add(self, name: str, state: State, *tags: str, run_count: int = 0, **more: Any) -> SimpleNamespace:
        run = SimpleNamespace(id=uuid4(), name=name, state=state, tags=list(tags), run_count=run_count, **more)
        self.runs[run.id] = run
        return run

    def client(self, sync_client: bool) -> AbstractContextManager[Server]:
        return nullcontext(self)

    def read_work_pool(self, name: str) -> Any:
        if name not in self.pools:
            raise ObjectNotFound(Exception())
        return SimpleNamespace(name=name, status=WorkPoolStatus.READY if name == "cpu" else WorkPoolStatus.NOT_READY)

    def read_work_pools(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.pools]

    def read_deployment_by_name(self, name: str) -> Any:
        if name == "trial-on-pool/old":
            raise ObjectNotFound(Exception())
        return SimpleNamespace(id=self.deployment)

    def read_flow_runs(self, deployment_filter: Any, flow_run_filter: Any, sort: Any, limit: int) -> list[Any]:
        assert deployment_filter.id.any_ == [self.deployment]
        return [run for run in self.runs.values() if run.name in flow_run_filter.name.any_]

    def create_flow_run_from_deployment(self, deployment: UUID, **options: Any) -> Any:
        assert deployment == self.deployment
        key = options["idempotency_key"]
        if key not in self.keys:
            run = self.add(options["name"], Scheduled(), *options["tags"], parameters=options["parameters"])
            self.keys[key] = run.id
        return self.runs[self.keys[key]]

    def read_flow_run(self, run: UUID) -> Any:
        self.polled(self.runs[run])
        return self.runs[run]

    def set_flow_run_state(self, run: UUID, state: State) -> None:
        assert state.is_cancelling()
        self.runs[run].state = Cancelled()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    new = Server()
    monkeypatch.setattr(pool_runner, "get_client", new.client)
    monkeypatch.setattr(pool_runner, "POLL_SECONDS", 0.01)
    return new


def never() -> bool:
    return False


def ends(state: State) -> Callable[[SimpleNamespace], None]:
    """A worker that runs a flow run to a state within a few polls."""

    def work(run: SimpleNamespace) -> None:
        run.state, run.run_count = (Running(), 1) if run.state.is_scheduled() else (state, 1)

    return work


def test_a_failed_flow_run_is_followed_by_a_new_one(server: Server):
    runs = FlowRuns(server.deployment, "sweep.one")
    server.polled = ends(Failed(message="Flow run encountered an exception: StageFailed: error in pretrain: nan"))
    failed = runs.run("m1", {"base": "lotlip"}, never)
    assert failed is not None
    assert reason(failed) == "error in pretrain: nan"
    server.polled = ends(Completed())
    done = runs.run("m1", {"base": "lotlip"}, never)
    assert done is not None
    assert done.is_completed()
    assert [(run.parameters, run.tags) for run in server.runs.values()] == [({"base": "lotlip"}, ["sweep.one"])] * 2
    assert list(server.keys) == ["m1-0", "m1-1"]
    assert reason(Cancelled()) == "its flow run is Cancelled"


def test_an_unfinished_flow_run_of_another_sweep_is_shared_and_not_cancelled(server: Server):
    other = server.add("m1", Running(), "sweep.other", run_count=1)
    mine = FlowRuns(server.deployment, "sweep.mine")
    server.polled = lambda run: mine.stop()
    with pytest.raises(StageFailed, match="the sweep was stopped"):
        mine.run("m1", {}, never)
    assert list(server.runs.values()) == [other]
    assert other.state.is_running()


def test_a_flow_run_whose_worker_died_is_waited_for(server: Server):
    dead = Crashed(name=WORKER_DIED)
    run = server.add("m1", dead, "sweep.other", run_count=1)

    def work(run: SimpleNamespace) -> None:
        run.state = Scheduled() if run.state == dead else Completed()

    server.polled = work
    done = FlowRuns(server.deployment, "sweep.mine").run("m1", {}, never)
    assert done is not None
    assert done.is_completed()
    assert list(server.runs.values()) == [run]


def test_a_flow_run_that_is_not_scheduled_again_is_replaced(server: Server):
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    dead = server.add("m1", Crashed(name=WORKER_DIED, timestamp=long_ago), "sweep.other", run_count=1)
    server.polled = ends(Completed())
    done = FlowRuns(server.deployment, "sweep.mine").run("m1", {}, never)
    assert done is not None
    assert done.is_completed()
    assert len(server.runs) == 2
    assert dead.state.is_crashed()
    server.polled = ends(dead.state)
    failed = FlowRuns(server.deployment, "sweep.mine").run("m2", {}, never)
    assert failed is not None
    assert reason(failed) == "its flow run is WorkerDied"


def test_stopping_cancels_own_flow_runs_of_this_and_of_a_killed_sweep(server: Server):
    left = server.add("m1", Running(), "sweep.mine", run_count=1)
    mine = FlowRuns(server.deployment, "sweep.mine")
    server.polled = lambda run: mine.stop()
    mine.run("m1", {}, never)
    assert left.state.is_cancelled()
    server.polled = lambda run: None
    mine.run("m2", {}, never)  # submitted at the moment of the stop
    assert [run.state.is_cancelled() for run in server.runs.values()] == [True, True]


def test_flow_runs_that_no_worker_takes_in_time_are_cancelled(server: Server):
    runs = FlowRuns(server.deployment, "sweep.one")
    assert runs.run("m1", {}, lambda: True) is None
    (run,) = server.runs.values()
    assert run.state.is_cancelled()
    server.polled = ends(Completed())
    started = runs.run("m2", {}, lambda: True)
    assert started is not None
    assert started.is_completed()


def test_a_pool_that_cannot_run_trials_is_an_error(server: Server):
    server.pools.append("old")
    lines: list[str] = []
    with temporary_settings({PREFECT_API_URL: "https://team.example.org/api"}):
        assert find_deployment("cpu", lines.append) == server.deployment
        assert not lines
        assert find_deployment("gpu", lines.append) == server.deployment
        assert lines == ["pool gpu has no worker online; trials wait for one"]
        with pytest.raises(
            StageFailed, match=r"no work pool 'cpus' on https://team\S+; did you mean 'cpu'\? \(there are"
        ):
            find_deployment("cpus", lines.append)
        with pytest.raises(StageFailed, match=r"has no deployment trial-on-pool/old; `python -m flows\.deploy"):
            find_deployment("old", lines.append)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(StageFailed, match="set PREFECT_API_URL"),
    ):
        find_deployment("cpu", lines.append)


@pytest.mark.slow
def test_trainings_are_restored_from_the_run_cache_and_other_stages_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "_can_hash", cache._can_hash)  # restored afterwards
    cache_trainings()
    monkeypatch.chdir(tmp_path)
    stages: dict[str, Any] = {}
    for name, one in (("pretrain", "models"), ("score", "scores")):
        stages[name] = {
            "foreach": ["a", "b"],
            "do": {
                "cmd": f"echo {name}-${{item}} >>log && mkdir -p {one}/${{item}} && cp data {one}/${{item}}",
                "deps": ["data"],
                "outs": [{f"{one}/${{item}}": {"persist": True}}],
            },
        }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Path("mine").mkdir()
    ablations = {"a": {}, "b": {"text": {"pretrained": "mine"}}}
    source = {"kind": "folder", "path": "images"}
    params = {"ingest": {"source": source}, "image_tower": {"kind": "packaged"}, "ablations": ablations}
    params |= {
        "pretrain": {"long_texts": {"sub_captions": 0}},
        "evaluate": {"benchmarks": {"own": {"kind": "held-out"}}},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with Repo.init(no_scm=True) as repo:
        for content in ("old", "new", "old"):
            Path("data").write_text(content)
            repo.reproduce()
            assert Path("models/a/data").read_text() == content
        ran = Path("log").read_text().split()
        assert {name: ran.count(name) for name in ran} == {"pretrain-a": 2, "pretrain-b": 3, "score-a": 3, "score-b": 3}
        assert all(out.persist for stage in repo.index.stages for out in stage.outs)


# --- pools --------------------------------------------------------------------------------------------------------


def test_pools_and_heartbeats_agree_with_the_compose_file():
    file = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text(encoding="utf-8"))
    workers = {service["command"][-1] for name, service in file["services"].items() if name.startswith("worker")}
    assert workers == set(deploy.POOLS)
    beat = int(file["x-worker-environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert deploy.SILENCE.total_seconds() >= 3 * beat
    template = deploy.Pool.parse(f"cluster=kubernetes:{KUBERNETES}").template
    assert template == KUBERNETES
    job = yaml.safe_load(template.read_text())["job_configuration"]
    assert deploy.SILENCE.total_seconds() >= 3 * int(job["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


KUBERNETES = ROOT / "infra" / "pools" / "kubernetes.yaml"


def test_the_kubernetes_template_uses_exactly_its_variables():
    template = yaml.safe_load(KUBERNETES.read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize("text", ["cluster", "=kubernetes", "cluster=", "cluster=:file.yaml"])
def test_a_pool_without_a_name_or_type_is_an_error(text: str):
    with pytest.raises(ConfigError, match="is not POOL=TYPE or POOL=TYPE:FILE"):
        deploy.Pool.parse(text)


@pytest.mark.slow
def test_a_job_template_is_prefects_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = deploy.Pool("cpu").job_template()["job_configuration"]["command"]
    assert command == "{{ command }}"
    file = tmp_path / "template.yaml"
    file.write_text("job_configuration: {}\n")
    assert deploy.Pool("cpu", template=file).job_template() == {"job_configuration": {}}
    file.write_text("text")
    with pytest.raises(ConfigError, match="is not a job template"):
        deploy.Pool("cpu", template=file).job_template()

    async def unknown(kind: str) -> None:
        return None

    async def kinds() -> list[str]:
        return ["docker", "kubernetes"]

    monkeypatch.setattr(deploy, "get_default_base_job_template_for_infrastructure_type", unknown)
    monkeypatch.setattr(deploy, "get_available_work_pool_types", kinds)
    with pytest.raises(
        ConfigError, match=r"type 'kubernets'; did you mean 'kubernetes'\? \(there are: docker, kubernetes\)"
    ):
        deploy.Pool.parse("cluster=kubernets").job_template()
