"""Runs a stage's units on Ray: on a temporary local Ray instance, or on an existing cluster."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from flows.runtime.scratch import StageFailed
from lotlip.config.params import Params
from lotlip.core.temporary import temporary_folder

# Units are paths and reports are short, so Ray's object store is nearly unused. This is its minimum size.
OBJECT_STORE_BYTES = 80 * 2**20


@contextmanager
def on_ray(params: Params) -> Iterator[Any]:
    """Yields Prefect's task runner for Ray, for the duration of the flow.

    If a worker is killed, Ray reruns its unit on another one, up to `compute.retries` times.

    Raises:
        StageFailed: Ray is not installed.
    """
    try:
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError as error:
        raise StageFailed(
            f"compute.task_runner is ray, and {error.name} is not installed: pip install 'lotlip[ray]', or set it to "
            "threads"
        ) from error
    compute = params.compute
    with ExitStack() as stack:
        stack.enter_context(
            remote_options(num_cpus=1, num_gpus=compute.ray.gpus_per_worker, max_retries=compute.retries)
        )
        if compute.ray.address:
            yield RayTaskRunner(address=compute.ray.address)
        else:
            yield RayTaskRunner(init_kwargs=stack.enter_context(_ray_of_this_machine(compute.workers)))


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
