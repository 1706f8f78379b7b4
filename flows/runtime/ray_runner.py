"""Units of a stage on Ray's workers: of a Ray on this machine for the time of the flow, or of a cluster that runs."""

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

# Units are paths and reports are short: nearly nothing goes through Ray's store of objects. This is its least size.
OBJECT_STORE_BYTES = 80 * 2**20


@contextmanager
def on_ray(params: Params) -> Iterator[Any]:
    """Gives Prefect's runner of units on Ray, with all that its workers need, for the time of the flow.

    A unit whose worker is killed is done again by another, as often as `compute.retries` says.

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
    """What `ray.init` is told, to start a Ray that listens on loopback only, to who has its token, and leaves nothing.

    Ray would make a token by itself, and keep it in the user's home where everybody may read it.
    """
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # its name is for other systems, but this is what makes a node's address loopback: `_node_ip_address` does not
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    # a short name, since those of sockets in it may not be long; what a killed worker still writes may be left
    with temporary_folder("ray", for_sockets=True) as folder, patch.dict(os.environ, environment):
        yield {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "logging_level": "warning",
            "_temp_dir": str(folder),
        }
