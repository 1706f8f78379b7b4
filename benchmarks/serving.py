"""Loads `lotlip serve` and `mlflow models serve` with the same requests: `python -m benchmarks.serving MODEL`.

Clients send requests with one text each, every client one at a time on its own connection, to one server after the
other, in rounds. The best round of each server is reported: requests per second, and median and 95th percentile of the
time of a request. Clients and server share the processors.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lotlip.core.temporary import temporary_folder
from lotlip.retrieval.serving import save_served_model

START_SECONDS = 300
TEXT = "A red house stands by a lake, number {}. Two trees are behind it. A dog sleeps on the grass in front of it."


class Kind(NamedTuple):
    """A server: its command, and the paths and bodies of its requests."""

    command: list[str]
    health: str
    path: str
    body: Any  # with one text, "TEXT"


def servers(model: Path, served: Path) -> dict[str, Kind]:
    """Returns both servers by name, without their ports."""
    programs = Path(sys.executable).parent
    mlflow = [str(programs / "mlflow"), "models", "serve", "-m", str(served), "--env-manager", "local"]
    records = {"dataframe_records": [{"text": "TEXT"}]}
    return {
        "lotlip serve": Kind([str(programs / "lotlip"), "serve", str(model)], "/health", "/embed", {"texts": ["TEXT"]}),
        "mlflow models serve": Kind([*mlflow, "--host", "127.0.0.1"], "/ping", "/invocations", records),
    }


@contextmanager
def running(kind: Kind) -> Iterator[int]:
    """Runs a server for the block, and yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow runs `uvicorn`
    command, environment = [*kind.command, "--port", str(port)], {**os.environ, "PATH": path}
    with subprocess.Popen(command, stdout=sys.stderr, env=environment) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while not answers(port, kind.health):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{kind.command} did not start")
                time.sleep(0.5)
            yield port
        finally:
            process.terminate()


def answers(port: int, path: str) -> bool:
    """Returns whether a server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def load(port: int, kind: Kind, clients: int, requests: int) -> dict[str, float]:
    """Sends `requests` requests from each client; returns requests per second and times in milliseconds."""
    body = json.dumps(kind.body, allow_nan=False)

    def client(number: int) -> list[float]:
        connection, seconds = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
        for request in range(requests):
            text = body.replace("TEXT", TEXT.format(number * requests + request))
            start = time.perf_counter()
            connection.request("POST", kind.path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            seconds.append(time.perf_counter() - start)
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {data[:500]!r}")
        connection.close()
        return seconds

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        seconds = np.concatenate(list(threads.map(client, range(clients))))
    return {
        "requests_per_second": len(seconds) / (time.perf_counter() - start),
        "median_ms": float(np.median(seconds)) * 1e3,
        "p95_ms": float(np.quantile(seconds, 0.95)) * 1e3,
    }


def main(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the best round of each server."""
    with temporary_folder("serving") as folder:
        save_served_model(arguments.model, folder / "model")
        both = servers(arguments.model.resolve(), folder / "model")
        names = list(both)
        with running(both[names[0]]) as first, running(both[names[1]]) as second:
            ports = dict(zip(names, (first, second), strict=True))
            rounds = [
                {name: load(ports[name], both[name], arguments.clients, arguments.requests) for name in names}
                for _ in range(arguments.rounds + 1)
            ][1:]  # the first one warms up
    return {name: max((one[name] for one in rounds), key=lambda one: one["requests_per_second"]) for name in names}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20, help="per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = main(options)
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        for name, one in result.items():
            print(
                f"{name}: {one['requests_per_second']:.1f} requests/s, {one['median_ms']:.0f} ms (median), "
                f"{one['p95_ms']:.0f} ms (95 %)"
            )
