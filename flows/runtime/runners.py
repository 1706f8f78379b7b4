"""Where a stage's units of work run: in threads or processes of this machine, or on a Ray or Dask cluster.

Units are settings and paths, their reports are short, and the data is on disks that all workers share. A cluster whose
workers have none of the project's files is sent those of each unit (`sent_unit`).

Prefect runs a unit in a thread, which waits for another process to do the work. Prefect's own task runners for
processes, Ray and Dask are not used: their workers need the flow's server, and a killed worker ends the whole
ProcessPoolTaskRunner.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from flows.runtime.scratch import StageFailed
from flows.runtime.sent_unit import SentUnit, accept, pack
from flows.runtime.supervisor import end_group, start_group
from flows.runtime.unit_work import UnitWork, answer
from lotlip.core.compute import Compute
from lotlip.core.cores import available_cores
from lotlip.core.temporary import temporary_folder
from lotlip.data.records import NonRetryableError, UnitReport

# The object store of a Ray of this machine is nearly unused. This is its minimum size.
OBJECT_STORE_BYTES = 80 * 2**20

# Submits the work of a unit as a Prefect task, whose parameter is `work`.
Submit = Callable[[Task[Any, Any], UnitWork], PrefectFuture[Any]]


def task_runner(compute: Compute, on_gpu: bool) -> AbstractContextManager[Submit]:
    """Starts the task runner of `compute.task_runner` for the duration of a block. Yields what submits units to it.

    Args:
        compute: section `compute` of params.yaml.
        on_gpu: whether the units run models, so that Ray reserves `compute.ray.gpus_per_worker` for each.

    Raises:
        StageFailed: the packages of the task runner are not installed, or no cluster answers at its address.
    """
    if compute.task_runner == "ray":
        return _on_ray(compute, compute.ray.gpus_per_worker if on_gpu else 0)
    return {"threads": _in_threads, "processes": _in_processes, "dask": _on_dask}[compute.task_runner](compute)


@contextmanager
def _in_threads(compute: Compute) -> Iterator[Submit]:
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=compute.workers)
    with runner:
        yield lambda task, work: runner.submit(task, {"work": work})


@contextmanager
def _in_processes(compute: Compute) -> Iterator[Submit]:
    """Each of Prefect's threads has a process run its units. The process of a unit that is retried may be another."""
    pool = _Processes(compute.workers)
    with _in_threads(compute) as submit:
        try:
            yield lambda task, work: submit(task, _Elsewhere(work, pool))
        finally:
            pool.end()  # before Prefect waits for its threads


class WorkerKilled(RuntimeError):
    """The process that ran a unit was killed. Another one may run the unit."""


class UnitLost(WorkerKilled):
    """All workers were killed that a cluster had run a unit on; it has used up the retries."""


