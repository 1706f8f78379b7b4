"""Prefect's and MLflow's web applications behind the checks of lotlip.core.loopback.

`python -m flows.runtime.applications NAME FD` serves one on an inherited listening socket.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lotlip.core.databases import create_database
from lotlip.core.loopback import LoopbackOnly

LOGIN = "LOTLIP_SERVER_LOGIN"  # `user:password` of MLflow's server; set only in that server's environment


def prefect() -> LoopbackOnly:
    """Returns Prefect's API and UI. Prefect itself requires PREFECT_SERVER_API_AUTH_STRING, also for WebSockets.

    Raises:
        RuntimeError: PREFECT_SERVER_API_AUTH_STRING is not set.
    """
    from prefect.server.api.server import create_app

    if not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise RuntimeError("PREFECT_SERVER_API_AUTH_STRING is not set; Prefect would run without a password")
    create_prefect_tables()
    return LoopbackOnly(create_app())


def create_prefect_tables() -> None:
    """Creates Prefect's database if Prefect's settings name a new SQLite file."""
    import prefect
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_DATABASE_MIGRATE_ON_START
    from sqlalchemy import make_url

    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value() or "")
    if url.get_backend_name() != "sqlite" or not url.database or not PREFECT_API_DATABASE_MIGRATE_ON_START.value():
        return
    if not url.database.startswith((":memory:", "file:")):
        create_database(Path(url.database), f"prefect-{prefect.__version__}", _migrate)


def _migrate(path: Path) -> None:
    """Creates a file with Prefect's tables."""
    from prefect.server.database import provide_database_interface
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import temporary_database_config

    async def create() -> None:
        database = provide_database_interface()
        await database.create_db()
        await (await database.engine()).dispose()

    with (
        temporary_database_config(AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{path}")),
        ThreadPoolExecutor(1) as thread,  # uvicorn's event loop runs in the current thread
    ):
        thread.submit(asyncio.run, create()).result()


def mlflow() -> LoopbackOnly:
    """Returns MLflow's API and UI. Any client of the API can read and write files as the user that runs the server."""
    from mlflow.server.fastapi_app import app

    return LoopbackOnly(app, os.environ[LOGIN])


def _load(application: Callable[[], LoopbackOnly]) -> LoopbackOnly:
    """Returns an application, loaded without garbage collections: they would free nothing in a sixth of the time."""
    gc.disable()
    try:
        return application()
    finally:
        gc.freeze()  # later collections skip what was loaded
        gc.enable()


def serve(name: str, descriptor: int) -> None:
    """Serves an application until a signal ends it.

    Args:
        name: "prefect" or "mlflow".
        descriptor: file descriptor of the listening socket.
    """
    import uvicorn

    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    application = partial(_load, {"prefect": prefect, "mlflow": mlflow}[name])
    # there is no proxy, so proxy headers would be forged
    config = uvicorn.Config(application, factory=True, proxy_headers=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
