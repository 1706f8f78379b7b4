"""Models that others wrote: their code is never run, and what cannot be used is an error that names it."""

from __future__ import annotations

import ast
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lotlip.config.params import FinetuneConfig
from lotlip.data.weights import read_weights
from lotlip.image_tower.config import TimmTowerConfig
from lotlip.models.saving import load_model
from lotlip.models.vision.image_tower import build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.pretrain.config import LOADING_OPTIONS, PretrainConfig, TextTowerConfig
from lotlip.pretrain.initialisation import build_for_pretraining
from tests.conftest import TEXT
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("lotlip", "flows", "benchmarks", "infra") for path in (ROOT / folder).rglob("*.py")
)


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """Calls of functions and methods of these names in the project's sources, with their places."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            whole = ast.unparse(node.func)
            if name in names or whole in names:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def constant(call: ast.Call, name: str) -> Any:
    """The value that a call writes out for an argument; None if it does not."""
    return next((ast.literal_eval(given.value) for given in call.keywords if given.arg == name), None)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_call_that_loads_a_model_says_that_its_code_is_not_trusted():
    found = calls("from_pretrained", "from_config", "pipeline")
    assert len(found) > 10
    assert [place for place, call in found if constant(call, "trust_remote_code") is not False] == []


def test_torch_loads_weights_only_and_nothing_is_unpickled():
    assert [place for place, call in calls("torch.load") if constant(call, "weights_only") is not True] == []
    assert calls("pickle.load", "pickle.loads", "joblib.load", "dill.load", "dill.loads") == []
    assert [place for place, call in calls("np.load") if constant(call, "allow_pickle") is not False] == []
    assert calls("yaml.unsafe_load", "yaml.full_load") == []


def test_no_json_is_written_that_is_not_json():
    assert [place for place, call in calls("json.dumps", "json.dump") if constant(call, "allow_nan") is not False] == []


# --- options in configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LOADING_OPTIONS | {"_attn_implementation", "_name_or_path"}))
def test_an_option_of_from_pretrained_in_text_config_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match=rf"(?s)config.*\b{name}\b"):
        TextTowerConfig(config={name: True})
    with pytest.raises(ValueError, match=rf"(?s)config.*\binner\.{name}\b"):
        TextTowerConfig(config={"inner": {name: True}})


def test_fields_of_an_encoder_are_still_taken():
    assert TextTowerConfig(config={**TEXT, "model_type": "electra"}).config["hidden_size"] == 32


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "cache_dir", "pretrained"])
def test_an_image_tower_s_own_configuration_cannot_load_files(name):
    with pytest.raises(ValueError, match=name):
        build_image_tower(ImageTowerSpec("vit_tiny_patch16_224", 224, {name: "evil.pth"}))


# --- code in a model's folder -----------------------------------------------------------------------------------------


def with_code(folder: Path) -> Path:
    """Adds code to a model's folder, which would leave a file behind if it ran."""
    config = json.loads((folder / "config.json").read_text())
    auto = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor")}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass AutoModel: pass\n")
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    from lotlip.data.tokenizer import TextTokenizer

    BertModel(BertConfig(**TEXT, vocab_size=30522)).save_pretrained(tmp_path / "bert")
    TextTokenizer("bert-base-uncased", 32).save(tmp_path / "bert")
    return tmp_path / "bert"


def pretrain(**text: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"text": {"context_length": 32, **text}})


