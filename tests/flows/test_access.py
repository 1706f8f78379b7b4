"""Access to Prefect's and MLflow's servers is denied to other users of the machine and to other sites."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from flows.runtime.servers import (
    free_port,
    listen,
    new_login,
    port_at,
    prefect_client,
    prefect_server,
    using_prefect,
)
from tests.browser import TIMEOUT, chromium, needs_chromium
from tests.flows.test_cancel import await_that
from tests.workspace import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.system

CURL = shutil.which("curl")
needs_curl = pytest.mark.skipif(CURL is None, reason="curl is not installed")


@dataclass(frozen=True)
class Served:
    """A running program with servers.

    Attributes:
        folder: its working folder.
        prefect: address of Prefect's server.
        login: the login that it printed.
        mlflow: address of MLflow's server; "": none.
    """

    folder: Path
    prefect: str
    login: str
    mlflow: str = ""

    @property
    def api(self) -> str:
        return f"{self.prefect}/api"


@contextmanager
def program(folder: Path, database: Path, *command: str, ready: str = "Ctrl-C") -> Iterator[Served]:
    """Runs a program with servers, such as `make serve`, in a folder with params.yaml.

    Args:
        folder: its working folder.
        database: Prefect's empty database.
        command: module and arguments.
        ready: what it prints when its servers are up.
    """
    (folder / ".prefect").mkdir()
    shutil.copy(database, folder / ".prefect")
    shutil.copy(ROOT / "params.yaml", folder)
    log = folder / "output.txt"
    hidden = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "LOTLIP_FORK_SERVER")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in hidden},
        "PYTHONPATH": str(ROOT),
        "PREFECT_PORT": str(free_port()),
        "MLFLOW_PORT": str(free_port()),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=output, stderr=output
        )
        try:
            await_that(lambda: ready in log.read_text() or process.poll() is not None, "the servers are up")
            text = log.read_text()
            assert process.poll() is None, text
            found = re.search(r"Prefect  (\S+)\n.*paste (\S+)\n", text)
            mlflow = re.search(r"MLflow   (\S+)", text)
            assert found
            yield Served(folder, found[1], found[2], mlflow[1] if mlflow else "")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(300)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Served]:
    with program(tmp_path_factory.mktemp("serve"), prefect_database, "flows.serve") as served:
        await_that(lambda: len(deployments(served)) == 4, "the deployments are there")
        yield served


@pytest.fixture(scope="module")
def reproduce(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Served]:
    """`make reproduce` in a pipeline of one stage, which runs until it is stopped."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "dvc.yaml").write_text("stages:\n  wait:\n    cmd: echo waiting && exec sleep infinity\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    with program(folder, prefect_database, "flows.reproduce", "wait", ready="waiting\n") as served:
        yield served


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Served]:
    """The server that a single stage starts."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copy(prefect_database, folder)
    listener, login = listen(), new_login()
    port = port_at(listener)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PREFECT_HOME", str(folder))
        patch.chdir(folder)
        stack.enter_context(prefect_server(listener, login, ui=False))
        yield Served(folder, f"http://127.0.0.1:{port}", login)


@pytest.fixture(scope="module", params=["reproduce", "single"])
def inner(request: pytest.FixtureRequest) -> Any:
    """A server that a program starts for its own flows."""
    return request.getfixturevalue(request.param)


def curl(address: str, *options: str) -> tuple[int, str]:
    """Status and body; status 0: no answer.

    Retries after a 503, which Prefect returns while another request holds its SQLite database.
    """
    command = ["curl", "--silent", "--noproxy", "*", "--max-time", "60", "--write-out", "\n%{http_code}", *options]
    for attempt in range(10):
        if attempt:
            time.sleep(1)
        done = subprocess.run([*command, address], capture_output=True, text=True, check=False)
        body, _, status = done.stdout.rpartition("\n")
        if int(status) != 503:
            break
    return int(status), body


def send(method: str, address: str, data: Any, *options: str) -> tuple[int, str]:
    return curl(address, "--request", method, "--json", json.dumps(data), *options)


def deployments(served: Served) -> dict[str, str]:
    """Flow and name → id, as a logged-in user sees them."""
    status, body = send("POST", f"{served.api}/deployments/filter", {}, "--user", served.login)
    entries = json.loads(body) if status == 200 else []
    return {f"{one['entrypoint'].rpartition('.')[2]}/{one['name']}": one["id"] for one in entries}


def send_attack(served: Served, deployment: str, mark: Path, *options: str) -> list[int]:
    """Changes a deployment's pull steps to create a file, starts it, and returns the statuses of the answers.

    The flow itself does nothing with these parameters.
    """
    steps = [{"prefect.deployments.steps.run_shell_script": {"script": f"touch {mark}"}}]
    start = {"state": {"type": "SCHEDULED"}, "parameters": {"ablations": ["nothing"]}}
    address = f"{served.api}/deployments"
    return [
        send("POST", f"{address}/filter", {}, *options)[0],
        send("PATCH", f"{address}/{deployment}", {"pull_steps": steps}, *options)[0],
        send("POST", f"{address}/{deployment}/create_flow_run", start, *options)[0],
    ]


def runs(served: Served) -> list[Any]:
    status, body = send("POST", f"{served.api}/flow_runs/filter", {}, "--user", served.login)
    assert status == 200
    return list(json.loads(body))


def pull_steps(served: Served, deployment: str) -> Any:
    status, body = curl(f"{served.api}/deployments/{deployment}", "--user", served.login)
    assert status == 200
    return json.loads(body)["pull_steps"]


def create_deployment(served: Served) -> str:
    """Creates a deployment like those of `make serve`, and returns its id."""
    status, body = send("POST", f"{served.api}/flows/", {"name": "here"}, "--user", served.login)
    assert status in (200, 201)
    deployment = {"name": "attacked", "flow_id": json.loads(body)["id"]}
    status, body = send("POST", f"{served.api}/deployments/", deployment, "--user", served.login)
    assert status in (200, 201)
    return str(json.loads(body)["id"])


REFUSED = [
    ([], 401),
    (["--user", "lotlip:guess"], 401),
    (["--header", "Origin: http://evil.example"], 403),
    (["--header", "Origin: null"], 403),
    (["--header", "Host: evil.example"], 421),
]


def assert_attacks_fail(served: Served, deployment: str, mark: Path) -> None:
    """Sends the attack as another user, another site and a rebound host name; each must fail."""
    before = len(runs(served)), pull_steps(served, deployment)
    for options, status in REFUSED:
        assert send_attack(served, deployment, mark, *options) == [status] * 3
    # another site's page in the browser of a logged-in user
    for header in ("Origin: http://127.0.0.1:1", "Host: evil.example"):
        refused = send_attack(served, deployment, mark, "--user", served.login, "--header", header)
        assert set(refused) <= {403, 421}
    assert (len(runs(served)), pull_steps(served, deployment)) == before
    assert not mark.exists()
    # the preflight request of a browser
    preflight = ["--request", "OPTIONS", "--header", "Origin: http://evil.example"]
    preflight += ["--header", "Access-Control-Request-Method: PATCH"]
    assert curl(f"{served.api}/deployments/{deployment}", *preflight)[0] == 403


@needs_curl
def test_other_users_cannot_run_commands_through_make_serve(serve: Served, tmp_path: Path):
    deployment = deployments(serve)["reproduce/by-hand"]
    assert_attacks_fail(serve, deployment, tmp_path / "mark")
    # with the printed login the same requests are accepted, and the runner runs the command
    assert send_attack(serve, deployment, tmp_path / "mark", "--user", serve.login) == [200, 204, 201]
    await_that((tmp_path / "mark").exists, "the command has run")


@needs_curl
def test_other_users_cannot_use_the_server_of_a_run(inner: Served, tmp_path: Path):
    deployment = create_deployment(inner)
    assert_attacks_fail(inner, deployment, tmp_path / "mark")
    assert send_attack(inner, deployment, tmp_path / "mark", "--user", inner.login) == [200, 204, 201]


@needs_curl
def test_other_users_cannot_use_mlflow(serve: Served, tmp_path: Path):
    """Artifacts of an experiment can be anywhere, so creating one gives access to this user's files."""
    address = f"{serve.mlflow}/api/2.0/mlflow/experiments/create"
    for number, (options, status) in enumerate(REFUSED):
        experiment = {"name": f"evil-{number}", "artifact_location": str(tmp_path)}
        assert send("POST", address, experiment, *options)[0] == status
    logged_in = ["--user", serve.login, "--header", "Origin: http://127.0.0.1:1"]
    assert send("POST", address, {"name": "evil"}, *logged_in)[0] == 403
    for path in ("", "/health", "/ajax-api/3.0/mlflow/assistant/config", "/graphql"):
        assert curl(serve.mlflow + path)[0] == 401
    assert send("POST", address, {"name": "mine"}, "--user", serve.login)[0] == 200


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
def test_websockets_require_the_login_and_the_origin(inner: Served, path: str):
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect

    address = f"{inner.api.replace('http', 'ws')}/{path}"

    def answer(token: str | None, **options: Any) -> Any:
        with connect(address, subprotocols=["prefect"], proxy=None, **options) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": token}))
            return json.loads(socket.recv(60))

    assert answer(inner.login)["type"] == "auth_success"
    for token in (None, "lotlip:guess"):
        with pytest.raises(ConnectionClosed):
            answer(token)
    with pytest.raises(InvalidStatus):
        answer(inner.login, origin="http://evil.example")
    with pytest.raises(InvalidStatus):
        answer(inner.login, additional_headers={"Host": "evil.example"})
    with pytest.raises(InvalidStatus), connect(address, proxy=None):  # old clients do not log in
        pass


