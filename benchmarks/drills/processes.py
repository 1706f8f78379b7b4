"""Finds and signals the processes of a drill, by a variable in their environment and by their working folder.

Other processes are never signalled.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER = "LOTLIP_DRILL"
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class DrillProcess:
    """A process of a drill.

    Attributes:
        pid: the process id.
        command: the command line.
    """

    pid: int
    command: str

    @property
    def role(self) -> str:
        """The role of the process in the pipeline, for reports."""
        words = self.command.split()
        if "flows.runtime.fork_server" in words:
            return "fork-server"
        if "flows.runtime.applications" in words:
            return "server"
        for module in words:
            if module.startswith(("flows.", "lotlip.", "torch.")):
                return module
        return "dvc" if "dvc" in words else Path(words[0]).name if words else "?"


def marked(marker: str, root: Path) -> list[DrillProcess]:
    """Returns the running processes that inherited a drill's marker and work in its folder, without zombies."""
    variable = f"{MARKER}={marker}".encode()
    processes = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            folder = Path(entry.path)
            if variable not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            where = str((folder / "cwd").readlink()).removesuffix(" (deleted)")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # the process has ended or belongs to another user
            continue
        if Path(where).is_relative_to(root):
            command = " ".join(word.decode(errors="replace") for word in words if word)
            processes.append(DrillProcess(int(entry.name), command))
    return processes


def send(process: DrillProcess, sign: signal.Signals, marker: str, root: Path) -> bool:
    """Sends a signal to a drill's process, unless its id now belongs to another one. Returns whether it was sent."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if all(other.pid != process.pid for other in marked(marker, root)):
            return False
        signal.pidfd_send_signal(descriptor, sign)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def end_all(marker: str, root: Path) -> None:
    """Kills all processes of a drill, including those that they start meanwhile.

    Raises:
        RuntimeError: processes are still running after 100 attempts.
    """
    for _ in range(100):
        processes = marked(marker, root)
        if not processes:
            return
        for process in processes:
            send(process, signal.SIGKILL, marker, root)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"processes of drill {marker} cannot be killed: {marked(marker, root)}")


def children(pid: int) -> list[int]:
    """Returns the ids of all descendants of a process."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(event: Callable[[], bool], seconds: float) -> bool:
    """Waits until an event occurs, for a limited time. Returns whether it occurred."""
    deadline = time.monotonic() + seconds
    while not event():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def listening(marker: str, root: Path) -> list[int]:
    """Returns the TCP ports that a drill's processes listen on."""
    ports = set()
    for process in marked(marker, root):
        try:
            connections = psutil.Process(process.pid).net_connections("tcp")
        except psutil.Error:
            continue
        ports |= {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    return sorted(ports)
