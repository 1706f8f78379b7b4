"""Seeds are trained once: neither another seed nor a removed one, but another starting model, trains them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.tiny_pipeline import smallest
from tests.workspace import Workspace

pytestmark = pytest.mark.system


def two_ablations(params: dict[str, Any]) -> None:
    """An ablation, and one finetuned from it."""
    smallest(params)
    params["pretrain"] |= {"steps": 4, "text": {**params["pretrain"]["text"], "corner_tokens": 0}}
    params["finetune"] = {"longer": {"init_from": "lotlip", "pretrain": {"steps": 2}}}


def train_seeds(workspace: Workspace, *seeds: int) -> dict[str, str]:
    """Trains both ablations with some seeds; stage → its output."""
    workspace.change(lambda params: params["pretrain"].update(seeds=list(seeds)))
    output = {}
    for stage, name in (("pretrain", "lotlip"), ("finetune", "longer")):
        done = workspace.run("dvc", "repro", "--single-item", f"{stage}@{name}")
        output[name] = done.stdout + done.stderr
    return output


def models(workspace: Workspace) -> dict[str, bytes]:
    folder = workspace.folder / "models"
    return {file.parent.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("model.safetensors")}


def test_a_seed_is_trained_once(make_workspace: Callable[[], Workspace]) -> None:
    workspace = make_workspace()
    workspace.change(two_ablations)
    workspace.run("dvc", "repro", "--quiet", "shard")
    train_seeds(workspace, 0)
    first = models(workspace)
    assert set(first) == {"lotlip/seed-0", "longer/seed-0"}
    # a run that a kill interrupted after it published reuses every seed, and its record must be the same
    workspace.python("flows.stages.pretrain", "lotlip")
    record = json.loads((workspace.folder / "metrics" / "stages" / "pretrain-lotlip.json").read_text())
    assert (record["samples"], record["samples_per_second"]) == (4 * 8, 0)

    for name, output in train_seeds(workspace, 0, 1).items():
        assert f"pretrain-{name}: reusing trained seeds: 0" in output
        assert f"{name} seed 1: step" in output
        assert f"{name} seed 0: step" not in output
    both = models(workspace)
    assert set(both) == {*first, "lotlip/seed-1", "longer/seed-1"}
    assert {name: both[name] for name in first} == first

    for name, output in train_seeds(workspace, 1).items():
        assert f"pretrain-{name}: reusing trained seeds: 1" in output
        assert ": step" not in output
    assert models(workspace) == {name: weights for name, weights in both.items() if name.endswith("seed-1")}


def test_an_ablation_is_trained_again_after_its_starting_model_was_replaced(
    make_workspace: Callable[[], Workspace],
) -> None:
    workspace = make_workspace()
    workspace.change(two_ablations)
    folder = workspace.folder
    workspace.run("dvc", "repro", "--quiet", "pretrain@lotlip", "finetune@longer")
    shutil.copytree(folder / "models" / "lotlip" / "seed-0", folder / "mine")
    tokenizer = (folder / "mine").as_posix()
    workspace.change(
        lambda params: params["ablations"].update(own={"text": {"pretrained": "mine", "tokenizer": tokenizer}})
    )
    outputs = []
    for changed in (False, False, True):
        if changed:
            shutil.copytree(folder / "models" / "longer" / "seed-0", folder / "mine", dirs_exist_ok=True)
        done = workspace.python("flows.reproduce", "pretrain@own")
        outputs.append(done.stdout + done.stderr)
    first, second, third = outputs
    assert "own seed 0: step" in first
    assert "Nothing has changed" in second
    assert "mine has changed, so pretrain-own runs again." in third
    assert "own seed 0: step" in third
