"""A home folder for users who have none, as in containers that run under any number."""

from __future__ import annotations

import os
import pwd


def ensure_home() -> None:
    """Points HOME to a folder of the cache if it is missing or cannot be written to, and gives a nameless user a name.

    Libraries keep caches and settings in the home folder and look the user's name up; each fails in its own way.
    """
    name = os.environ.get("HOME")
    if not name or not os.access(name, os.W_OK | os.X_OK):
        from lotlip.core.caches import cache_folder

        os.environ.pop("HOME", None)
        folder = cache_folder() / "home"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["HOME"] = str(folder)
    if not any(os.environ.get(variable) for variable in ("LOGNAME", "USER")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = os.environ["LOGNAME"] = f"user-{os.getuid()}"
