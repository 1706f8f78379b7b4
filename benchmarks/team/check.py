"""A flow on a pool's worker, all that has to be refused, a backup and its restore, and a rotation of all keys."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.team.common import (
    COUNTS,
    Colleague,
    counts,
    expect,
    publish,
    run,
    say,
    secrets_of,
)
from benchmarks.team.native import INFRA, Team

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
