"""Shows Prefect's and MLflow's UIs over this checkout's runs until it is stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flows.servers import api_address, mlflow_server, prefect_server
from flows.stage import EXPECTED
from lotlip.config import load_params
from lotlip.tracking import Tracker


@contextmanager
def shown() -> Iterator[str]:
    """Runs both servers on loopback for the block and prints their addresses; gives that of Prefect's API.

    PREFECT_PORT and MLFLOW_PORT in the environment choose other ports than 4200 and 5000. Where PREFECT_API_URL or
    MLFLOW_TRACKING_URI names a server, that one is used.
    """
    params, given = load_params(), os.environ.get("PREFECT_API_URL")
    store = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    with ExitStack() as stack:
        port = int(os.environ.get("PREFECT_PORT", "4200"))
        if not given:
            stack.enter_context(prefect_server(port))
        api = given or api_address(port)
        print(f"Prefect  {api.removesuffix('/api')}", flush=True)
        if store.startswith("http"):
            server = store
            print(f"MLflow   {store} (MLFLOW_TRACKING_URI)", flush=True)
        else:
            server = stack.enter_context(mlflow_server(int(os.environ.get("MLFLOW_PORT", "5000")), store))
            print(f"MLflow   {server}", flush=True)
        compared = Tracker(server, params.tracking.experiment).comparison_link(server)
        print(f"All runs {compared}", flush=True)
        yield api


def show() -> None:
    """Shows both UIs; ends with Ctrl-C or a SIGTERM."""
    stop = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stop.set())
    with shown():
        print("Ctrl-C stops both.", flush=True)
        stop.wait()


if __name__ == "__main__":
    try:
        show()
    except EXPECTED as error:
        sys.exit(f"error: {error}")
