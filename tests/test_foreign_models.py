"""Models of other people: their code is never run, and unusable ones are errors."""

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
from lotlip.image_tower.config import TimmTowerConfig, TransformersTowerConfig
from lotlip.image_tower.transformers import transformers_spec
from lotlip.importing.start import open_start
from lotlip.models.saving import load_model
from lotlip.models.vision.image_tower import build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.pretrain.config import LOADING_OPTIONS, PretrainConfig, TextTowerConfig
from lotlip.pretrain.initialisation import build_for_pretraining
from tests.conftest import TEXT
from tests.tiny_baselines import save_clip
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("lotlip", "flows", "benchmarks", "infra") for path in (ROOT / folder).rglob("*.py")
)


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """Location and node of every call of these names in the project's sources."""
    results = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            callee = ast.unparse(node.func)
            if name in names or callee in names:
                results.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return results


def literal_argument(call: ast.Call, name: str) -> Any:
    """The literal value of a call's argument; None if there is none."""
    return next((ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_call_that_loads_a_model_disables_its_code():
    calls_found = calls("from_pretrained", "from_config", "pipeline")
    assert len(calls_found) > 10
    assert [place for place, call in calls_found if literal_argument(call, "trust_remote_code") is not False] == []


@pytest.mark.slow
def test_torch_loads_weights_only_and_pickle_is_not_used():
    assert [place for place, call in calls("torch.load") if literal_argument(call, "weights_only") is not True] == []
    # a flow and the worker processes that it starts exchange pickles through pipes
    own = ("flows/runtime/runners.py", "flows/runtime/unit_work.py", "flows/runtime/worker.py")
    places = [place for place, _ in calls("pickle.load", "pickle.loads", "joblib.load", "dill.load", "dill.loads")]
    assert [place for place in places if place.partition(":")[0] not in own] == []
    assert [place for place, call in calls("np.load") if literal_argument(call, "allow_pickle") is not False] == []
    assert calls("yaml.unsafe_load", "yaml.full_load") == []


@pytest.mark.slow
def test_json_is_written_without_nan():
    assert [
        place for place, call in calls("json.dumps", "json.dump") if literal_argument(call, "allow_nan") is not False
    ] == []


# --- options in configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LOADING_OPTIONS | {"_attn_implementation", "_name_or_path"}))
def test_an_option_of_from_pretrained_in_text_config_is_an_error(name):
    with pytest.raises(ValueError, match=rf"(?s)config.*\b{name}\b"):
        TextTowerConfig(config={name: True})
    with pytest.raises(ValueError, match=rf"(?s)config.*\binner\.{name}\b"):
        TextTowerConfig(config={"inner": {name: True}})


def test_fields_of_an_encoder_are_accepted():
    assert TextTowerConfig(config={**TEXT, "model_type": "electra"}).config["hidden_size"] == 32


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "cache_dir", "pretrained"])
def test_the_configuration_of_an_image_tower_cannot_load_files(name):
    with pytest.raises(ValueError, match=name):
        build_image_tower(ImageTowerSpec("vit_tiny_patch16_224", 224, {name: "evil.pth"}))


# --- code in a model's folder -----------------------------------------------------------------------------------------


def with_code(folder: Path) -> Path:
    """Adds code to a model's folder, which writes a file if it is run."""
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


def test_a_text_tower_that_needs_its_own_code_is_an_error(bert, tiny_tower, monkeypatch):
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


