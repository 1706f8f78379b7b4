"""Saved models are loaded unchanged, also by transformers' Auto classes."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import copy_with_provenance, load_model, save_model, save_whole_model
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.initialisation import build_for_pretraining
from lotlip.pretrain.model import LotlipForPreTraining
from tests.conftest import IMAGE_SIZE, TEXT, TinySample

TEXTS = ["a red dog. it runs", "one big white house under the sky", "cat"]
SETTINGS = PretrainConfig.model_validate({"text": {"config": TEXT, "context_length": 32, "register_tokens": 1}})


def model_inputs(tokenizer: TextTokenizer) -> tuple[Tensor, Tensor]:
    ids, lengths = tokenizer(TEXTS)
    return torch.from_numpy(ids), torch.from_numpy(lengths)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> tuple[LotlipForPreTraining, Path]:
    """A model and the folder it is saved in."""
    torch.manual_seed(1)
    model = build_for_pretraining(SETTINGS, tiny_tower).eval()
    model.config.provenance = {"name": "tiny", "seed": 1}
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model.config, model.state_dict(), TextTokenizer("bert-base-uncased", 32, 2, 1), folder, tiny_tower)
    return model, folder


def test_a_model_is_loaded_as_saved(saved_model):
    model, folder = saved_model
    loaded, tokenizer = load_model(folder)
    assert not loaded.training
    assert (tokenizer.context_length, tokenizer.corner_tokens, tokenizer.register_tokens) == (32, 2, 1)
    assert loaded.config.corner_mask is True
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(*model_inputs(tokenizer)), model.encode_text(*model_inputs(tokenizer)))
    assert torch.equal(loaded.logit_scale, model.logit_scale)
    # buffers are not in the file
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], buffer), name
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_the_saved_image_tower_is_the_frozen_one(saved_model, tiny_tower):
    from lotlip.models.vision.image_tower import load_image_tower

    frozen = load_file(tiny_tower / "model.safetensors")
    weights = load_file(saved_model[1] / "model.safetensors")
    of_image = {name.removeprefix("image."): value for name, value in weights.items() if name.startswith("image.")}
    assert of_image.keys() == frozen.keys()
    assert all(torch.equal(of_image[name], value) for name, value in frozen.items())
    loaded, _ = load_model(saved_model[1])
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(load_image_tower(tiny_tower)(images), dim=-1)
        torch.testing.assert_close(loaded.encode_image(images), expected)


def test_the_weights_have_the_permissions_of_other_files(saved_model):
    modes = {file.name: oct(file.stat().st_mode) for file in saved_model[1].iterdir()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.slow
def test_a_trained_image_tower_is_saved_as_trained(tmp_path, tiny_tower):
    settings = PretrainConfig.model_validate({**SETTINGS.model_dump(), "image_tower": {"frozen": False}})
    model = build_for_pretraining(settings, tiny_tower)
    with torch.no_grad():
        model.image_tower.trunk.cls_token += 1
    save_model(model.config, model.state_dict(), TextTokenizer("bert-base-uncased", 32, 2, 1), tmp_path / "model", None)
    loaded, _ = load_model(tmp_path / "model")
    assert torch.equal(loaded.image_tower.trunk.cls_token, model.image_tower.trunk.cls_token)


@pytest.mark.slow
def test_bf16_weights_do_not_round_the_saved_image_tower(tmp_path, tiny_tower):
    model = build_for_pretraining(SETTINGS, tiny_tower)
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = TextTokenizer("bert-base-uncased", 32, 2, 1)
    save_model(model.bfloat16().config, exact, tokenizer, tmp_path / "model", tiny_tower)
    loaded, _ = load_model(tmp_path / "model")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in exact.items())


@pytest.mark.slow
def test_auto_classes_read_the_folder(saved_model, tiny_samples: list[TinySample]):
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    _, folder = saved_model
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert isinstance(model, LotlipModel)
    images = [Image.open(io.BytesIO(sample.image)) for sample in tiny_samples[:2]]
    inputs = processor(text=TEXTS, images=images, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
        ids, lengths = model_inputs(TextTokenizer("bert-base-uncased", 32, 2, 1))
        expected = model.encode_text(ids, lengths)[:, 0]
    torch.testing.assert_close(output.text_embeds, expected, atol=1e-6, rtol=0)
    stored = torch.nn.functional.normalize(torch.from_numpy(np.stack([s.feature for s in tiny_samples[:2]])), dim=-1)
    torch.testing.assert_close(output.image_embeds, stored, atol=1e-5, rtol=0)
    alone = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(alone["input_ids"], ids)


def test_the_zero_shot_pipeline_runs_a_saved_model(saved_model, tiny_samples: list[TinySample]):
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=str(saved_model[1]))
    image = Image.open(io.BytesIO(tiny_samples[0].image))
    scores = classify(image, candidate_labels=["dog", "house"], hypothesis_template="{}")
    assert {entry["label"] for entry in scores} == {"dog", "house"}
    assert sum(entry["score"] for entry in scores) == pytest.approx(1)


def test_saving_again_does_not_change_the_files(saved_model, tmp_path):
    loaded, _ = load_model(saved_model[1])
    loaded.save_pretrained(tmp_path)
    reloaded = LotlipModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert reloaded.config.provenance == {"name": "tiny", "seed": 1}
    assert "# tiny" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_copy_can_have_more_provenance(saved_model, tmp_path):
    scores = {"scenes": {"long.text_to_image.r1": 0.5}}
    copy_with_provenance(saved_model[1], tmp_path / "copy", {"scores": scores})
    loaded, _ = load_model(tmp_path / "copy")
    assert loaded.config.provenance == {"name": "tiny", "seed": 1, "scores": scores}
    assert "| long.text_to_image.r1 | 0.5 |" in (tmp_path / "copy" / "README.md").read_text()
    weights = [load_file(folder / "model.safetensors") for folder in (saved_model[1], tmp_path / "copy")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "Not evaluated yet" in (saved_model[1] / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_saved_in_half_precision_is_loaded_and_saved_in_fp32(saved_model, tmp_path, dtype):
    folder, again = tmp_path / "half", tmp_path / "again"
    shutil.copytree(saved_model[1], folder)
    AutoModel.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    loaded, tokenizer = load_model(folder)
    save_whole_model(loaded, tokenizer, again, {})
    for model in (loaded, AutoModel.from_pretrained(again)):
        assert {weight.dtype for weight in model.state_dict().values() if weight.is_floating_point()} == {torch.float32}
    exact = load_file(folder / "model.safetensors")["text.proj.weight"]
    assert exact.dtype == dtype and torch.equal(loaded.text.proj.weight, exact.float())


def save_changed(saved_model: tuple[Any, Path], folder: Path, change: Any) -> Path:
    """A copy of the saved model with changed weights."""
    shutil.copytree(saved_model[1], folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_weights_are_an_error_listing_them(saved_model, tmp_path):
    folder = save_changed(saved_model, tmp_path / "model", lambda weights: weights.pop("text.proj.weight"))
    with pytest.raises(ValueError, match=r"do not fit its config.json: missing keys: text\.proj\.weight"):
        load_model(folder)


def test_unexpected_weights_are_an_error_listing_them(saved_model, tmp_path):
    folder = save_changed(saved_model, tmp_path / "model", lambda weights: weights.update(stranger=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"unexpected keys: stranger; restore"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 24}, r"do not fit its config\.json: mismatched keys: text\.proj\.weight; restore"),
        ({"embed_dim": "x"}, r"cannot be built from its config\.json, .*TypeError: .*; restore"),
        ({"text_config": {"hidden_size": 33}}, r"cannot be built .*not a multiple of the number of attention heads.*"),
        ({"text_config": {"model_type": "other"}}, r"cannot be built .*Unrecognized model identifier: other.*"),
        ({"text_config": {"num_hidden_layers": 9}}, r"missing keys: text\.transformer\..* and \d+ more; restore"),
        ({"image_config": None}, r"do not fit .*missing keys: image\.trunk\..*; unexpected keys: image\..*"),
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_is_an_error_of_one_line(
    saved_model, tmp_path, caplog, monkeypatch, change, message
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = tmp_path / "model"
    shutil.copytree(saved_model[1], folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 900
    assert not caplog.records


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no model: config\.json is missing"):
        load_model(tmp_path)
