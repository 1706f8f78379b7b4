"""Shows Prefect's and MLflow's UIs over this checkout's runs until it is stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack

from flows.servers import api_address, mlflow_server, prefect_server
from flows.stage import EXPECTED
from lotlip.config import load_params


def show() -> None:
    """Starts both servers on loopback and prints their addresses; ends with Ctrl-C or a SIGTERM.

    PREFECT_PORT and MLFLOW_PORT in the environment choose other ports than 4200 and 5000.
    """
    stop = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stop.set())
    store = os.environ.get("MLFLOW_TRACKING_URI") or load_params().tracking.uri
    with ExitStack() as stack:
        port = int(os.environ.get("PREFECT_PORT", "4200"))
        stack.enter_context(prefect_server(port))
        print(f"Prefect  {api_address(port).removesuffix('/api')}", flush=True)
        if store.startswith("http"):
            print(f"MLflow   {store} (MLFLOW_TRACKING_URI)", flush=True)
        else:
            print(f"MLflow   {stack.enter_context(mlflow_server(int(os.environ.get('MLFLOW_PORT', '5000')), store))}")
        print("Ctrl-C stops both.", flush=True)
        stop.wait()


if __name__ == "__main__":
    try:
        show()
    except EXPECTED as error:
        sys.exit(f"error: {error}")
