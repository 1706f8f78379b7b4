"""The wheel in an environment without the pipeline's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_init import write_images
from tests.tiny_model import save_tiny_model
from tests.tiny_pipeline import ROOT

pytestmark = pytest.mark.system

UV = Path(sys.executable).with_name("uv")
LOAD = """
import sys, lotlip
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1])
inputs = AutoProcessor.from_pretrained(sys.argv[1])(text=["a dog"], return_tensors="pt")
print(type(model).__name__, tuple(model.get_text_features(inputs["input_ids"]).pooler_output.shape))
"""


class Environment:
    """A virtual environment with the wheel, whose programs run outside the checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [str(UV), "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*command, "--out-dir", str(folder), str(ROOT)], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that uv installs from its cache."""
    folder = tmp_path_factory.mktemp("light") / "venv"
    subprocess.run([str(UV), "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    install = [str(UV), "pip", "install", "--quiet", "--constraint", str(ROOT / "requirements.lock"), str(wheel)]
    done = subprocess.run(install, env={**os.environ, "VIRTUAL_ENV": str(folder)}, stderr=subprocess.PIPE, text=True)
    if done.returncode and "error sending request" in done.stderr:
        pytest.skip(f"no package registry can be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return Environment(folder)


def test_the_wheel_has_one_top_level_package(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel).namelist()
    names = {name.partition("/")[0] for name in files}
    assert {name for name in names if not name.endswith(".dist-info")} == {"lotlip"}
    packed = {f"lotlip/_pipeline/{name}" for name in ("flows/reproduce.py", "dvc.yaml", ".dvcignore", ".dvc/config")}
    assert packed <= set(files)


def test_a_model_works_without_the_pipelines_packages(
    environment: Environment, tiny_tower: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", tiny_tower)
    images, index = write_images(tmp_path / "images"), tmp_path / "index.parquet"
    loaded = environment.run("python", "-c", LOAD, str(tmp_path / "model"))
    assert loaded.stdout.split() == ["LotlipModel", "(1,", "32)"]
    environment.run("lotlip", "embed", str(tmp_path / "model"), str(images), "--out", str(index))
    search = environment.run("lotlip", "search", str(index), "a dog", "--top", "3")
    assert len(search.stdout.splitlines()) == 3
    assert environment.run("python", "-c", "import pandas", check=False).returncode == 1
    assert environment.run("python", "-c", "import flows", check=False).returncode == 1


def test_a_command_of_the_pipeline_is_an_error_naming_the_extra(environment: Environment) -> None:
    done = environment.run("lotlip", "plan", check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: `lotlip plan` needs the package ")
    assert done.stderr.endswith("pip install 'lotlip[pipeline]'\n") and done.stderr.count("\n") == 1
