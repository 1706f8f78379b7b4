"""Running Ray and Dask clusters on this machine, with workers that see only some of its folders."""

from __future__ import annotations

import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.runtime.servers import free_port
from flows.runtime.supervisor import group
from tests.machines import need

START_SECONDS = 120


@dataclass
class Cluster:
    """A cluster without workers.

    Attributes:
        address: as `compute.ray.address` and `compute.dask.address` take it.
        environment: variables that its programs and its users need.
        join: the command of a node with some workers.
        folder: for its files.
    """

    address: str
    environment: dict[str, str]
    join: Callable[[int], list[str]]
    folder: Path

    @contextmanager
    def node(self, environment: dict[str, str], workers: int, *hidden: Path) -> Iterator[None]:
        """Runs workers, which find empty folders in the place of those that are hidden."""
        need({"bwrap": "bubblewrap"})
        command = ["bwrap", "--dev-bind", "/", "/", "--unshare-pid", "--proc", "/proc", "--die-with-parent"]
        for folder in hidden:
            command += ["--tmpfs", str(folder)]
        with (self.folder / "node.log").open("a") as output:
            start = [*command, "--chdir", str(self.folder), *self.join(workers)]
            with group(start, env={**environment, **self.environment}, stdout=output, stderr=output):
                yield


@contextmanager
def ray_cluster(folder: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Runs the head of a Ray cluster on loopback, which runs no units."""
    address = f"127.0.0.1:{free_port()}"
    private = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
    start += [f"--object-store-memory={80 * 2**20}", "--disable-usage-stats"]
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false"]
    with (
        (folder / "head.log").open("w") as output,
        group([*start, *head, f"--temp-dir={folder}"], env={**environment, **private}, stdout=output, stderr=output),
    ):
        await_listener(address)
        join = [*start, f"--address={address}"]
        yield Cluster(address, private, lambda workers: [*join, f"--num-cpus={workers}"], folder)


@contextmanager
def dask_cluster(folder: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Runs the scheduler of a Dask cluster on loopback."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dask = str(Path(sys.executable).with_name("dask"))
    start = [dask, "scheduler", f"--port={address.rpartition(':')[2]}"]
    join = [dask, "worker", address, "--nthreads=1", f"--local-directory={folder}"]
    both = ["--host=127.0.0.1", "--no-dashboard"]
    with (
        (folder / "scheduler.log").open("w") as output,
        group([*start, *both], env=environment, stdout=output, stderr=output),
    ):
        await_listener(address)
        yield Cluster(address, {}, lambda workers: [*join, *both, f"--nworkers={workers}"], folder)


def await_listener(address: str) -> None:
    """Waits until a program listens at a port of loopback."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, f"nothing listens at {address}"
            time.sleep(0.1)
        else:
            return


CLUSTERS = {"ray": ray_cluster, "dask": dask_cluster}
