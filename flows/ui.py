"""Serves Prefect's and MLflow's UIs with the runs of this checkout."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flows.runtime.servers import (
    listen_for,
    mlflow_server,
    new_login,
    port_at,
    prefect_client,
    prefect_server,
    print_prefect,
    using_prefect,
)
from flows.runtime.stage import EXPECTED
from flows.runtime.supervisor import exit_on_signals
from lotlip.config.params import load_params
from lotlip.core.console import INTERRUPTED, answer_help
from lotlip.tracking.mlflow import Tracker


@contextmanager
def serve_uis() -> Iterator[None]:
    """Runs both servers on loopback for the duration of the block, and prints their addresses and the login.

    The environment variables PREFECT_PORT and MLFLOW_PORT override `PORTS`. PREFECT_API_URL and MLFLOW_TRACKING_URI
    select existing servers instead. Code in the block uses this Prefect server.
    """
    params, given = load_params(), os.environ.get("PREFECT_API_URL")
    store = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    login = new_login()
    with ExitStack() as stack:
        if given:
            print(f"Prefect  {given.removesuffix('/api')} (PREFECT_API_URL)", flush=True)
        else:
            listener = listen_for("prefect")
            port = port_at(listener)
            stack.enter_context(prefect_server(listener, login))
            stack.enter_context(using_prefect(prefect_client(port, login)))
            print_prefect(port, login)
        tracker = Tracker(store, params.tracking.experiment)  # creates the store with a lock, unlike MLflow's server
        if store.startswith("http"):
            server = store
            print(f"MLflow   {store} (MLFLOW_TRACKING_URI)", flush=True)
        else:
            server = stack.enter_context(mlflow_server(listen_for("mlflow"), store, login))
            user, _, password = login.partition(":")
            print(f"MLflow   {server}\n         when asked, log in as {user} with the password {password}", flush=True)
        print(f"All runs {tracker.comparison_link(server)}", flush=True)
        yield


def show() -> None:
    """Serves both UIs until Ctrl-C or SIGTERM."""
    with exit_on_signals(), serve_uis():
        print("Press Ctrl-C to stop.", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        show()
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
