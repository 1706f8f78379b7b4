"""Programs of users without a writable home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lotlip.core.caches import cache_folder
from lotlip.core.home import ensure_home

ROOT = Path(__file__).parents[1]
SCRIPT = """
import getpass, os, sys
sys.path.insert(0, sys.argv[1])
import lotlip.core.caches, lotlip.core.home
from pathlib import Path
if sys.argv[2]:  # after the imports: Python itself may lie where that user cannot read
    os.setgroups([]); os.setgid(12345); os.setuid(12345)
    for name in ("HOME", "USER", "LOGNAME"):
        os.environ.pop(name, None)
    if sys.argv[3] != "unset":
        os.environ["HOME"] = sys.argv[3]
lotlip.core.home.ensure_home()
(Path.home() / "probe").write_text("")
print(Path.home(), getpass.getuser())
"""


@pytest.mark.integration
@pytest.mark.parametrize("home", [None, "", "/nonexistent"])
@pytest.mark.parametrize("nameless", [False, True])
def test_an_unusable_home_is_replaced(home, nameless, tmp_path):
    if nameless and os.getuid():
        pytest.skip("only root can become another user")
    names = ("HOME", "USER", "LOGNAME", "LOTLIP_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if home is not None:
        environment["HOME"] = home
    if nameless:  # pytest's folders are private to this user
        environment["TMPDIR"] = "/tmp"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT), "1" if nameless else "", "unset" if home is None else home],
        cwd="/" if nameless else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, user = done.stdout.split()
    assert place.endswith("/home") and place != home
    assert (user == "user-12345") == nameless


def test_an_unusable_cache_is_no_error_of_an_import(monkeypatch, tmp_path):
    for name, value in {"HOME": "", "LOTLIP_CACHE": "relative", "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    ensure_home()
    assert Path.home() == tmp_path / "cache" / "lotlip" / "home"
    with pytest.raises(OSError, match=r"LOTLIP_CACHE is relative, which cannot be used: .*; name a folder of yours"):
        cache_folder()