class _Processes:
    """Worker processes, each of which runs one unit at a time. They end with this process, however it ends.

    Args:
        number: how many run at the same time. They start when they are needed.
    """

    def __init__(self, number: int) -> None:
        self._idle: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        for _ in range(number):
            self._idle.put(None)  # not started
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._ended = False
        share = max(1, available_cores() // number)  # of the cores
        self._environment = {"OMP_NUM_THREADS": str(share), **os.environ}

    def run(self, work: UnitWork) -> list[UnitReport]:
        """Runs a unit in an idle process. Called from as many threads as there are processes.

        Raises:
            WorkerKilled: the process ended before it had finished the unit.
            NonRetryableError: the stage ends.
            Exception: what the unit raised.
        """
        request = pickle.dumps(pickle.dumps(work))
        process = self._idle.get()
        try:
            process = process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(request)
            process.stdin.flush()
            answer: list[UnitReport] | Exception = pickle.load(process.stdout)  # noqa: S301 - of this process's worker
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            assert process is not None
            end_group(process)
            process = None
            raise WorkerKilled(
                "the process that ran it was killed; if memory ran out, lower compute.workers"
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.runtime.worker"]
        with self._lock:
            if self._ended:
                raise NonRetryableError("the stage ends")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._started.append(start_group(command, env=self._environment, **pipes))
            return self._started[-1]

    def end(self) -> None:
        """Ends all processes; units in progress are abandoned."""
        with self._lock:
            self._ended = True
        for process in self._started:
            end_group(process)


class _Elsewhere(UnitWork):
    """The work of a unit, which another process does."""

    def __init__(self, work: UnitWork, pool: _Processes | _Cluster) -> None:
        super().__init__(lambda: pool.run(work))


class _Cluster:
    """Workers of a Ray or Dask cluster. Methods are called from as many threads as units run at the same time.

    Args:
        start: has a worker run `answer` with some arguments, and returns the future answer.
        put: keeps an argument of several units in the cluster.
    """

    def __init__(self, start: Callable[..., Any], put: Callable[[Any], Any]) -> None:
        self._start, self._put = start, put
        self._run = secrets.token_hex(8)
        self._common: Any = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def run(self, work: UnitWork | SentUnit, *arguments: Any) -> Any:
        """Runs a unit on a worker.

        Raises:
            UnitLost: the worker ended before it had finished the unit, and so did those of the cluster's retries.
            NonRetryableError: the stage ends, or the workers do not have this project's code.
            Exception: what the unit raised.
        """
        future = self._start(pickle.dumps(work), *arguments)
        finished = threading.Event()
        future.add_done_callback(lambda _: finished.set())
        while not finished.wait(0.5):
            if self._ended.is_set():
                raise NonRetryableError("the stage ends")
        try:
            found = future.result()  # without a timeout, which would cut off Dask's transfer of a large answer
        except (RuntimeError, ImportError) as error:  # of Ray or Dask, which could not load the unit
            raise NonRetryableError(
                f"the cluster cannot run this project ({_in_one_line(error)}); give all its nodes the same code "
                "and packages, and set PYTHONPATH to the code there"
            ) from error
        except Exception as error:
            raise UnitLost(f"the worker that ran it was killed: {_in_one_line(error)}") from error
        if isinstance(found, Exception):
            raise found
        return found

    def write(self, work: Any, unit: Any) -> list[UnitReport]:
        """Writes a unit on a worker without the project's folder. Raises what `run` raises."""
        files = work.files(unit)
        with self._lock:
            if self._common is None:
                self._common = self._put(pack(dict.fromkeys(files.common)))
        reports, written = self.run(SentUnit.of(work, unit, files, self._run), self._common)
        accept(written, files)
        return reports

    def end(self) -> None:
        """Ends the wait for units in progress, which are abandoned."""
        self._ended.set()


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[-300:]


@contextmanager
def _on_cluster(compute: Compute, address: str | None, cluster: _Cluster) -> Iterator[Submit]:
    """Each of Prefect's threads has a worker run its units, so the workers need no server of Prefect."""

    def on_worker(work: UnitWork) -> UnitWork:
        if address and not compute.shared_folder:
            return UnitWork(partial(work.work, write=cluster.write))
        return _Elsewhere(work, cluster)

    with _in_threads(compute) as submit:
        try:
            yield lambda task, work: submit(task, on_worker(work))
        finally:
            cluster.end()  # before Prefect waits for its threads


@contextmanager
def _on_ray(compute: Compute, gpus: float) -> Iterator[Submit]:
    """If a worker is killed, Ray reruns its unit on another one, up to `compute.retries` times."""
    address = compute.ray.address
    with ExitStack() as stack:
        start = {"address": address} if address else stack.enter_context(_ray_of_this_machine(compute.workers))
        try:
            import ray  # reads the environment
        except ImportError as error:
            raise _missing("ray", error) from error
        if address:
            _check_reachable("ray", address)  # Ray would try for minutes
        ray.init(**start, logging_level=logging.WARNING)
        stack.callback(ray.shutdown)
        run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=compute.retries)(answer)
        cluster = _Cluster(lambda *arguments: run.remote(*arguments).future(), ray.put)
        yield stack.enter_context(_on_cluster(compute, address, cluster))


@contextmanager
def _ray_of_this_machine(workers: int) -> Iterator[dict[str, Any]]:
    """Yields arguments of `ray.init` for a Ray instance that listens on loopback, requires a token and leaves no files.

    Ray itself would store a token in the user's home folder, where other users can read it.
    """
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # despite its name, this variable makes Ray use loopback; `_node_ip_address` does not
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    # The name is short because Ray creates sockets in the folder.
    with temporary_folder("ray", for_sockets=True) as folder, patch.dict(os.environ, environment):
        yield {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(folder),
        }


@contextmanager
def _on_dask(compute: Compute) -> Iterator[Submit]:
    """If a worker is killed, Dask reruns its unit on another one, up to `compute.retries` times."""
    try:
        import dask
        import distributed
    except ImportError as error:
        raise _missing("dask", error) from error
    address = compute.dask.address
    if address:
        _check_reachable("dask", address)
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": compute.retries,
        "distributed.admin.large-graph-warning-threshold": "1TB",  # units are sent with their files
    }
    if not address:
        settings |= {f"distributed.{part}.http.routes": [] for part in ("scheduler", "worker")}
        settings["distributed.worker.profile.enabled"] = False  # no page shows the stacks, taken every 10 ms
    logging.getLogger("distributed").setLevel(logging.WARNING)
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        where = address or stack.enter_context(
            distributed.LocalCluster(**stack.enter_context(_dask_of_this_machine(compute.workers)))
        )
        client = stack.enter_context(distributed.Client(where, set_as_default=False))

        def put(files: Any) -> Any:  # unlike data that is scattered, a task's result is made again if its worker ends
            return client.submit(pickle.loads, pickle.dumps(files), pure=False)

        cluster = _Cluster(partial(client.submit, answer, pure=False), put)
        yield stack.enter_context(_on_cluster(compute, address, cluster))


@contextmanager
def _dask_of_this_machine(workers: int) -> Iterator[dict[str, Any]]:
    """Yields arguments of a Dask cluster that listens on loopback, requires a certificate and leaves no files.

    Its HTTP servers, which require no certificate, have no pages.
    """
    with temporary_folder("dask") as folder:
        yield {
            "n_workers": workers,
            "threads_per_worker": 1,
            "memory_limit": 0,  # Dask would kill a worker that uses more than its share
            "host": "127.0.0.1",
            "security": True,
            "scheduler_kwargs": {"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            "local_directory": str(folder),
        }


def _check_reachable(runner: str, address: str) -> None:
    """Checks that something listens at the address of a cluster, unless the address has no port, as Ray's `auto`.

    Raises:
        StageFailed: nothing does.
    """
    place = urlsplit(f"//{address.rpartition('://')[2]}")
    try:
        if place.port is not None:
            socket.create_connection((place.hostname, place.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise StageFailed(
            f"no cluster answers at compute.{runner}.address, {address} ({error}); start it, or correct the address"
        ) from error


def _missing(runner: str, error: ImportError) -> StageFailed:
    return StageFailed(
        f"compute.task_runner is {runner}, and {error.name} is not installed: pip install 'lotlip[{runner}]', or set "
        "it to threads or processes"
    )
