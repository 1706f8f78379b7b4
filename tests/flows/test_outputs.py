"""Outputs of stages: dvc.yaml agrees with lotlip.config.outputs, and foreign files are never removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.clean import clean
from flows.runtime import stage as stages
from flows.stages.ingest import ingest
from lotlip.config.outputs import outputs
from lotlip.config.params import load_params
from lotlip.core.caches import Locked, lock
from lotlip.core.files import RECORD, publish, write_json
from tests.workspace import ROOT, Workspace, tiny


def declared() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def outs(stage: dict[str, Any]) -> dict[str, Any]:
    stage = stage.get("do", stage)
    return {name: options for entry in [*stage["outs"], *stage.get("metrics", [])] for name, options in entry.items()}


@pytest.mark.parametrize("stage", [name for name in declared() if name != "evaluate-finetune"])
def test_dvc_knows_the_outputs_of_a_stage_and_does_not_remove_them(stage: str) -> None:
    paths = load_params(ROOT / "params.yaml").paths
    item = "x" if "foreach" in declared()[stage] else None
    written = outputs(paths, "pretrain" if stage == "finetune" else stage, item)
    declared_outputs = outs(declared()[stage])
    assert all(options == {"persist": True} for options in declared_outputs.values())
    named = {name.replace("${key}", "x") for name in declared_outputs}
    for key, path in paths:
        named = {name.replace(f"${{paths.{key}}}", str(path)) for name in named}
    expected = {str(path) for path in [*written.folders, *written.files]}
    if stage == "report":  # it has no record
        expected = {str(paths.report)}
    assert named == expected


@pytest.mark.system
def test_a_folder_that_no_stage_wrote_survives_dvc_repro(make_workspace: Any) -> None:
    workspace: Workspace = make_workspace()
    workspace.change(tiny)
    workspace.change(lambda params: params["paths"].update(ingest="notes"))
    notes = workspace.folder / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    failed = workspace.run("dvc", "repro", "ingest", check=False)
    assert failed.returncode != 0
    assert "error in ingest: notes is not empty, and lotlip did not create it" in failed.stderr
    assert [path.name for path in notes.iterdir()] == ["mine.txt"]
    (notes / "mine.txt").unlink()
    workspace.run("dvc", "repro", "ingest")
    first = (notes / RECORD).read_bytes()
    workspace.change(lambda params: params["ingest"]["source"].update(seed=7))
    workspace.run("dvc", "repro", "ingest")
    assert (notes / RECORD).read_bytes() != first
    (notes / "mine.txt").write_text("mine")
    workspace.change(lambda params: params["ingest"]["source"].update(seed=8))
    failed = workspace.run("dvc", "repro", "ingest", check=False)
    assert "notes contains mine.txt" in failed.stderr
    assert (notes / "mine.txt").read_text() == "mine"
    assert (notes / "index.json").is_file()


# --- make clean -----------------------------------------------------------------------------------------------------


def publish_some(out: Path) -> None:
    new = Path(".lotlip/new")
    new.mkdir(parents=True)
    (new / "index.json").write_text("{}")
    publish(new, out)


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_clean_removes_only_outputs_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    if elsewhere:
        text = text.replace("  models: models\n", "  models: out/models\n").replace(
            "report: report\n", "report: page\n"
        )
    Path("params.yaml").write_text(text)
    paths = load_params().paths
    stages = [("ingest", None), ("image-tower", None), ("caption", "llava"), ("shard", None)]
    stages += [("baselines", None), ("report", None)]
    stages += [(stage, "gone-from-params") for stage in ("pretrain", "evaluate")]
    ours: list[Path] = []
    for stage, item in stages:
        written = outputs(paths, stage, item)
        for folder in written.folders:
            publish_some(folder)
        write_json(next(iter(written.files)), {"stage": stage, "seconds": 1, "gate": []})
        ours += [*written.folders, next(iter(written.files))]
    write_json(paths.metrics / "gone-from-params.json", {"ablation": "x", "benchmarks": {}, "fingerprints": {}})
    write_json(paths.metrics / "summary" / "gone-from-params.json", {"scenes": {"r1": 0.5}})
    ours += [paths.metrics / "gone-from-params.json", paths.metrics / "summary" / "gone-from-params.json"]
    users = [
        *(folder / "mine" for path in ours for folder in [path if path.is_dir() else path.parent]),
        *(paths.models / "official" / name for name in ("b16/model.safetensors", "notes.json")),
        *(paths.metrics / name for name in ("mine.json", "summary/mine.json", "stages/mine.json")),
        Path("imported/b16/model.safetensors"),
        paths.caption_store / "llava/about.json",
        paths.captions / ".gitkeep",
        Path(".venv/bin/python"),
        Path("data/raw/1.jpg"),
        Path("models-of-mine/x"),
    ]
    for file in users:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('["mine"]')
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (paths.models / "link").symlink_to(outside)
    lines = list(clean(load_params()))
    for file in users:
        assert file.read_text() == '["mine"]', file
        if paths.models in file.parents:
            assert any(str(file) in line for line in lines if line.startswith("kept"))
    assert (outside / "kept").read_text() == "kept"
    assert (paths.models / "link").is_symlink()
    assert not [path for path in tmp_path.rglob("index.json") if "outside" not in str(path)]
    assert not [path for path in ours if path.is_file()]
    assert [path.name for path in Path(".lotlip").iterdir()] == []


@pytest.mark.parametrize("running", ["locks/pretrain-lit.lock", "sweeps/lotlip-k2/lock"])
def test_clean_fails_while_something_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"))
    publish_some(Path("models/lit"))
    name = r"stage pretrain-lit is in use" if "pretrain" in running else r"trial lotlip-k2 of a sweep is in use"
    with lock(Path(".lotlip", running)), pytest.raises(Locked, match=name):
        list(clean(load_params()))
    assert Path(".lotlip", running).is_file()
    assert Path("models/lit/index.json").is_file()


def test_a_stage_checks_its_paths_before_it_starts_prefects_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data/ingest").mkdir(parents=True)
    (tmp_path / "data/ingest/mine.txt").write_text("kept")
    monkeypatch.setattr("flows.runtime.servers.prefect_for_program", lambda: pytest.fail("the server was started"))
    with pytest.raises(SystemExit, match=r"error in ingest: data/ingest "):
        stages.main(ingest)
    assert (tmp_path / "data/ingest/mine.txt").read_text() == "kept"