def test_the_login_is_on_no_command_line_and_in_no_file(serve: Served):
    secret = serve.login.partition(":")[2]
    assert len(secret) >= 20
    assert not [p for p in psutil.process_iter(["cmdline"]) if secret in " ".join(p.info["cmdline"] or [])]
    (serve.folder / "secret").write_text(secret)  # proves that the search works
    printed = {serve.folder / "output.txt", serve.folder / "secret"}
    files = {path for path in serve.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()}
    assert files == printed


PAGE = b"<!doctype html><title>evil</title>"
ATTACK = """async ({api, deployment, mark}) => {
    const found = [];
    const steps = [{"prefect.deployments.steps.run_shell_script": {script: `touch ${mark}`}}];
    const asked = [
        [`${api}/deployments/filter`, "POST", {}],
        [`${api}/deployments/${deployment}`, "PATCH", {pull_steps: steps}],
        [`${api}/deployments/${deployment}/create_flow_run`, "POST", {state: {type: "SCHEDULED"}}],
    ];
    for (const [address, method, body] of asked) {
        for (const options of [
            {method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)},
            {method: method === "PATCH" ? "POST" : method, mode: "no-cors", body: JSON.stringify(body)},
        ]) {
            // with "include", browsers refuse the answer of a server that allows every origin; with "omit" they do not
            for (const credentials of ["include", "omit"]) {
                try {
                    const answer = await fetch(address, {credentials, ...options});
                    found.push(answer.type === "opaque" ? 0 : answer.status);
                } catch { found.push(0) }
            }
        }
    }
    found.push(await new Promise(resolve => {
        const socket = new WebSocket(`${api.replace("http", "ws")}/events/out`, ["prefect"]);
        socket.onopen = () => resolve(200);
        socket.onerror = () => resolve(0);
    }));
    return found;
}"""
OWN = """async ({api, deployment}) => {
    const headers = {Authorization: `Basic ${localStorage.getItem("prefect-password")}`};
    const answer = await fetch(`${api}/deployments/${deployment}`, {headers});
    return answer.status;
}"""


