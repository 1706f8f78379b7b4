"""MLflow's servers and stores: how they are opened, and what their failures mean."""

from __future__ import annotations

import logging
import os
import sqlite3
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lotlip.core.caches import cache_folder, lock
from lotlip.core.databases import create_database
from lotlip.core.files import sha256_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"  # prefix of the URI of a store in a file


def open_store(uri: str) -> MlflowClient:
    """Returns MLflow's client of a server or store; creates a missing SQLite file.

    Raises:
        ValueError: the SQLite file is damaged, or is not one.
    """
    # by default MLflow retries for many minutes to reach a server that has ended
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds
    # our own warning names the server once; each retry would add a line
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    prepare_store(uri)
    return _open(uri)


def prepare_store(uri: str) -> None:
    """Creates MLflow's SQLite file with its tables, or checks the one that exists; other stores are left alone.

    Raises:
        ValueError: the file is damaged, or is not an SQLite file.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or path.name == ":memory:" or path.is_dir():
        return
    if not path.exists() or not path.stat().st_size:  # an empty one may be in the middle of its creation
        # MLflow adds its default experiment, which names a folder for artifacts, when it opens a store that has none
        create_database(
            path,
            f"mlflow-{version('mlflow')}",
            migrate=lambda new: _open(f"{SQLITE}{new}"),
            clean="DELETE FROM experiments",
        )
    base = sqlite3.connect(path)
    try:
        result = base.execute("PRAGMA quick_check(1)").fetchone()
        problem = "" if result == ("ok",) else str(result[0])
    except sqlite3.OperationalError:  # locked by another process, so it can be opened
        problem = ""
    except sqlite3.DatabaseError as error:
        problem = str(error)
    finally:
        base.close()
    if problem:
        raise ValueError(
            f"{path} is damaged ({' '.join(problem.split())}); rename it and rebuild it with `python -m flows.restore`"
        )


@contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Keeps other programs of this user from opening the same SQLite store during the block.

    MLflow creates the tables of a new store without a lock; if two processes do so at once, both fail.
    """
    if not uri.startswith(SQLITE):
        yield
        return
    name = sha256_json(str(Path(uri.removeprefix(SQLITE)).resolve()))[:16]
    with lock(cache_folder() / f"mlflow-{name}.lock", f"MLflow's store {uri}", wait=True):
        yield


def failure(uri: str, error: Exception) -> str:
    """One line that names the store that failed, the reason, and the command that sends the missing data later."""
    reason = " ".join(str(error).split()) or type(error).__name__
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    if at:  # may contain a password
        uri, reason = (text.replace(user + at, "") for text in (uri, reason))
    return (
        f"MLflow at {uri} failed: {textwrap.shorten(reason, 300)}; only tracking is affected; "
        "run `python -m flows.restore` to send what is missing"
    )


@contextmanager
def warn_on_failure(uri: str, warn: Callable[[str], object]) -> Iterator[None]:
    """Turns a tracking failure in the block into a warning: results are on disk and can be sent later.

    Args:
        uri: of the tracking server or store; the environment variable MLFLOW_TRACKING_URI overrides it.
        warn: called with the line.
    """
    try:
        yield
    except Exception as error:
        warn(failure(os.environ.get("MLFLOW_TRACKING_URI") or uri, error))


def _open(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
