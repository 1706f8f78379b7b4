"""Two machines on this one: namespaces of their own for network, processes, mounts and host name, joined by a cable.

All files are shared, as on a cluster, except /run and /etc/hosts. A machine is one process; when it ends, the kernel
ends all others of the machine and removes its network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import pytest

from flows.runtime.supervisor import start_group

NAMES = ("node-1", "node-2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMESPACES = ["--net", "--uts", "--ipc", "--mount", "--pid"]
# Process 1 of a machine: it ends with its standard input, which this program holds.
BOOT = """set -eu
hostname "$1"
mount -t tmpfs -o mode=755 none /run
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
read -r _
"""
START_SECONDS = 60


@dataclass
class Machine:
    """One machine.

    Attributes:
        name: host name.
        address: in their network.
        folder: for logs and the state of servers.
        pid: of its first process, as seen from here.
        servers: processes that run there and end with it.
    """

    name: str
    address: str
    folder: Path
    pid: int
    servers: list[subprocess.Popen[bytes]]

    def inside(self, command: Sequence[str], *namespaces: str) -> list[str]:
        """Returns the command that runs a command on the machine, in the current folder."""
        entered = namespaces or NAMESPACES
        return ["nsenter", f"--target={self.pid}", *entered, "--wd=.", *command]

    def run(self, *command: str, environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
        """Runs a command to its end and returns its output. It must succeed."""
        done = subprocess.run(
            self.inside(command),
            env=with_sbin(environment),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, name: str, *command: str, environment: Mapping[str, str] = os.environ) -> None:
        """Starts a server, which ends with the machine and writes to the file `NAME.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            server = subprocess.Popen(
                self.inside(command),
                env=with_sbin(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.servers.append(server)

    def has(self, path: str) -> bool:
        """Whether a file exists on the machine."""
        return Path(f"/proc/{self.pid}/root{path}").exists()

    def logs(self) -> str:
        """Returns the end of each server's log."""
        return "".join(f"\n--- {file}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))


def need(programs: dict[str, str]) -> None:
    """Skips a test unless this program may make machines, and programs are installed.

    Args:
        programs: name → Debian package.
    """
    wanted = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", **programs}
    path = with_sbin(os.environ)["PATH"]
    if missing := sorted({package for program, package in wanted.items() if not shutil.which(program, path=path)}):
        pytest.skip(f"install {', '.join(missing)}")
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "none", "/run"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"this user may not make namespaces: {tried.stderr.strip()}")


@contextmanager
def two_machines(
    folder: Path, names: tuple[str, str] = NAMES, domain: str = "test"
) -> Iterator[tuple[Machine, Machine]]:
    """Starts two machines for the duration of the block."""
    hosts = folder / "hosts"
    known = [f"{ip} {name}.{domain} {name}" for name, ip in zip(names, ADDRESSES, strict=True)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(_machine(name, ip, folder / name, hosts))
            for name, ip in zip(names, ADDRESSES, strict=True)
        )
        # within the network of the first, so that this machine's never has a link
        link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.pid)]
        subprocess.run(first.inside(link, "--net"), env=with_sbin(os.environ), check=True)
        for machine in (first, second):
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
            machine.run("ip", "link", "set", "eth0", "up")
        yield first, second


@contextmanager
def _machine(name: str, address: str, folder: Path, hosts: Path) -> Iterator[Machine]:
    folder.mkdir()
    unshare = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child=KILL"]
    process = start_group(
        [*unshare, "bash", "-c", BOOT, "boot", name, str(hosts)],
        sign=SIGKILL,
        env=with_sbin(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    servers: list[subprocess.Popen[bytes]] = []
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Machine(name, address, folder, int(first), servers)
    finally:
        process.kill()
        process.communicate()
        for server in servers:
            server.wait(START_SECONDS)


def with_sbin(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment in which Debian's servers are found."""
    return {**environment, "PATH": f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def wait_until(condition: Callable[[], bool], what: Callable[[], str], seconds: float = START_SECONDS) -> None:
    """Waits until a condition is true.

    Raises:
        AssertionError: it was not in time; the message is `what`'s result.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
