"""Checkouts of this project with a configuration that runs the whole pipeline in about a minute."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COPIED = ("flows", "lotlip", ".dvcignore", "dvc.yaml", "params.yaml", "profiles")
TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def copy_checkout(folder: Path) -> None:
    """Copies the project's code and configuration to a new folder, without git and DVC."""
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


def change_params(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits params.yaml of a checkout."""
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    edit(params)
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def tiny(params: dict[str, Any]) -> None:
    """The demo, two ablations of it, in a minute."""
    params["ingest"]["source"] |= {"train": 240, "val": 30, "test": 60}
    params["ingest"]["partition_size"] = 100
    params["image_tower"] = {"kind": "scenes", "scenes": 64, "epochs": 1, "width": 32, "depth": 1, "heads": 2}
    params["image_tower"] |= {"batch_size": 32, "min_accuracy": 0.0}
    describing = {n: c for n, c in params["caption"]["captioners"].items() if not c["kind"].startswith("rewrite-")}
    params["caption"]["captioners"] = describing
    params["shard"]["samples_per_shard"] = 100
    params["pretrain"] |= {
        "seeds": [0],
        "steps": 6,
        "batch_size": 16,
    }
    params["pretrain"]["optimizer"]["warmup_steps"] = 1
    params["compute"] = {"parallel_stages": 2, "training": {"log_every": 2, "max_final_loss_share": 2.0}}
    params["pretrain"]["text"]["config"] = dict(TINY_TEXT)
    scenes = params["evaluate"]["benchmarks"]["scenes"]
    params["evaluate"]["benchmarks"] = {"scenes": scenes | {"size": 60, "max_unseen_tokens": 1.0}}
    params["evaluate"]["min_score_over_chance"] = 0.0
    params["report"] |= {"contact_sheet": 4, "stored_results": None}
    params["ablations"] = {name: params["ablations"][name] for name in ("lit", "lotlip")}
    params |= {"finetune": {}, "reproduce": {}, "tables": {}, "findings": {}}


def smallest(params: dict[str, Any]) -> None:
    """One ablation with several checkpoints; every kind of stage runs once, as fast as possible."""
    tiny(params)
    params["ingest"]["source"] |= {"train": 60, "val": 10, "test": 20}
    params["ingest"]["partition_size"] = 30
    params["caption"]["captioners"] = {"llava": params["caption"]["captioners"]["llava"]}
    params["shard"]["samples_per_shard"] = 30
    params["pretrain"] |= {"steps": 40, "batch_size": 8}
    params["compute"]["training"] |= {"log_every": 4, "checkpoint_every": 4}
    params["evaluate"]["benchmarks"]["scenes"]["size"] = 20
    params["ablations"] = {"lotlip": {}}
