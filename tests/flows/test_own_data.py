"""`lotlip init` and `dvc repro` on a table of captions, with scores of the model and its starting model."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import pytest

from lotlip.core.files import sha256_tree
from lotlip.demo.questions import long_text
from lotlip.demo.world import generate_scene, render, short_caption
from tests.tiny_baselines import save_clip
from tests.workspace import Workspace

pytestmark = pytest.mark.system

IMAGES = 80


def write_data(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "detailed"])
        for number in range(IMAGES):
            scene = generate_scene(7, "train", number)
            render(scene, 64).save(folder / "pictures" / f"{number:03}.jpg")
            table.writerow([f"{number:03}.jpg", short_caption(scene, random.Random(number)), long_text(scene)])


def test_one_command_configures_own_data(make_workspace, tmp_path):
    workspace: Workspace = make_workspace()
    write_data(tmp_path / "mine")
    save_clip(tmp_path / "clip")
    command = [str(Path(sys.executable).parent / "lotlip"), "init", "--force"]
    command += ["--data", str(tmp_path / "mine" / "captions.csv"), "--start", str(tmp_path / "clip")]
    workspace.run(*command, alone=True)
    workspace.run("dvc", "repro")
    folder = workspace.folder
    assert "LoTLIP on captions.csv" in (folder / "report" / "index.html").read_text(encoding="utf-8")
    trained = json.loads((folder / "metrics" / "lotlip.json").read_text())["benchmarks"]["own"]["seeds"]["0"]
    (start,) = json.loads((folder / "metrics" / "baselines" / "scores.json").read_text())["models"]
    assert {"short.text_to_image.r1", "long.text_to_image.r1"} <= trained.keys()
    assert start["model"] == "start"
    tower = json.loads((folder / "metrics" / "stages" / "image-tower.json").read_text())
    assert tower["notes"]["starting_models"] == {str(tmp_path / "clip"): sha256_tree(tmp_path / "clip")}
    kinds = json.loads((folder / "metrics" / "stages" / "shard.json").read_text())["notes"]["separation"]
    assert kinds["pictures"] >= 50
