"""What the stage `pretrain` records of a training: the model that it starts from, and the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.runtime.git import run_git
from flows.stages.pretrain import git_commit, hash_inputs, starting_weights
from flows.sweep.workspaces import Snapshot
from lotlip.core.files import sha256_files
from lotlip.core.paths import Paths
from lotlip.pretrain.config import PretrainConfig


def write(folder: Path, weights: str, content: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / weights).write_text(content)
    return folder


def hashes(folder: Path | str, seeds: tuple[int, ...] = (0, 1)) -> dict[str, str]:
    return starting_weights(PretrainConfig(seeds=list(seeds), text={"pretrained": str(folder)}))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_with_other_files_is_another_model(tmp_path: Path, weights: str):
    folder = write(tmp_path / "bert", weights)
    first = hashes(folder)
    assert first.keys() == {"0", "1"} and first["0"] == first["1"]
    assert hashes(folder) == first
    (folder / weights).write_text("other weights")
    second = hashes(folder)
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_act": "relu"}')
    assert len({first["0"], second["0"], hashes(folder)["0"]}) == 3


def test_of_an_ablation_only_the_weights_of_the_same_seed_count(tmp_path: Path):
    files = [write(tmp_path / "lit" / f"seed-{seed}", "model.safetensors", str(seed)) for seed in (0, 1)]
    before = hashes(tmp_path / "lit")
    assert before == {str(seed): sha256_files([file / "model.safetensors"]) for seed, file in enumerate(files)}
    (files[0] / "README.md").write_text("a model card")
    assert hashes(tmp_path / "lit") == before
    (files[1] / "model.safetensors").write_text("other weights")
    assert hashes(tmp_path / "lit")["0"] == before["0"] != hashes(tmp_path / "lit")["1"]


def test_another_starting_model_is_another_input_also_with_the_same_image_tower(tmp_path: Path):
    paths = Paths(shards=tmp_path / "shards", image_tower=tmp_path / "tower")
    paths.shards.mkdir()
    (paths.shards / "index.json").write_text("{}")
    write(paths.image_tower, "model.safetensors")
    whole = write(paths.image_tower / "start", "model.safetensors", "both towers")
    config, alone = PretrainConfig(start="mine"), hash_inputs(PretrainConfig(), paths)
    before = hash_inputs(config, paths)
    assert {name: before[name] for name in alone} == alone and before.keys() - alone.keys() == {"start"}
    (whole / "README.md").write_text("a note on the card")
    assert hash_inputs(config, paths) == before
    (whole / "model.safetensors").write_text("another text tower")
    assert hash_inputs(config, paths)["start"] != before["start"]


def test_a_folder_without_weights_is_an_error(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"bert has no weights \(\*\.safetensors or \*\.bin\); name the folder of a model"
    ):
        hashes(write(tmp_path / "bert", "notes.txt"))


def test_random_weights_and_those_of_a_hub_have_no_hash():
    assert hashes("nobody/no-such-model") == starting_weights(PretrainConfig()) == {}


def test_the_commit_is_that_of_the_checkout_and_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert git_commit() == "unknown"
    (tmp_path / "params.yaml").touch()
    identity = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    for arguments in (("init",), ("add", "params.yaml"), (*identity, "commit", "--message", "first")):
        assert run_git(*arguments).returncode == 0
    commit = run_git("rev-parse", "HEAD").stdout.strip()
    assert git_commit() == commit
    (tmp_path / "params.yaml").write_text("edited: true")
    assert git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_commit() == "unknown"
    with pytest.raises(FileNotFoundError, match=r"sweeps and work pools need the program git, .*; install it"):
        Snapshot.take(tmp_path)
