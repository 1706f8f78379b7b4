"""Migrates MLflow's tables and those of its logins, and sets the team's password, which may have changed."""

from __future__ import annotations

import os

import sqlalchemy
from mlflow.server.auth import store
from mlflow.server.auth.db import utils
from mlflow.store.db.utils import _initialize_tables, _is_empty_database, _upgrade_db

USER = "MLFLOW_AUTH_ADMIN_USERNAME"
PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # noqa: S105 - the variable's name


def main() -> None:
    """Migrates, then creates or updates the user."""
    url = os.environ["MLFLOW_BACKEND_STORE_URI"]
    engine = sqlalchemy.create_engine(url)
    (_initialize_tables if _is_empty_database(engine) else _upgrade_db)(engine)  # as `mlflow db upgrade` does
    utils.migrate(engine, "head")
    engine.dispose()
    store.init_db(url)
    user, password = os.environ[USER], os.environ[PASSWORD]
    if store.has_user(user):
        store.update_user(user, password=password, is_admin=True)
    else:
        store.create_user(user, password, is_admin=True)
    print(f"MLflow's tables are current; user {user} is set")


if __name__ == "__main__":
    main()