def test_the_code_of_a_text_tower_is_not_run(bert, tiny_tower, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with_code(bert)
    build_for_pretraining(pretrain(pretrained=str(bert)), tiny_tower)
    assert not (bert / "ran").exists()


def test_a_text_tower_that_needs_its_own_code_is_an_error_and_the_code_is_not_run(bert, tiny_tower, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    config = json.loads((with_code(bert) / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    with pytest.raises(ValueError, match="mine"):
        pretrain(pretrained=str(bert))
    assert not (bert / "ran").exists()


def test_planning_does_not_run_the_code_of_a_text_tower(bert, monkeypatch):
    from lotlip.plan.towers import _encoder_config

    monkeypatch.setattr("builtins.input", lambda _: "y")
    with_code(bert)
    _encoder_config(pretrain(pretrained=str(bert)).text, None)
    assert not (bert / "ran").exists()


def test_the_code_of_a_saved_model_is_not_run(tiny_tower, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = with_code(save_tiny_model(tmp_path / "model", tiny_tower))
    load_model(folder)
    assert not (folder / "ran").exists()


# --- models that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip2", "gpt2", "t5", "vit", None])
def test_a_model_that_is_no_text_tower_is_an_error_that_names_its_type(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"pretrained\n.*{kind!r}.*supported are bert, roberta"):
        TextTowerConfig(pretrained=str(tmp_path))


def test_a_file_is_no_text_tower(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pretrained\n.*is a file"):
        TextTowerConfig(pretrained=str(tmp_path / "model.pth"))


def test_a_text_tower_s_folder_without_a_configuration_is_an_error(tmp_path, tiny_tower):
    with pytest.raises(ValueError, match=rf"{tmp_path} has no config.json"):
        build_for_pretraining(pretrain(pretrained=str(tmp_path)), tiny_tower)


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "be')
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'} is damaged"):
        TextTowerConfig(pretrained=str(tmp_path))


@pytest.mark.parametrize("after", ["models/lit", "/somewhere/models/lit"])
def test_a_folder_is_no_ablation_to_continue(after):
    with pytest.raises(ValueError, match=r"init_from\n.*is a folder.*text\.pretrained"):
        FinetuneConfig(init_from=after, pretrain={})


def test_the_encoder_of_a_continued_ablation_cannot_be_changed(tiny_tower, tmp_path):
    with pytest.raises(ValueError, match=r"text\.config has no effect"):
        FinetuneConfig(init_from="lit", pretrain={"text": {"config": {"hidden_dropout_prob": 0.1}}})
    model = save_tiny_model(tmp_path / "model", tiny_tower)
    build_for_pretraining(pretrain(pretrained=str(model), config=TEXT), tiny_tower)
    with pytest.raises(ValueError, match=rf"hidden_dropout_prob: 0.1.*{model}"):
        build_for_pretraining(pretrain(pretrained=str(model), config={"hidden_dropout_prob": 0.1}), tiny_tower)


def test_weights_of_something_else_are_no_image_tower(tmp_path):
    from lotlip.image_tower.timm import timm_tower

    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'vit.pth'}: does not fit the model"):
        timm_tower(TimmTowerConfig(kind="timm", model="vit_tiny_patch16_224", checkpoint=tmp_path / "vit.pth"))


def test_a_whole_model_is_no_image_tower(tiny_tower, tmp_path):
    from lotlip.image_tower.timm import timm_tower

    file = save_tiny_model(tmp_path / "model", tiny_tower) / "model.safetensors"
    with pytest.raises(ValueError, match=rf"{file} holds a model of images and texts"):
        timm_tower(TimmTowerConfig(kind="timm", model="vit_tiny_patch16_224", checkpoint=file))


# --- damaged files ----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", [cut, lambda path: path.write_bytes(b"\xff" * 64)])
def test_a_damaged_file_of_a_model_is_named(tiny_tower, tmp_path, name, how):
    folder = save_tiny_model(tmp_path / "model", tiny_tower)
    how(folder / name)
    with pytest.raises(ValueError, match=str(folder / name)):
        load_model(folder)


def test_damaged_weights_of_a_text_tower_and_of_an_image_tower_are_named(bert, tiny_tower, tmp_path):
    cut(bert / "model.safetensors")
    with pytest.raises(ValueError, match=str(bert / "model.safetensors")):
        build_for_pretraining(pretrain(pretrained=str(bert)), tiny_tower)
    tower = shutil.copytree(tiny_tower, tmp_path / "tower")
    cut(tower / "model.safetensors")
    with pytest.raises(ValueError, match=str(tower / "model.safetensors")):
        build_for_pretraining(pretrain(config=TEXT), tower)
    with pytest.raises(ValueError, match="is missing"):
        read_weights(tmp_path / "none.safetensors")


# --- weights that are not finite --------------------------------------------------------------------------------------


def spoil(folder: Path, name: str = "text.proj.weight", value: float = math.nan) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["text.proj.weight", "image.trunk.cls_token"])
def test_weights_that_are_not_finite_are_an_error_that_names_the_model(tiny_tower, tmp_path, name, value):
    folder = spoil(save_tiny_model(tmp_path / "model", tiny_tower), name, value)
    with pytest.raises(ValueError, match=rf"{folder}.*{name}"):
        load_model(folder)
