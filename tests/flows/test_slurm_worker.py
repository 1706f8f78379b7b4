"""A worker of a pool in a Slurm allocation, as docs/team.md describes it."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from flows.deploy import HEARTBEAT, MARKING
from tests.machines import NAMES, Machine, need, wait_until
from tests.slurm import PROGRAMS, slurm
from tests.tiny_pipeline import ROOT, smallest
from tests.workspace import Workspace

pytestmark = pytest.mark.system

ADDRESS = f"http://{NAMES[0]}:4200/api"
RUN = "blue-fox"
HEARTBEATS = 30  # seconds between them, the least that Prefect allows
SILENCE = 45  # seconds, in place of flows.deploy's, until a run is given to another worker
LEAST = 10  # seconds, the least that Prefect allows for it
ASK = """
import base64, os, sys, urllib.request
method, path, body = sys.argv[1:]
login = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
request = urllib.request.Request(os.environ["PREFECT_API_URL"] + path, body.encode(), headers, method=method)
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


def documented_job() -> list[str]:
    """The arguments of `sbatch` in docs/team.md."""
    found = re.search(r"^sbatch (.*?)^```", (ROOT / "docs" / "team.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return shlex.split(found[1].replace("\\\n", " "))


class Server:
    """A Prefect server on the first machine, with all of its services.

    Attributes:
        client: environment of its clients.
    """

    def __init__(self, machine: Machine, folder: Path, database: Path, environment: dict[str, str]) -> None:
        self._machine = machine
        login = f"team:{secrets.token_urlsafe(18)}"
        (folder / "prefect").mkdir()
        shutil.copy(database, folder / "prefect")
        self.client = {**environment, "PREFECT_API_URL": ADDRESS, "PREFECT_API_AUTH_STRING": login}
        settings = {
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": login,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_API_DATABASE_MIGRATE_ON_START": "false",
            "PREFECT_UI_ENABLED": "false",
        }
        command = ["prefect", "server", "start", "--host", "0.0.0.0", "--port", "4200"]
        machine.serve("prefect", *command, environment={**self.client, **settings})
        wait_until(self._answers, machine.logs, 120)

    def _answers(self) -> bool:
        try:
            return self.ask("GET", "/health") is True
        except AssertionError:
            return False

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Returns the API's answer to a request."""
        words = [method, path, "" if body is None else json.dumps(body)]
        answer = self._machine.run(sys.executable, "-c", ASK, *words, environment=self.client)
        return json.loads(answer) if answer.strip() else None

    def run(self) -> tuple[str, int]:
        """Returns the name of the run's state, and how often it was started."""
        (run,) = self.ask("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": [RUN]}}})
        return run["state"]["name"], run["run_count"]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Returns the events with a name."""
        found: dict[str, Any] = self.ask("POST", "/events/filter", {"filter": {"event": {"name": [name]}}})
        return list(found["events"])

    def has_heartbeat(self) -> bool:
        """Whether the run has reported that it runs, which the automation waits for."""
        return bool(self.events(HEARTBEAT))

    def repeat_heartbeat(self) -> None:
        """Sends a heartbeat of the run again, as if the events after it were lost."""
        event = self.events(HEARTBEAT)[0] | {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat()}
        kept = ("id", "occurred", "event", "resource", "related", "payload")
        self.ask("POST", "/events", [{key: event[key] for key in kept}])

    def has_refused(self, reason: str) -> bool:
        """Whether a change of a run's state by an automation was refused for a reason."""
        failed = self.events("prefect.automation.action.failed")
        return any(reason in event["payload"]["reason"] for event in failed)

    def change_silence(self, seconds: float) -> float:
        """Changes how long the automation waits for a silent worker, and returns how long it did before."""
        (found,) = (one for one in self.ask("POST", "/automations/filter", {}) if one["name"] == MARKING)
        before = found["trigger"]["within"]
        found["trigger"]["within"] = seconds
        kept = ("name", "description", "enabled", "trigger", "actions")
        self.ask("PUT", f"/automations/{found['id']}", {key: found[key] for key in kept})
        return float(before)


def project(folder: Path) -> Workspace:
    """A repository that workers clone: a pipeline of one stage."""
    workspace = Workspace(folder)
    workspace.change(smallest)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ingest": stages["ingest"]}}))
    workspace.run("git", "checkout", "--quiet", "-B", "main")
    workspace.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--all", "--message", "one")
    return workspace


def test_a_run_whose_job_is_cancelled_is_completed_by_the_worker_of_the_next_job(
    tmp_path: Path, prefect_database: Path
):
    need(PROGRAMS)
    workspace = project(tmp_path / "project")
    settings = f"[core]\n    remote = team\n['remote \"team\"']\n    url = {tmp_path / 'remote'}\n"
    (tmp_path / "dvc").mkdir()
    (tmp_path / "dvc" / "config").write_text(settings)
    environment = {
        **{key: value for key, value in workspace.alone.items() if key != "PYTHONPATH"},
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEATS),
        "DVC_SYSTEM_CONFIG_DIR": str(tmp_path / "dvc"),
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
    }
    with slurm(tmp_path / "slurm") as cluster:
        server = Server(cluster.machines[0], tmp_path, prefect_database, environment)

        def submit() -> tuple[str, Path]:
            words = ["--parsable", *documented_job()]
            job = cluster.run("sbatch", *words, environment=server.client, folder=workspace.folder).strip()
            return job, workspace.folder / f"slurm-{job}.out"

        words = ["-m", "flows.deploy", str(workspace.folder), "main", "hpc=process"]
        cluster.run(sys.executable, *words, environment=server.client, folder=workspace.folder)
        deployment = server.ask("GET", "/deployments/name/reproduce-on-pool/hpc")["id"]
        parameters = {"name": RUN, "parameters": {"what": "all"}}
        server.ask("POST", f"/deployments/{deployment}/create_flow_run", parameters)
        usual = server.change_silence(SILENCE)
        job, log = submit()
        cluster.wait_for_job(job, log, server.has_heartbeat)
        assert server.run() == ("Running", 1)
        cluster.run("scancel", job)
        wait_until(lambda: cluster.state(job) == "CANCELLED", log.read_text)
        assert "stopped!" in log.read_text()  # Slurm left the worker the time
        assert server.run() == ("Running", 1)
        wait_until(lambda: server.run() == ("AwaitingRetry", 1), cluster.machines[0].logs)
        server.change_silence(usual)
        job, log = submit()
        cluster.wait_for_job(job, log)
        assert server.run() == ("Completed", 2), log.read_text()
        server.change_silence(LEAST)
        server.repeat_heartbeat()
        wait_until(lambda: server.has_refused("already in terminal state COMPLETED"), cluster.machines[0].logs)
        assert server.run() == ("Completed", 2)
    lock = yaml.safe_load(workspace.run("git", "show", f"runs/{RUN}:dvc.lock").stdout)
    assert list(lock["stages"]) == ["ingest"]
    assert any(path.is_file() for path in (tmp_path / "remote").rglob("*"))
