"""A home folder for users without one, as in containers that run under an arbitrary user id."""

from __future__ import annotations

import os
import pwd


def ensure_home() -> None:
    """Points HOME to a cache folder if it is missing or not writable, and sets a user name if there is none.

    Without a home or a user name, libraries fail in various ways.
    """
    home = os.environ.get("HOME")
    if not home or not os.access(home, os.W_OK | os.X_OK):
        from lotlip.core.caches import cache_folder, default_cache_folder

        os.environ.pop("HOME", None)
        try:
            folder = cache_folder() / "home"
        except OSError:  # what uses the cache names the error; here it would be one of an import
            folder = default_cache_folder() / "home"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["HOME"] = str(folder)
    if not any(os.environ.get(variable) for variable in ("LOGNAME", "USER")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = os.environ["LOGNAME"] = f"user-{os.getuid()}"
