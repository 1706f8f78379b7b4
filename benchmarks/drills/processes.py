"""Processes of a drill: found by a variable in their environment and by their folder, so that no other is ever hit."""

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
class Found:
    """A process of a drill.

    Attributes:
        pid: its number.
        command: its command line.
    """

    pid: int
    command: str

    @property
    def role(self) -> str:
        """What it is in the pipeline, for reports."""
        words = self.command.split()
        if "flows.runtime.fork_server" in words:
            return "warm"
        if "flows.runtime.applications" in words:
            return "server"
        for module in words:
            if module.startswith(("flows.", "lotlip.", "torch.")):
                return module
        return "dvc" if "dvc" in words else Path(words[0]).name if words else "?"


def marked(marker: str, root: Path) -> list[Found]:
    """The living processes that inherited a drill's marker and work in its folder; zombies do not count."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            folder = Path(entry.path)
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            where = str((folder / "cwd").readlink()).removesuffix(" (deleted)")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to another user
            continue
        if Path(where).is_relative_to(root):
            found.append(Found(int(entry.name), " ".join(word.decode(errors="replace") for word in words if word)))
    return found


def send(process: Found, sign: signal.Signals, marker: str, root: Path) -> bool:
    """Sends a signal to a drill's process, unless its number belongs to another process by now."""
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
    """Kills every process of a drill, including those that they start meanwhile."""
    for _ in range(100):
        processes = marked(marker, root)
        if not processes:
            return
        for process in processes:
            send(process, signal.SIGKILL, marker, root)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"processes of drill {marker} cannot be killed: {marked(marker, root)}")


def children(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have started."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(event: Callable[[], bool], seconds: float) -> bool:
    """Waits until something holds, at most so long; returns whether it holds."""
    deadline = time.monotonic() + seconds
    while not event():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def listening(marker: str, root: Path) -> list[int]:
    """TCP ports that a drill's processes listen on."""
    ports = set()
    for process in marked(marker, root):
        try:
            connections = psutil.Process(process.pid).net_connections("tcp")
        except psutil.Error:
            continue
        ports |= {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    return sorted(ports)
