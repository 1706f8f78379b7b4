"""A checkout to run the pipeline in, and the servers that its flows find: Prefect's, and the fork server."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from flows.runtime.fork_server import SOCKET, fork_server
from flows.runtime.servers import free_port, listen, new_login, prefect_client, prefect_server
from tests.tiny_pipeline import ROOT, change_params, copy_checkout
from tests.tiny_pipeline import tiny as tiny  # tests import it from here

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROBES = ROOT / "tests" / "probes"
PREFECT = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME")


def measured(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a fork server whose lines are recorded, if those of the tests are."""
    if "tests.measured" not in sys.modules:
        return environment
    return {**environment, "PYTHONPATH": f"{PROBES}{os.pathsep}{environment['PYTHONPATH']}"}


class Workspace:
    """A checkout in a temporary folder, with git and DVC set up.

    Attributes:
        database: Prefect's, empty, which every renewal puts in place; None: none.
        alone: the environment of a program that finds no server, as a user's in a fresh checkout.
        environment: of one that finds a Prefect server and a fork server, as a stage's under `make reproduce`: either
            takes longer to start than most flows here to run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database: Path | None = None
        copy_checkout(folder)
        self.alone = {
            **{key: value for key, value in os.environ.items() if key not in PREFECT},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
        }
        self.environment = self.alone
        self.run("git", "init", "--quiet")
        self.run("dvc", "init", "--quiet")
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "start")

    def renew(self) -> None:
        """Makes it a fresh checkout again; what Python compiled stays, and Prefect's tables are there."""
        self.run("git", "checkout", "--quiet", ".")
        self.run("git", "clean", "-dffxq", "--exclude=__pycache__")
        (self.folder / ".prefect").mkdir()
        if self.database:
            shutil.copy(self.database, self.folder / ".prefect")

    def run(self, *command: str, check: bool = True, alone: bool = False, **more: str) -> Any:
        """Runs a command to its end.

        Args:
            command: and its arguments.
            check: whether it must end well.
            alone: whether it finds nothing running.
            more: of its environment.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**(self.alone if alone else self.environment), **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done

    def python(self, module: str, *arguments: str, **options: Any) -> Any:
        """Runs a module as a program; `options` as of `run`."""
        return self.run(sys.executable, "-m", module, *arguments, **options)

    def mlflow(self) -> MlflowClient:
        """Its tracking store as it is now, in a copy: MLflow keeps connections to a file that `renew` has removed."""
        from mlflow import MlflowClient

        copy = Path(tempfile.mkdtemp(dir=self.folder.parent)) / "mlflow.db"
        shutil.copy(self.folder / "mlflow.db", copy)
        return MlflowClient(f"sqlite:///{copy}")

    def change(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Edits params.yaml."""
        change_params(self.folder, edit)


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Prefect, created once for all workers; it saves a server several seconds."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prefect"
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            begun = Path(f"{home}.part")
            create = "from flows.runtime.applications import create_prefect_tables; create_prefect_tables()"
            environment = {**os.environ, "PREFECT_HOME": str(begun)}
            subprocess.run([sys.executable, "-c", create], cwd=ROOT, env=environment, capture_output=True, check=True)
            begun.rename(home)
    return home / "prefect.db"


@pytest.fixture(scope="session")
def prefect_address() -> dict[str, str]:
    """The environment of programs that use the Prefect server of this process, whether it runs yet or not.

    Prefect reads its settings when it is imported, so the fork server needs them before the first test needs Prefect.
    """
    return prefect_client(free_port(), new_login())


@pytest.fixture(scope="session")
def prefect_api(
    prefect_address: dict[str, str], prefect_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Runs the Prefect server that every flow of this process may use; gives the environment of its clients."""
    home, port = tmp_path_factory.mktemp("prefect-home"), urlsplit(prefect_address["PREFECT_API_URL"]).port
    assert port is not None
    shutil.copy(prefect_database, home)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_HOME", str(home))
            patch.chdir(home)
            stack.enter_context(prefect_server(listen(port), prefect_address["PREFECT_API_AUTH_STRING"]))
        yield prefect_address


@pytest.fixture(scope="session")
def fresh_checkout(prefect_address: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The one checkout of this process, with a fork server: a fork server runs the code of one checkout."""
    workspace = Workspace(tmp_path_factory.mktemp("checkout") / "project")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workspace.folder)
            environment = {**workspace.alone, **prefect_address}
            started = stack.enter_context(fork_server(measured(environment)))
            workspace.environment = {**started, "PYTHONPATH": environment["PYTHONPATH"]}
        yield workspace


@pytest.fixture(scope="session")
def checkout(fresh_checkout: Workspace, prefect_api: dict[str, str], prefect_database: Path) -> Workspace:
    """The checkout, whose flows find a Prefect server."""
    fresh_checkout.database = prefect_database
    return fresh_checkout


@pytest.fixture(scope="module")
def forked(fresh_checkout: Workspace) -> Iterator[None]:
    """Has the programs that a module's tests start be forks, which need no imports; its code is this checkout's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SOCKET, fresh_checkout.environment[SOCKET])
        yield


@pytest.fixture(scope="session")
def make_workspace(checkout: Workspace) -> Callable[[], Workspace]:
    """Gives the checkout as if it were fresh. There is one: what was asked for before is gone."""

    def make() -> Workspace:
        checkout.renew()
        return checkout

    return make