@pytest.mark.slow
def test_the_code_of_a_saved_model_is_not_run(tiny_tower, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = with_code(save_tiny_model(tmp_path / "model", tiny_tower))
    load_model(folder)
    assert not (folder / "ran").exists()


# --- unusable models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip2", "gpt2", "t5", "vit", None])
def test_a_model_that_is_not_a_text_tower_is_an_error_naming_its_type(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"pretrained\n.*{kind!r}.*supported are bert, roberta"):
        TextTowerConfig(pretrained=str(tmp_path))


def test_a_file_as_text_tower_is_an_error(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pretrained\n.*is a file"):
        TextTowerConfig(pretrained=str(tmp_path / "model.pth"))


def test_a_text_tower_without_a_configuration_is_an_error(tmp_path, tiny_tower):
    with pytest.raises(ValueError, match=rf"{tmp_path} has no config.json"):
        build_for_pretraining(pretrain(pretrained=str(tmp_path)), tiny_tower)


def test_a_damaged_configuration_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "be')
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'} is damaged"):
        TextTowerConfig(pretrained=str(tmp_path))


@pytest.mark.parametrize("after", ["models/lit", "/somewhere/models/lit"])
def test_init_from_a_folder_is_an_error(after):
    with pytest.raises(ValueError, match=r"init_from\n.*is a folder.*text\.pretrained"):
        FinetuneConfig(init_from=after, pretrain={})


@pytest.mark.slow
def test_the_encoder_of_a_finetuned_ablation_cannot_be_changed(tiny_tower, tmp_path):
    with pytest.raises(ValueError, match=r"text\.config has no effect"):
        FinetuneConfig(init_from="lit", pretrain={"text": {"config": {"hidden_dropout_prob": 0.1}}})
    model = save_tiny_model(tmp_path / "model", tiny_tower)
    build_for_pretraining(pretrain(pretrained=str(model), config=TEXT), tiny_tower)
    with pytest.raises(ValueError, match=rf"hidden_dropout_prob: 0.1.*{model}"):
        build_for_pretraining(pretrain(pretrained=str(model), config={"hidden_dropout_prob": 0.1}), tiny_tower)


def test_weights_of_another_model_as_image_tower_are_an_error(tmp_path):
    from lotlip.image_tower.timm import timm_tower

    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'vit.pth'}: does not fit the model"):
        timm_tower(TimmTowerConfig(kind="timm", model="vit_tiny_patch16_224", checkpoint=tmp_path / "vit.pth"))


@pytest.mark.slow
def test_a_dual_encoder_as_image_tower_is_an_error(tiny_tower, tmp_path):
    from lotlip.image_tower.timm import timm_tower

    file = save_tiny_model(tmp_path / "model", tiny_tower) / "model.safetensors"
    with pytest.raises(ValueError, match=rf"{file} holds a model of images and texts"):
        timm_tower(TimmTowerConfig(kind="timm", model="vit_tiny_patch16_224", checkpoint=file))


def add_adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


ADAPTER = (
    r"has an adapter \(adapter_config\.json\), which is not read; merge it into its model first \(merge_and_unload"
)


@pytest.mark.parametrize("alone", [False, True])
def test_a_starting_model_with_an_adapter_is_an_error(tmp_path, alone):
    folder = tmp_path / "clip"
    folder.mkdir() if alone else save_clip(folder)
    with pytest.raises(ValueError, match=ADAPTER):
        open_start(str(add_adapter(folder)))


def test_towers_with_an_adapter_are_errors(bert, tiny_tower, tmp_path):
    with pytest.raises(ValueError, match=ADAPTER):
        build_for_pretraining(pretrain(pretrained=str(add_adapter(bert))), tiny_tower)
    folder = add_adapter(save_clip(tmp_path / "clip"))
    with pytest.raises(ValueError, match=ADAPTER):
        transformers_spec(TransformersTowerConfig(kind="transformers", model=str(folder)))


@pytest.mark.slow
def test_a_saved_model_with_an_adapter_is_an_error(tiny_tower, tmp_path):
    with pytest.raises(ValueError, match=ADAPTER):
        load_model(add_adapter(save_tiny_model(tmp_path / "model", tiny_tower)))


# --- damaged files ----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", [truncate, lambda path: path.write_bytes(b"\xff" * 64)])
def test_a_damaged_file_of_a_model_is_an_error(tiny_tower, tmp_path, name, how):
    folder = save_tiny_model(tmp_path / "model", tiny_tower)
    how(folder / name)
    with pytest.raises(ValueError, match=str(folder / name)):
        load_model(folder)


def test_damaged_weights_of_towers_are_errors(bert, tiny_tower, tmp_path):
    truncate(bert / "model.safetensors")
    with pytest.raises(ValueError, match=str(bert / "model.safetensors")):
        build_for_pretraining(pretrain(pretrained=str(bert)), tiny_tower)
    tower = shutil.copytree(tiny_tower, tmp_path / "tower")
    truncate(tower / "model.safetensors")
    with pytest.raises(ValueError, match=str(tower / "model.safetensors")):
        build_for_pretraining(pretrain(config=TEXT), tower)
    with pytest.raises(ValueError, match="is missing"):
        read_weights(tmp_path / "none.safetensors")


# --- non-finite weights -----------------------------------------------------------------------------------------------


def replace_weight(folder: Path, name: str = "text.proj.weight", value: float = math.nan) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["text.proj.weight", "image.trunk.cls_token"])
def test_non_finite_weights_are_an_error_naming_the_model(tiny_tower, tmp_path, name, value):
    folder = replace_weight(save_tiny_model(tmp_path / "model", tiny_tower), name, value)
    with pytest.raises(ValueError, match=rf"{folder}.*{name}"):
        load_model(folder)
