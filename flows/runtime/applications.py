"""Prefect's and MLflow's web applications behind the checks of lotlip.core.loopback."""

from __future__ import annotations

import os

from lotlip.core.loopback import LoopbackOnly

LOGIN = "LOTLIP_SERVER_LOGIN"  # `user:password` of MLflow's server, in the environment of that server alone


def prefect() -> LoopbackOnly:
    """Prefect's API and UI. Prefect asks for PREFECT_SERVER_API_AUTH_STRING itself, for WebSockets too."""
    from prefect.server.api.server import create_app

    if not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise RuntimeError("PREFECT_SERVER_API_AUTH_STRING is not set; Prefect would run without a password")
    return LoopbackOnly(create_app())


def mlflow() -> LoopbackOnly:
    """MLflow's API and UI. Whoever can talk to it can read and write files as the user that runs it."""
    from mlflow.server.fastapi_app import app

    return LoopbackOnly(app, os.environ[LOGIN])
