"""Checkouts of their own, small enough to run the whole pipeline in them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COPIED = ("flows", "lotlip", ".dvcignore", "dvc.yaml", "params.yaml", "profiles")
TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Workspace:
    """A checkout in a temporary folder, with git and DVC set up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        (folder / "data" / "captions").mkdir(parents=True)
        (folder / "data" / "captions" / ".gitkeep").touch()
        shutil.copy(ROOT / ".gitignore", folder)
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in ("PREFECT_API_URL", "PREFECT_HOME")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "COVERAGE_FILE": str(ROOT / ".coverage"),
            "COVERAGE_RCFILE": str(ROOT / "pyproject.toml"),
        }
        self.run("git", "init", "--quiet")
        self.run("dvc", "init", "--quiet")
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "start")

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done

    def python(self, module: str, *arguments: str, check: bool = True, **environment: str) -> Any:
        return self.run(sys.executable, "-m", module, *arguments, check=check, **environment)

    def change(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Edits params.yaml."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        edit(params)
        path.write_text(yaml.safe_dump(params, sort_keys=False))


def tiny(params: dict[str, Any]) -> None:
    """The demo, two ablations of it, in a minute."""
    params["ingest"]["source"] |= {"train": 240, "val": 30, "test": 60}
    params["ingest"]["partition_size"] = 100
    params["image_tower"] = {"kind": "scenes", "scenes": 64, "epochs": 1, "width": 32, "depth": 1, "heads": 2}
    params["image_tower"] |= {"batch_size": 32, "min_accuracy": 0.0}
    params["shard"]["samples_per_shard"] = 100
    params["pretrain"] |= {"steps": 6, "batch_size": 16, "log_every": 2, "max_final_loss_share": 2.0}
    params["pretrain"]["text"]["config"] = dict(TINY_TEXT)
    params["evaluate"]["benchmarks"]["scenes"] |= {"size": 60, "max_unseen_tokens": 1.0}
    params["evaluate"]["min_score_over_chance"] = 0.0
    params["report"]["contact_sheet"] = 4
    params["ablations"] = {name: params["ablations"][name] for name in ("lit", "lotlip")}


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Workspace]:
    return lambda: Workspace(tmp_path_factory.mktemp("checkout") / "project")