@pytest.fixture
def other_site() -> Iterator[str]:
    """Address of another site's page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def assert_another_site_fails(
    browser: Browser, served: Served, name: str, deployment: str, other_site: str, mark: Path
) -> None:
    """Logs in, and opens another site's page in the same browser; its attacks on a deployment must fail."""
    from playwright.sync_api import expect

    before = len(runs(served)), pull_steps(served, deployment)
    attack = {"api": served.api, "deployment": deployment, "mark": str(mark)}
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(f"{served.prefect}/deployments")
        page.get_by_placeholder("admin:pass").fill(served.login)  # as the output tells the user
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text(name).first).to_be_visible()
        assert page.evaluate(OWN, attack) == 200  # the same request by the server's own page
        other = context.new_page()
        for address in (other_site, other_site.replace("127.0.0.1", "evil.example")):
            other.goto(address)
            assert other.evaluate(ATTACK, attack) == [0] * 13
        port = served.prefect.rpartition(":")[2]
        answer = other.goto(f"http://evil.example:{port}/api/health")
        assert answer is not None and answer.status == 421
    assert (len(runs(served)), pull_steps(served, deployment)) == before
    assert not mark.exists()


@needs_curl
@needs_chromium
def test_pages_work_with_the_printed_login_and_another_sites_page_has_no_access(
    serve: Served, reproduce: Served, other_site: str, tmp_path: Path
):
    from playwright.sync_api import expect

    mark = tmp_path / "mark"
    user, _, password = serve.login.partition(":")
    with chromium("--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        assert_another_site_fails(browser, serve, "weekly", deployments(serve)["sweep/weekly"], other_site, mark)
        assert_another_site_fails(browser, reproduce, "attacked", create_deployment(reproduce), other_site, mark)
        page = browser.new_page(http_credentials={"username": user, "password": password})
        page.goto(f"{serve.mlflow}/#/experiments")
        expect(page.get_by_text("lotlip", exact=True).first).to_be_visible()


def test_flows_and_clients_use_the_login(single: Served, tmp_path: Path):
    """A flow in another process gets the login from its environment."""
    script = tmp_path / "flow.py"
    script.write_text(
        "import flows\nfrom prefect import flow\n\n\n@flow\ndef here() -> None:\n    pass\n\n\nhere()\nprint('ran')\n"
    )
    client = prefect_client(int(single.prefect.rpartition(":")[2]), single.login)
    environment = {**os.environ, **client, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ran" in done.stdout, done.stderr
    assert [run for run in runs(single) if run["state_type"] == "COMPLETED"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_AUTH_STRING", raising=False)
        with using_prefect(client):
            assert os.environ["PREFECT_API_AUTH_STRING"] == single.login
        assert "PREFECT_API_AUTH_STRING" not in os.environ
