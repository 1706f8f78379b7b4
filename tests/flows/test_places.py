"""The pipeline for unusual users and folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_pipeline import ROOT, change_params, copy_checkout, smallest

UID = 12345  # an id without a name
# Read access to the interpreter, which may be in another user's home.
AS_NAMELESS = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
AS_NAMELESS += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def shortest(params: dict[str, Any]) -> None:
    smallest(params)
    params["image_tower"]["scenes"] = 32
    params["pretrain"]["steps"] = 4
    params["compute"]["training"] |= {"log_every": 2, "checkpoint_every": 2, "processes": 2}


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can access, unlike pytest's."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="places-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.system
@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="only root with setpriv (util-linux) becomes another user",
)
def test_a_user_without_name_home_and_git_trains_in_a_folder_with_an_odd_name(public: Path):
    project, temporary, extensions = (public / name for name in ('it\'s $HOME, "é"', "tmp", "extensions"))
    copy_checkout(project)
    change_params(project, shortest)
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    temporary.mkdir()
    extensions.mkdir()
    for folder in (public, *public.rglob("*")):
        os.chown(folder, UID, UID)
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
        "TORCH_EXTENSIONS_DIR": str(extensions),
    }
    runs: list[tuple[str, str, dict[str, str]]] = [
        ("ingest", "data/ingest/index.json", {}),
        ("pretrain@lotlip", "models/lotlip/seed-0/model.safetensors", {"HOME": "/nonexistent"}),
    ]
    for stage, output_file, home in runs:
        done = subprocess.run(
            [*AS_NAMELESS, sys.executable, "-m", "flows.reproduce", stage],
            cwd=project,
            env={**environment, **home},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (project / output_file).is_file()
    assert list(extensions.iterdir()) == []  # training compiles nothing
    temporary_folders = [path.name for path in temporary.glob("*lotlip-*")]
    assert set(temporary_folders) <= {f"lotlip-{UID}"}  # the cache folder
