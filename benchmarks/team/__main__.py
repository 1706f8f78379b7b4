"""Drills of the team's servers, run natively in a new folder: `python -m benchmarks.team check|drill|sweep FOLDER`.

`check` takes two minutes: a tiny flow on a pool's worker, everything that has to be refused, a backup and its restore,
and a rotation of all keys.
`drill` runs reproductions through restarts and kills. `sweep` runs a sweep on two workers, one of which is killed.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.team.native import GIT_SERVER, INFRA, INSIDE, Machine, Team, enter

PROBE = '''
"""A tiny flow: a run in MLflow with an artifact, and a file in DVC's remote."""

import subprocess
from pathlib import Path

import mlflow
from prefect import flow


@flow(name="probe")
def probe():
    with mlflow.start_run(run_name="probe"):
        mlflow.log_metric("loss", 0.5)
        mlflow.log_text("from a worker", "note.txt")
    Path("data.txt").write_text("data of a worker")
    subprocess.run(["dvc", "add", "--quiet", "data.txt"], check=True)
    subprocess.run(["dvc", "push", "--quiet"], check=True)
'''
DEPLOY_PROBE = """
import sys
from prefect.deployments import run_deployment
from prefect.deployments.runner import EntrypointType
from prefect.runner.storage import GitRepository
from probe import probe

deployment = probe.to_deployment("cpu", work_pool_name="cpu", entrypoint_type=EntrypointType.MODULE_PATH)
deployment.storage = GitRepository("/srv/source", branch="probe")
deployment.apply()
run = run_deployment("probe/cpu", timeout=300, poll_interval=1)
sys.exit(0 if run.state.is_completed() else f"the flow run is {run.state}")
"""


def say(what: str, **facts: Any) -> None:
    """Prints one line of what was seen."""
    print(json.dumps({"seen": what, **facts}, allow_nan=False), flush=True)


def expect(what: str, found: Any, expected: Any) -> None:
    """Prints what was found.

    Raises:
        SystemExit: it is not what was expected.
    """
    say(what, found=found)
    if found != expected:
        sys.exit(f"error: {what}: expected {expected}, found {found}")


def secrets_of(team: Team, service: str) -> dict[str, str]:
    """Returns the secrets of a service by name."""
    text = (team.local / "secrets" / f"{service}.env").read_text(encoding="utf-8")
    return dict(line.split("=", 1) for line in text.split())


class Colleague:
    """Someone on another machine, who has the login and the certificate, and uses the proxy.

    Attributes:
        environment: of the person's programs.
    """

    def __init__(self, team: Team) -> None:
        self.login = (team.local / "login").read_text(encoding="utf-8").strip()
        self.certificate = str(team.local / "secrets" / "tls.crt")
        user, _, password = self.login.partition(":")
        keys = secrets_of(team, "worker")
        home = team.state / "colleague"
        home.mkdir(exist_ok=True)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW", "AWS"))},
            "HOME": str(home),
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": "https://localhost:8443/api",
            "PREFECT_API_AUTH_STRING": self.login,
            "PREFECT_API_SSL_CERT_FILE": self.certificate,
            "MLFLOW_TRACKING_URI": "https://localhost:8444",
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": self.certificate,
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
            "AWS_ENDPOINT_URL_S3": "https://localhost:8445",
            "AWS_CA_BUNDLE": self.certificate,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": keys["AWS_ACCESS_KEY_ID"],
            "AWS_SECRET_ACCESS_KEY": keys["AWS_SECRET_ACCESS_KEY"],
        }

    def ask(self, url: str, login: str | None = None, host: str | None = None, body: Any = None) -> int:
        """Returns the status of an answer.

        Args:
            url: to ask.
            login: `user:password`.
            host: in place of the URL's.
            body: sent as JSON.
        """
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        request = urllib.request.Request(url, data)  # noqa: S310
        request.add_header("Content-Type", "application/json")
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        if host:
            request.add_header("Host", host)
        context = ssl.create_default_context(cafile=self.certificate) if url.startswith("https") else None
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def python(self, *arguments: str, cwd: Path | None = None, **more: str) -> str:
        """Runs Python as this person, and returns what it printed.

        Raises:
            SystemExit: it failed.
        """
        return run([sys.executable, *arguments], cwd, {**self.environment, **more})


def run(command: list[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Runs a command and returns what it printed.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {command[:4]} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder."""
    return run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments])


def publish(folder: Path, team: Team, branch: str) -> None:
    """Commits a folder and pushes it to the repository that workers clone."""
    source = team.local / "source"
    if not (source / "HEAD").exists():
        run(["git", "init", "--quiet", "--bare", str(source)])
    git(folder, "init", "--quiet", "--initial-branch", branch)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")
    git(folder, "push", "--quiet", str(source), branch)


def refusals(colleague: Colleague) -> None:
    """Everything that has to be refused."""
    prefect, mlflow = "https://localhost:8443", "https://localhost:8444"
    flows, experiments = "/api/flows/filter", "/api/2.0/mlflow/experiments/search"
    good, wrong = colleague.login, "team:wrong"
    expect("Prefect with the password", colleague.ask(prefect + flows, good, body={}), 200)
    expect("MLflow with the password", colleague.ask(mlflow + experiments, good, body={"max_results": 1}), 200)
    for name, url in (("Prefect", prefect + flows), ("MLflow", mlflow + experiments)):
        expect(f"{name} with a wrong password", colleague.ask(url, wrong, body={}), 401)
        expect(f"{name} without a password", colleague.ask(url, body={}), 401)
        expect(f"{name} with an unknown Host", colleague.ask(url, good, "evil.example:8443", body={}), 421)
    past = {"Prefect": "http://prefect-server:4200" + flows, "MLflow": "http://mlflow:5000" + experiments}
    for name, url in past.items():
        expect(f"{name} past the proxy without a password", colleague.ask(url, body={}), 401)
        expect(f"{name} past the proxy with a wrong password", colleague.ask(url, wrong, body={}), 401)
    found = colleague.ask(past["MLflow"], good, "evil.example:5000", body={})
    expect("MLflow past the proxy with an unknown Host", found, 403)
    expect("S3 without a key", colleague.ask("https://localhost:8445/dvc"), 403)
    expect("S3 past the proxy without a key", colleague.ask("http://seaweedfs:8333/dvc"), 403)


def s3_client(colleague: Colleague) -> Any:
    """A client of the team's S3 server with the keys of a colleague."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url="https://localhost:8445",
        verify=colleague.certificate,
        region_name="us-east-1",
        aws_access_key_id=colleague.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=colleague.environment["AWS_SECRET_ACCESS_KEY"],
    )


def refused_by_postgres(user: str, database: str, password: str) -> None:
    """Checks that Postgres refuses a login."""
    import psycopg

    try:
        psycopg.connect(host="postgres", user=user, dbname=database, password=password).close()
    except psycopg.OperationalError as error:
        say(f"Postgres refuses {user}", found=str(error).splitlines()[0].rpartition("FATAL:")[2].strip())
    else:
        sys.exit(f"error: Postgres let {user} in")


def refused_by_stores(team: Team, colleague: Colleague) -> None:
    """What the stores refuse: wrong passwords, and keys of others."""
    from botocore.exceptions import ClientError

    for user in ("prefect", "postgres"):
        refused_by_postgres(user, user, "wrong")
    done = subprocess.run(["redis-cli", "-h", "redis", "ping"], capture_output=True, text=True, check=False)
    expect("Redis without a password", done.stdout.split()[0], "NOAUTH")
    s3 = s3_client(colleague)
    objects = s3.list_objects_v2(Bucket="dvc").get("Contents", [])
    expect("DVC's bucket has the worker's data", any(entry["Key"].startswith("files/md5/") for entry in objects), True)
    expect("DVC's bucket keeps versions", s3.get_bucket_versioning(Bucket="dvc").get("Status"), "Enabled")
    try:
        s3.list_objects_v2(Bucket="mlflow")
        sys.exit("error: DVC's key lists the bucket mlflow")
    except ClientError as error:
        expect("MLflow's bucket with DVC's key", error.response["Error"]["Code"], "AccessDenied")


FOUND_IN_MLFLOW = """
import sys
from mlflow import MlflowClient
client = MlflowClient()
ids = [experiment.experiment_id for experiment in client.search_experiments()]
(run,) = client.search_runs(ids, "attributes.run_name = 'probe'")
from pathlib import Path
note = Path(client.download_artifacts(run.info.run_id, "note.txt", sys.argv[1])).read_text()
print(run.data.metrics["loss"], run.info.artifact_uri.partition(":")[0], note)
"""
FOUND = "0.5 mlflow-artifacts from a worker"
PREFECT_FLOWS = "https://localhost:8443/api/flows/filter"
MLFLOW_EXPERIMENTS = "https://localhost:8444/api/2.0/mlflow/experiments/search"
COUNTS = {"prefect": "SELECT count(*) FROM flow_run", "mlflow": "SELECT count(*) FROM runs"}


def counts(team: Team) -> dict[str, int]:
    """Rows of flow runs and of MLflow's runs."""
    import psycopg

    values = secrets_of(team, "postgres")
    found = {}
    for name, query in COUNTS.items():
        password = values[f"{name.upper()}_DB_PASSWORD"]
        with psycopg.connect(host="postgres", user=name, dbname=name, password=password) as connection:
            (found[name],) = connection.execute(query).fetchone() or (0,)  # type: ignore[arg-type]
    return found


def backup_and_restore(team: Team) -> None:
    """Restores a backup into an empty database, after the volume was lost."""
    backup = ("bash", "/etc/lotlip/run.sh", "bash", "/etc/lotlip/backup.sh")
    before = counts(team)
    done = team.running["backup"].run(*backup, "once")
    name = done.stdout.split()[-1]
    say("backup", name=name, rows=before)
    refused = team.running["backup"].run(*backup, "restore", name)
    expect("a restore into a database in use", (refused.returncode, "needs an empty one" in refused.stderr), (1, True))
    for service in ("prefect-server", "prefect-services", "mlflow", "worker-cpu", "proxy"):
        team.stop(service)
    team.stop("postgres")
    shutil.rmtree(team.state / "volumes" / "postgres")
    team.start("postgres")
    team.wait("postgres")
    restored = team.running["backup"].run(*backup, "restore", name)
    expect("a restore into an empty database", restored.stdout.split()[-2:], ["restored", name])
    expect("rows after the restore", counts(team), before)


def rotate(team: Team) -> None:
    """All services start again with new secrets and the same data; the former ones are refused."""
    from botocore.exceptions import ClientError

    former, rows, passwords = Colleague(team), counts(team), secrets_of(team, "postgres")
    for name in reversed(list(team.running)):  # before what it depends on
        team.stop(name)
    team.done.clear()  # what runs once runs again
    shutil.copytree(team.local / "secrets", team.state / "former-secrets")
    run(["bash", str(INFRA / "team" / "init.sh"), "rotate"], environment={**os.environ, "TEAM_LOCAL": str(team.local)})
    team.up()
    colleague = Colleague(team)
    expect("rows after the rotation", counts(team), rows)
    found = colleague.python("-c", FOUND_IN_MLFLOW, str(colleague.environment["HOME"]))
    expect("the run in MLflow after the rotation", found.strip(), FOUND)
    for name, url, body in (("Prefect", PREFECT_FLOWS, {}), ("MLflow", MLFLOW_EXPERIMENTS, {"max_results": 1})):
        expect(f"{name} with the former login", colleague.ask(url, former.login, body=body), 401)
        expect(f"{name} with the new login", colleague.ask(url, colleague.login, body=body), 200)
    for name in COUNTS:
        refused_by_postgres(name, name, passwords[f"{name.upper()}_DB_PASSWORD"])
    objects = s3_client(colleague).list_objects_v2(Bucket="dvc").get("Contents", [])
    expect("objects in DVC's bucket after the rotation", bool(objects), True)
    try:
        s3_client(former).list_objects_v2(Bucket="dvc")
        sys.exit("error: the former key lists DVC's bucket")
    except ClientError as error:
        say("S3 refuses the former key", found=error.response["Error"]["Code"])


def check(team: Team) -> None:
    """The short scenario."""
    colleague = Colleague(team)
    project = team.state / "probe"
    project.mkdir()
    (project / "probe.py").write_text(PROBE, encoding="utf-8")
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").touch()
    publish(project, team, "probe")
    colleague.python("-c", DEPLOY_PROBE, cwd=project)
    say("a flow ran on a worker of the pool")
    found = colleague.python("-c", FOUND_IN_MLFLOW, str(colleague.environment["HOME"]))
    expect("its run in MLflow", found.strip(), FOUND)
    refusals(colleague)
    refused_by_stores(team, colleague)
    backup_and_restore(team)
    rotate(team)


START_RUN = """
import sys
from prefect.deployments import run_deployment
print(run_deployment("reproduce-on-pool/cpu", timeout=0, flow_run_name=sys.argv[1]).id)
"""
RUN_STATE = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    run = client.read_flow_run(sys.argv[1])
    print(run.state.name, run.run_count)
"""
TRAINED = """
from mlflow import MlflowClient
client = MlflowClient()
(experiment,) = [found for found in client.search_experiments() if found.name == "lotlip"]
for run in client.search_runs([experiment.experiment_id]):
    points = client.get_metric_history(run.info.run_id, "train.loss")
    print(run.info.run_name, len(points), sum(".r1" in name for name in run.data.metrics))
"""
RUN_SECONDS = 900
SWEEP_SECONDS = 3600


class Reproduction:
    """A reproduction that some worker of the pool runs."""

    def __init__(self, colleague: Colleague, name: str) -> None:
        self._colleague, self.name = colleague, name
        self._id = colleague.python("-c", START_RUN, name).split()[-1]
        self.started = time.monotonic()

    def state(self) -> tuple[str, int]:
        """Returns the name of its state, and how often it was started."""
        name, starts = self._colleague.python("-c", RUN_STATE, self._id).split()[-2:]
        return name, int(starts)

    def wait_for(self, *names: str) -> tuple[str, int]:
        """Waits until it has one of the given states, and returns it as `state` does."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            state, starts = self.state()
            if state in names:
                return state, starts
            time.sleep(3)
        sys.exit(f"error: {self.name} is {state} after {RUN_SECONDS} s")


def wait_for_line(
    team: Team, service: str, text: str, during: subprocess.Popen[bytes] | None = None, times: int = 1
) -> None:
    """Waits until a service's log has a text.

    Args:
        team: its servers.
        service: its name.
        text: what the log has to contain.
        during: a program that writes it; the wait ends with it.
        times: how often.
    """
    deadline = time.monotonic() + (SWEEP_SECONDS if during else RUN_SECONDS)
    while log_of(team, service).count(text) < times:
        ended = during is not None and during.poll() is not None
        if ended or time.monotonic() > deadline:
            sys.exit(f"error: the log of {service} has no {text!r}{', and its program has ended' if ended else ''}")
        time.sleep(0.5)


def drill(team: Team) -> None:
    """The long scenario: reproductions through a restart of Postgres and the loss of a worker, and a wiped checkout."""
    from tests.tiny_pipeline import change_params, copy_checkout, smallest

    colleague = Colleague(team)
    project = team.state / "project"
    copy_checkout(project)
    change_params(project, smallest)
    run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm", "--force"], project, colleague.environment)
    (project / ".dvc" / "config").write_text("", encoding="utf-8")
    publish(project, team, "main")

    first = Reproduction(colleague, "first")
    wait_for_line(team, "worker-cpu", "Running stage")
    say("Postgres is killed during a run")
    team.running["postgres"].kill()  # the watcher starts it again
    time.sleep(1)
    team.wait("postgres")
    expect("the run during the restart of Postgres", first.wait_for("Completed", "Failed", "Crashed"), ("Completed", 1))
    say("a reproduction ran on the pool", seconds=round(time.monotonic() - first.started))
    name, points, scores = colleague.python("-c", TRAINED).split()
    expect("the run in MLflow", name, "lotlip-seed0")
    expect("it has a loss and scores", int(points) > 0 and int(scores) > 0, True)
    restore(team, colleague, "runs/first")
    lost_worker(team, colleague)


def restore(team: Team, colleague: Colleague, branch: str) -> None:
    """A fresh clone on another machine gets everything with `dvc pull`, and nothing is stale."""
    clone = team.state / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    run(["git", "clone", "--quiet", "--branch", branch, str(team.local / "source"), str(clone)])
    dvc = [sys.executable, "-m", "dvc"]
    environment = {
        **colleague.environment,
        "PYTHONPATH": str(clone),
        "DVC_SITE_CACHE_DIR": str(team.state / "dvc-site"),
    }
    run([*dvc, "remote", "add", "--local", "--default", "team", "s3://dvc"], clone, environment)
    run([*dvc, "remote", "modify", "--local", "team", "endpointurl", "https://localhost:8445"], clone, environment)
    run([*dvc, "pull", "--quiet"], clone, environment)
    models = sorted(str(path.relative_to(clone)) for path in clone.glob("models/*/seed-*/model.safetensors"))
    expect("models after `dvc pull` in a fresh clone", models, ["models/lotlip/seed-0/model.safetensors"])
    dry = run([*dvc, "repro", "--dry"], clone, environment)
    expect("stages that `dvc repro` would run after it", dry.count("Running stage"), 0)


def lost_worker(team: Team, colleague: Colleague) -> None:
    """A worker's machine is lost during a run; another worker finishes the run."""
    source = team.state / "project"
    from tests.tiny_pipeline import change_params

    def longer(params: dict[str, Any]) -> None:
        params["pretrain"]["steps"] += 4

    change_params(source, longer)  # otherwise nothing would be left to train
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "--message", "longer")
    git(source, "push", "--quiet", str(team.local / "source"), "main")
    before = (team.state / "logs" / "worker-cpu.log").stat().st_size
    second = Reproduction(colleague, "second")
    log = team.state / "logs" / "worker-cpu.log"
    deadline = time.monotonic() + RUN_SECONDS
    while b"Running stage" not in log.read_bytes()[before:] and time.monotonic() < deadline:
        time.sleep(1)
    del team.wanted["worker-cpu"]  # the watcher must not start it again
    worker = team.running.pop("worker-cpu")
    worker.kill()
    killed = time.monotonic()
    say("the worker is killed during a run", state=second.state())
    team.start("worker-2", of="worker-cpu", PREFECT_WORKER_WEBSERVER_PORT="8093", TEAM_WORKER="worker-2")
    expect("the killed worker's run", second.wait_for("Completed", "Failed", "Crashed"), ("Completed", 2))
    say("another worker finished it", seconds=round(time.monotonic() - killed))
    restore(team, colleague, "runs/second")


SOURCE = f"git://{GIT_SERVER}/source"
TRIALS = {"corner_tokens": [0, 1, 2], "seeds": [0, 1]}
TRAINING = "Running stage 'pretrain@lotlip'"
TRIAL_RUNS = """
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
with get_client(sync_client=True) as client:
    deployment = client.read_deployment_by_name("trial-on-pool/cpu")
    for run in client.read_flow_runs(sort=FlowRunSort.ID_DESC, limit=200):
        if run.deployment_id == deployment.id:
            print(run.id, run.state.name, run.run_count)
"""


class Checkout:
    """A colleague's checkout of the project.

    Args:
        team: its servers.
        colleague: whose it is.
        folder: of the checkout.
    """

    def __init__(self, team: Team, colleague: Colleague, folder: Path) -> None:
        self.folder, self.environment = (
            folder,
            {
                **colleague.environment,
                "DVC_SITE_CACHE_DIR": str(team.state / f"{folder.name}-site"),
            },
        )
        dvc = [sys.executable, "-m", "dvc"]
        run([*dvc, "remote", "add", "--local", "--default", "team", "s3://dvc"], folder, self.environment)
        endpoint = ["endpointurl", "https://localhost:8445"]
        run([*dvc, "remote", "modify", "--local", "team", *endpoint], folder, self.environment)

    def sweep(self, **settings: Any) -> subprocess.Popen[bytes]:
        """Starts a sweep on the pool; its output is in the file sweep.txt."""
        command = [sys.executable, "-m", "flows.sweep", json.dumps({"pool": "cpu", **settings}, allow_nan=False)]
        with (self.folder / "sweep.txt").open("w") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def counts(self, sweep: subprocess.Popen[bytes]) -> str:
        """Waits until a sweep has ended, and returns how many trials it has done and reused.

        Raises:
            SystemExit: it failed.
        """
        status = sweep.wait(SWEEP_SECONDS)
        text = (self.folder / "sweep.txt").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^\d+ trials: (.*)\.$", text, re.MULTILINE)
        if status or not found:
            sys.exit(f"error: the sweep ended with {status}\n{text[-6000:]}")
        return found[1]


def sweep(team: Team) -> None:
    """Two machines share a sweep; one is lost, and its trial is finished by the other. Nobody trains it again."""
    from tests.tiny_pipeline import change_params, copy_checkout, smallest

    def short(params: dict[str, Any]) -> None:
        smallest(params)
        params["pretrain"]["steps"] = 12

    colleague = Colleague(team)
    project = team.state / "project"
    copy_checkout(project)
    change_params(project, short)
    run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm", "--force"], project, colleague.environment)
    (project / ".dvc" / "config").write_text("", encoding="utf-8")
    publish(project, team, "main")
    serve_git(team)
    git(project, "remote", "add", "origin", SOURCE)
    first = Checkout(team, colleague, project)

    machines = {number: Machine(team.state, number) for number in (1, 2)}
    for machine in machines.values():
        start_worker(team, machine)
    started = time.monotonic()
    running = first.sweep(name="shared", **TRIALS)
    wait_for_line(team, "machine-1", TRAINING, running, times=2)
    say("a worker is killed in its second trial", seconds=round(time.monotonic() - started))
    team.running.pop("machine-1").kill()
    machines[1].cut()
    expect("the sweep", first.counts(running), "6 done")
    say("the sweep has ended", seconds=round(time.monotonic() - started))
    runs = [line.split() for line in colleague.python("-c", TRIAL_RUNS).splitlines() if line.count("-") >= 4]
    expect(
        "starts of completed flow runs",
        sorted(count for _, state, count in runs if state == "Completed"),
        ["1", "1", "1", "1", "1", "2"],
    )
    taken = {number: runs_of(team, machine.name) for number, machine in machines.items()}
    say("flow runs of each worker", **{machines[number].name: len(ids) for number, ids in taken.items()})
    expect("flow runs that both workers started", len(taken[1] & taken[2]), 1)
    expect("flow runs that some worker started", len(taken[1] | taken[2]), 6)
    expect("whether both finished some", (len(taken[1]) > 1, len(taken[2]) > 1), (True, True))
    expect("the sweep again", first.counts(first.sweep(name="again", **TRIALS)), "6 reused")

    git(project, "add", "dvc.lock")
    git(project, "commit", "--quiet", "--message", "data")
    git(project, "push", "--quiet", "origin", "main")
    team.running.pop("machine-2").kill()
    reuse(team, colleague)


def reuse(team: Team, colleague: Colleague) -> None:
    """Another checkout and a third machine find what the sweep's workers have shared."""
    clone = team.state / "clone"
    run(["git", "clone", "--quiet", "--branch", "main", SOURCE, str(clone)])
    second = Checkout(team, colleague, clone)
    expect("the sweep in a colleague's clone", second.counts(second.sweep(name="other", **TRIALS)), "6 reused")
    name = git(clone, "for-each-ref", "--format=%(refname:lstrip=4)", "--count=1", "refs/exps").strip()
    run([sys.executable, "-m", "flows.sweep", "--apply", name], clone, second.environment)
    say("a trial is applied in that clone", name=name, diff=git(clone, "diff", "--stat").strip().splitlines()[-1])
    git(clone, "checkout", "--quiet", "params.yaml")
    start_worker(team, Machine(team.state, 3))
    scored = {"evaluate.max_conditioned_pairs": [7]}
    counts = second.counts(second.sweep(name="scores", corner_tokens=[1], seeds=[0], other=scored))
    expect("a trial that differs in its evaluation", counts, "1 done")
    text = log_of(team, "machine-3")
    expect("trainings of a new machine", text.count(TRAINING), 0)
    expect("trainings from the run cache", text.count("Stage 'pretrain@lotlip' is cached - skipping run"), 1)


def serve_git(team: Team) -> None:
    """Serves the repository that workers clone, until the namespace ends."""
    options = ["--export-all", "--enable=receive-pack", f"--base-path={team.local}"]
    subprocess.Popen(["git", "daemon", *options, str(team.local)])


def start_worker(team: Team, machine: Machine) -> None:
    """Starts a worker on a machine, which runs one flow run at a time."""
    team.start(machine.name, of="worker-cpu", machine=machine, TEAM_WORKER=machine.name, TEAM_WORKER_RUNS="1")


def log_of(team: Team, service: str) -> str:
    """Returns the log of a service."""
    return (team.state / "logs" / f"{service}.log").read_text(encoding="utf-8", errors="replace")


def runs_of(team: Team, worker: str) -> set[str]:
    """Returns the ids of the flow runs that a worker has taken."""
    return set(re.findall(r"submitting flow run '([0-9a-f-]{36})'", log_of(team, worker)))


SCENARIOS = {"check": check, "drill": drill, "sweep": sweep}


def main(what: str, state: Path) -> None:
    """Brings all services up and runs a scenario."""
    if INSIDE not in os.environ:
        if state.exists() and any(state.iterdir()):
            sys.exit(f"error: {state} is not empty, and a drill removes files of its own; name a new folder")
        state.mkdir(parents=True, exist_ok=True)
    enter(state)
    started = time.monotonic()
    # only the machines of a sweep have workers, and they have no folder in common
    options: dict[str, Any] = (
        {"without": ("worker-cpu",), "settings": {"TEAM_SOURCE": SOURCE}} if what == "sweep" else {}
    )
    with Team(state, **options) as team:
        say("all services are healthy", seconds=round(time.monotonic() - started, 1))
        try:
            SCENARIOS[what](team)
        except SystemExit:
            for name in team.running:
                print(team.tail(name), file=sys.stderr)
            raise
    say("done", seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SCENARIOS:
        sys.exit(f"usage: python -m benchmarks.team {'|'.join(SCENARIOS)} FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
