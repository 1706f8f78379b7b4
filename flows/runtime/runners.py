"""Where a stage's units of work run: in threads or processes of this machine, or on a Ray or Dask cluster.

A task runner of Prefect gives each unit to a worker. Units are paths and settings, their reports are short, and the
data is on disks that all workers share.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.runtime.scratch import StageFailed
from lotlip.core.compute import Compute
from lotlip.core.lifetime import end_with_parent
from lotlip.core.temporary import temporary_folder

# Ray's object store is nearly unused. This is its minimum size.
OBJECT_STORE_BYTES = 80 * 2**20


def task_runner(compute: Compute, on_gpu: bool) -> AbstractContextManager[TaskRunner[Any]]:
    """Starts the task runner of `compute.task_runner` for the duration of a block.

    Args:
        compute: section `compute` of params.yaml.
        on_gpu: whether the units run models, so that Ray reserves `compute.ray.gpus_per_worker` for each.

    Raises:
        StageFailed: the packages of the task runner are not installed.
    """
    if compute.task_runner == "ray":
        return _on_ray(compute, compute.ray.gpus_per_worker if on_gpu else 0)
    return {"threads": _in_threads, "processes": _in_processes, "dask": _on_dask}[compute.task_runner](compute)


@contextmanager
def _in_threads(compute: Compute) -> Iterator[TaskRunner[Any]]:
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=compute.workers)
    with runner:
        yield runner


@contextmanager
def _in_processes(compute: Compute) -> Iterator[TaskRunner[Any]]:
    """Units in progress are abandoned if the block raises, and no worker outlives this process."""
    threads = max(1, (os.cpu_count() or 1) // compute.workers)
    started_by = (os.getpid(), threads)
    with ProcessPoolTaskRunner(compute.workers, initializer=_start_worker, initargs=started_by) as runner:
        try:
            yield runner
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def _start_worker(parent: int, threads: int) -> None:
    """Ties a worker process to the flow's process, and gives its models a share of the cores."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals all processes; the flow ends its workers
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@contextmanager
def _on_ray(compute: Compute, gpus: float) -> Iterator[TaskRunner[Any]]:
    """If a worker is killed, Ray reruns its unit on another one, up to `compute.retries` times."""
    try:
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError as error:
        raise _missing("ray", error) from error
    with ExitStack() as stack:
        stack.enter_context(remote_options(num_cpus=1, num_gpus=gpus, max_retries=compute.retries))
        if compute.ray.address:
            runner = RayTaskRunner(address=compute.ray.address)
        else:
            runner = RayTaskRunner(init_kwargs=stack.enter_context(_ray_of_this_machine(compute.workers)))
        yield stack.enter_context(runner)


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
            "logging_level": "warning",
            "_temp_dir": str(folder),
        }


@contextmanager
def _on_dask(compute: Compute) -> Iterator[TaskRunner[Any]]:
    """If a worker is killed, Dask reruns its unit on another one, up to `compute.retries` times."""
    try:
        import dask
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise _missing("dask", error) from error
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": compute.retries}))
        if compute.dask.address:
            runner = DaskTaskRunner(address=compute.dask.address)
        else:
            cluster = stack.enter_context(_dask_of_this_machine(compute.workers))
            runner = DaskTaskRunner(cluster_class="distributed.LocalCluster", cluster_kwargs=cluster)
        yield stack.enter_context(runner)


@contextmanager
def _dask_of_this_machine(workers: int) -> Iterator[dict[str, Any]]:
    """Yields arguments of a Dask cluster that listens on loopback, requires a certificate and leaves no files."""
    with temporary_folder("dask") as folder:
        yield {
            "n_workers": workers,
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "security": True,
            "dashboard_address": None,
            "local_directory": str(folder),
        }


def _missing(runner: str, error: ImportError) -> StageFailed:
    return StageFailed(
        f"compute.task_runner is {runner}, and {error.name} is not installed: pip install 'lotlip[{runner}]', or set "
        "it to threads or processes"
    )
