"""What the drills of the team's servers share: a colleague's machine, git, and checks that print what they see."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.team.native import Team


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


RUN_SECONDS = 900


SWEEP_SECONDS = 3600


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


def create_project(team: Team, colleague: Colleague, change: Callable[[dict[str, Any]], None]) -> Path:
    """Creates a checkout with other parameters, pushes it to the branch main, and returns its folder."""
    from tests.tiny_pipeline import change_params, copy_checkout

    project = team.state / "project"
    copy_checkout(project)
    change_params(project, change)
    run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm", "--force"], project, colleague.environment)
    (project / ".dvc" / "config").write_text("", encoding="utf-8")
    publish(project, team, "main")
    return project


def log_of(team: Team, service: str) -> str:
    """Returns the log of a service."""
    return (team.state / "logs" / f"{service}.log").read_text(encoding="utf-8", errors="replace")
