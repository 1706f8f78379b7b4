"""Exports: other libraries reproduce the features without this package, and unsupported models are errors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    SiglipModel,
)

from lotlip.core.files import ForeignFileError, read_json
from lotlip.data.tokenizer import TextTokenizer
from lotlip.exporting.export import export
from lotlip.importing.start import StartingModel, open_start
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import load_model, save_whole_model
from lotlip.models.vision.spec import ImageTowerSpec
from tests.conftest import TEXT
from tests.test_cli import program
from tests.test_starting_models import TEXTS, images_of_two_sizes
from tests.tiny_baselines import OPEN_CLIP, SIZE, register_open_clip, save_clip, save_open_clip, save_siglip, spread

CORNERS = 2
Change = Callable[[LotlipConfig], None]


def open_tiny(kind: str, folder: Path) -> StartingModel:
    """A tiny CLIP or SigLIP of transformers, or a tiny CLIP of open_clip."""
    if kind == "open_clip":
        name = register_open_clip(folder, f"export-{folder.name}")
        file = save_open_clip(folder / "theirs", name) / "open_clip_model.safetensors"
        return open_start(f"open_clip:{name}:{file}")
    return open_start(str((save_clip if kind == "clip" else save_siglip)(folder / "theirs")))


def save(start: StartingModel, folder: Path, registers: int = 0, change: Change | None = None) -> Path:
    """Saves a starting model with corner tokens, and with register tokens, whose embeddings are large."""
    config = deepcopy(start.config)
    config.corner_tokens, config.register_tokens = CORNERS, registers
    config.text_config.vocab_size += CORNERS + registers
    if change:
        change(config)
    weights, name = dict(start.read_weights()), "text.transformer.embeddings.token_embedding.weight"
    weights[name] = torch.cat([weights[name], torch.randn(CORNERS + registers, weights[name].shape[1])])
    model = LotlipModel(config)
    bias = {"logit_bias": torch.tensor([-7.0])} if config.logit_bias else {}
    model.load_state_dict({**bias, **weights})
    save_whole_model(model, start.tokenizer, folder, {})
    return folder


def save_tiny(kind: str, folder: Path, **more: Any) -> Path:
    return save(open_tiny(kind, folder), folder / "ours", **more)


def change_image(**changes: Any) -> Change:
    def change(config: LotlipConfig) -> None:
        config.image_config = replace(ImageTowerSpec.from_json(config.image_config), **changes).to_json()

    return change


def features(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """This package's features of `TEXTS`, pixels of the images, and their features."""
    model, tokenizer = load_model(folder)
    ids, lengths = (torch.from_numpy(part) for part in tokenizer(TEXTS))
    pixels = AutoProcessor.from_pretrained(folder)(images=images_of_two_sizes(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.encode_text(ids, lengths)[:, 0], pixels, model.encode_image(pixels)


def assert_exported_to_transformers(ours: Path, out: Path, kind: type) -> None:
    texts, pixels, images = features(ours)
    model: Any = AutoModel.from_pretrained(out).eval()
    assert type(model) is kind
    inputs = AutoProcessor.from_pretrained(out)(
        text=TEXTS, images=images_of_two_sizes(), padding="max_length", truncation=True, return_tensors="pt"
    )
    tokens = AutoTokenizer.from_pretrained(out)(TEXTS, padding="max_length", truncation=True)["input_ids"]
    assert inputs["input_ids"].tolist() == tokens
    assert torch.allclose(inputs["pixel_values"], pixels, atol=2e-2)  # transformers rounds pixels to 8 bits
    with torch.no_grad():
        output = model(**{**inputs, "pixel_values": pixels})
    assert torch.allclose(output.text_embeds, texts, atol=1e-5)
    assert torch.allclose(output.image_embeds, images, atol=1e-5)
    assert torch.allclose(model.logit_scale.exp(), load_model(ours)[0].scale)
    if kind is CLIPModel:  # it reads the width from a different field
        vision = CLIPVisionModelWithProjection.from_pretrained(out).eval()
        with torch.no_grad():
            assert torch.allclose(normalize(vision(pixels).image_embeds, dim=-1), images, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "type_"), [("clip", CLIPModel), ("siglip", SiglipModel), ("open_clip", CLIPModel)])
def test_an_export_to_transformers_keeps_the_features(kind: str, type_: type, tmp_path: Path) -> None:
    ours = save_tiny(kind, tmp_path)
    export(ours, "transformers", tmp_path / "out")
    assert_exported_to_transformers(ours, tmp_path / "out", type_)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_export_to_transformers_can_be_imported_again(kind: str, tmp_path: Path) -> None:
    start = open_tiny(kind, tmp_path)
    export(save(start, tmp_path / "ours"), "transformers", tmp_path / "out")
    reopened = open_start(str(tmp_path / "out"))
    before, after = start.read_weights(), reopened.read_weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reopened.tokenizer.encode(TEXTS) == start.tokenizer.encode(TEXTS)
    assert reopened.config.context_length == start.config.context_length
    assert ImageTowerSpec.from_json(reopened.config.image_config).preprocessing == (
        ImageTowerSpec.from_json(start.config.image_config).preprocessing
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "type_"), [("clip", CLIPModel), ("siglip", SiglipModel)])
def test_another_image_size_and_preprocessing_are_exported(kind: str, type_: type, tmp_path: Path) -> None:
    change = change_image(
        image_size=SIZE + 16,
        resize="squash",
        crop=0.8,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.6, 0.7, 0.8),
    )
    ours = save_tiny(kind, tmp_path, change=change)
    export(ours, "transformers", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["vision_config"]["image_size"] == SIZE + 16
    assert_exported_to_transformers(ours, tmp_path / "out", type_)


def save_siglip_with_timm(folder: Path) -> Path:
    """An open_clip-style model with an image tower of timm and a text tower of SigLIP."""
    start = open_tiny("siglip", folder)
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    spec = ImageTowerSpec(
        "tiny", 32, {"embed_dim": 32, "vision_cfg": vision, "quick_gelu": False}, library="open_clip", pooling="model"
    )
    config = deepcopy(start.config)
    config.image_config = spec.to_json()
    config.text_config.hidden_act = "gelu_pytorch_tanh"
    model = spread(LotlipModel(config))
    save_whole_model(model, start.tokenizer, folder / "ours", {})
    return folder / "ours"


def shorten(config: LotlipConfig) -> None:
    config.context_length -= 4  # fewer tokens than positions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "open_clip", "siglip_with_timm"])
def test_an_export_to_open_clip_keeps_the_features(kind: str, tmp_path: Path) -> None:
    is_siglip = kind == "siglip_with_timm"
    ours = save_siglip_with_timm(tmp_path) if is_siglip else save_tiny(kind, tmp_path, change=shorten)
    export(ours, "open_clip", tmp_path / "out")
    texts, pixels, images = features(ours)
    name = f"local-dir:{tmp_path / 'out'}"
    model, prepare = open_clip.create_model_from_pretrained(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    assert isinstance(tokenizer, open_clip.SimpleTokenizer) == (kind == "open_clip")
    assert torch.allclose(torch.stack([prepare(image) for image in images_of_two_sizes()]), pixels, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(normalize(model.encode_text(tokenizer(TEXTS)), dim=-1), texts, atol=1e-5)
        assert torch.allclose(normalize(model.encode_image(pixels), dim=-1), images, atol=1e-5)
    assert torch.allclose(model.logit_scale.exp(), load_model(ours)[0].scale)
    assert (model.logit_bias is not None) == is_siglip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_an_export_to_open_clip_keeps_the_scale_and_the_bias_when_imported_again(kind: str, tmp_path: Path) -> None:
    def add_bias(config: LotlipConfig) -> None:
        config.logit_bias = True

    ours = save_tiny(kind, tmp_path, change=add_bias)
    export(ours, "open_clip", tmp_path / "out")
    before, after = load_model(ours)[0], open_start(str(tmp_path / "out")).build()
    assert after.logit_bias is not None and torch.equal(after.logit_bias, before.logit_bias)
    assert torch.equal(after.logit_scale, before.logit_scale)


# --- ONNX -----------------------------------------------------------------------------------------------------------


def save_with_new_text_tower(folder: Path, text: dict[str, Any], resize: str = "crop") -> Path:
    """A model of this project's default kind: a BERT-like text tower and an image tower of timm."""
    config = LotlipConfig(
        text_config={**TEXT, **text, "vocab_size": 30522 + CORNERS},
        image_config=ImageTowerSpec("test_vit", 32, resize=resize).to_json(),
        embed_dim=64,
        context_length=32,
        corner_tokens=CORNERS,
    )
    tokenizer = TextTokenizer("bert-base-uncased", 32, CORNERS)
    save_whole_model(spread(LotlipModel(config)), tokenizer, folder / "ours", {})
    return folder / "ours"


MODERN = {
    "model_type": "modernbert",
    "num_hidden_layers": 4,
    "local_attention": 6,
    "pad_token_id": 0,
    "cls_token_id": 101,
    "sep_token_id": 102,
    "bos_token_id": 101,
    "eos_token_id": 102,
}


@pytest.mark.integration
@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(kind, marks=pytest.mark.system) for kind in ("modernbert", "clip", "siglip"))]
)
def test_an_export_to_onnx_keeps_the_features(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if kind == "siglip":
        monkeypatch.setattr("lotlip.exporting.onnx._LARGEST_FILE", 0)  # puts the weights into a second file
    if kind == "bert":
        ours = save_with_new_text_tower(tmp_path, {}, resize="pad")
    elif kind == "modernbert":
        ours = save_with_new_text_tower(tmp_path, MODERN)
    else:
        ours = save_tiny(kind, tmp_path, registers=1)
    out = tmp_path / "out"
    export(ours, "onnx", out)
    assert (out / "text.onnx.data").exists() == (kind == "siglip")
    model, tokenizer = load_model(ours)
    text, image = (onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("text", "image"))
    longest = "the white house is on the tree " * 20
    for captions in ([longest], ["a", "a dog", "a red dog", longest, "the tree"], ["dog"] * 7):
        ids, lengths = tokenizer(captions)
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        features_computed = text.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        with torch.no_grad():
            expected = model.encode_text(torch.from_numpy(ids), torch.from_numpy(lengths))[:, 0]
        np.testing.assert_allclose(features_computed, expected.numpy(), atol=1e-4)
    for number in (1, 5):
        pixels = torch.randn(number, 3, model.image_tower.spec.image_size, model.image_tower.spec.image_size)
        with torch.no_grad():
            expected = model.encode_image(pixels)
        features_computed = image.run(None, {"pixel_values": pixels.numpy()})[0]
        np.testing.assert_allclose(features_computed, expected.numpy(), atol=1e-4)
    about = read_json(out / "export.json")
    assert about["logit_scale"] == pytest.approx(model.scale.item())
    assert about["logit_bias"] == (0 if model.logit_bias is None else pytest.approx(model.logit_bias.item()))
    pads = kind == "bert"
    assert (about["image"]["resize"] == "pad") == pads
    assert (out / "preprocessor_config.json").exists() != pads
    assert ("transformers cannot pad" in (out / "README.md").read_text()) == pads


# --- without this package -------------------------------------------------------------------------------------------

# Reads exports without this package: importing `lotlip` or `flows` fails.
ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lotlip", "flows", "tests"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
for name in ("lotlip", "flows"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported")

import json
import numpy as np, open_clip, onnxruntime, torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

texts, folders = json.loads(sys.argv[1]), sys.argv[2:]
images = [Image.open(f"image-{number}.png") for number in range(2)]
expected = {folder: np.load(f"{folder}.npz") for folder in folders}

def check(folder, text_features, image_features, tolerance):
    # libraries may round pixels to 8 bits, so image features differ more
    for name, features, allowed in (("texts", text_features, tolerance), ("images", image_features, 1e-2)):
        difference = np.abs(np.asarray(features) - expected[folder][name]).max()
        assert difference < allowed, (folder, name, difference)

with torch.no_grad():
    for folder in folders:
        pixels = torch.from_numpy(expected[folder]["pixels"])
        if folder.startswith("transformers"):
            model = AutoModel.from_pretrained(folder).eval()
            processor = AutoProcessor.from_pretrained(folder)
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            output = model(**processor(text=texts, images=images, **options))
            check(folder, output.text_embeds, output.image_embeds, 1e-5)
            exact = model(**processor(text=texts, **options), pixel_values=pixels).image_embeds
        elif folder.startswith("open_clip"):
            model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
            model.eval()
            ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
            image_features = model.encode_image(torch.stack([prepare(image) for image in images]), normalize=True)
            check(folder, model.encode_text(ids, normalize=True), image_features, 1e-5)
            exact = model.encode_image(pixels, normalize=True)
        else:
            tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
            encoded = tokenizer.encode_batch(texts)
            inputs = {name: np.array([getattr(text, kind) for text in encoded])
                      for name, kind in (("input_ids", "ids"), ("attention_mask", "attention_mask"))}
            prepared = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="np")["pixel_values"]
            image_tower = onnxruntime.InferenceSession(f"{folder}/image.onnx")
            text_tower = onnxruntime.InferenceSession(f"{folder}/text.onnx")
            check(folder, text_tower.run(None, inputs)[0], image_tower.run(None, {"pixel_values": prepared})[0], 1e-4)
            exact = image_tower.run(None, {"pixel_values": pixels.numpy()})[0]
        difference = np.abs(np.asarray(exact) - expected[folder]["images"]).max()
        assert difference < (1e-4 if folder.startswith("onnx") else 1e-5), (folder, difference)
assert not any(name.partition(".")[0] == "lotlip" for name in sys.modules)
print("checked", len(folders))
"""


@pytest.mark.system
def test_exports_work_without_this_package(tmp_path: Path) -> None:
    """Exports give the model's features in a process that cannot import this package.

    It uses the installed packages, because a virtual environment with torch and transformers takes gigabytes.
    """
    kinds = {
        "transformers-clip": save_tiny("clip", make_folder(tmp_path / "clip")),
        "transformers-siglip": save_tiny("siglip", make_folder(tmp_path / "siglip")),
        "open_clip": save_tiny("open_clip", make_folder(tmp_path / "open_clip-model")),
        "onnx": save_with_new_text_tower(tmp_path, {}),
    }
    for name, ours in kinds.items():
        export(ours, name.partition("-")[0], tmp_path / name)  # type: ignore[arg-type]
        texts, pixels, images = features(ours)
        np.savez(tmp_path / f"{name}.npz", texts=texts.numpy(), pixels=pixels.numpy(), images=images.numpy())
    for number, image in enumerate(images_of_two_sizes()):
        image.save(tmp_path / f"image-{number}.png")
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(TEXTS), *kinds],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip().endswith(f"checked {len(kinds)}")


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- unsupported models ---------------------------------------------------------------------------------------------


def assert_not_exported(ours: Path, to: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(ours, to, ours.with_name("not-exported"))
    assert not ours.with_name("not-exported").exists()


@pytest.mark.slow
def test_a_model_with_a_bert_is_exported_to_onnx_only(tmp_path: Path) -> None:
    ours = save_with_new_text_tower(tmp_path, {})
    message = (
        "has no class for this model: its text tower is of type bert, .* use --to onnx, .* AutoModel after `import"
    )
    assert_not_exported(ours, "transformers", message)
    assert_not_exported(ours, "open_clip", message)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_a_feature_that_depends_on_extra_tokens_is_not_exported(to: Any, tmp_path: Path) -> None:
    assert_not_exported(
        save_tiny("clip", make_folder(tmp_path / "clip"), registers=1), to, "depends on the model's 1 register"
    )

    def without_mask(config: LotlipConfig) -> None:
        config.corner_mask = False

    ours = save_tiny("siglip", make_folder(tmp_path / "siglip"), change=without_mask)
    assert_not_exported(ours, to, "without the corner mask, so the text's feature depends on its 2 corner tokens")


@pytest.mark.slow
def test_a_clip_without_the_corner_mask_is_exported(tmp_path: Path) -> None:
    def without_mask(config: LotlipConfig) -> None:
        config.corner_mask = False

    ours = save_tiny("clip", tmp_path, change=without_mask)
    export(ours, "transformers", tmp_path / "out")
    assert_exported_to_transformers(ours, tmp_path / "out", CLIPModel)


@pytest.mark.slow
def test_late_interaction_is_not_exported(tmp_path: Path) -> None:
    def use_late_interaction(config: LotlipConfig) -> None:
        config.similarity = "late-interaction"

    ours = save_tiny("clip", tmp_path, change=use_late_interaction)
    for to in ("transformers", "open_clip", "onnx"):
        assert_not_exported(ours, to, "similarity of this model is late-interaction, which compares tokens")


@pytest.mark.slow
def test_unsupported_features_of_a_library_are_errors(tmp_path: Path) -> None:
    ours = save_tiny("clip", make_folder(tmp_path / "pad"), change=change_image(resize="pad"))
    assert_not_exported(ours, "transformers", "padded to a square, which no processor of transformers does")
    assert_not_exported(ours, "open_clip", r"cannot prepare images as this model needs \(resize pad")
    siglip = save_tiny("siglip", make_folder(tmp_path / "siglip"))
    assert_not_exported(siglip, "open_clip", "cannot build the image tower siglip_vision_model .* --to transformers")
    assert_not_exported(
        save_siglip_with_timm(make_folder(tmp_path / "timm")), "transformers", "needs the SigLIP image tower"
    )

    def use_gelu(config: LotlipConfig) -> None:
        config.text_config.hidden_act = "gelu"

    ours = save_tiny("clip", make_folder(tmp_path / "gelu"), change=use_gelu)
    assert_not_exported(ours, "open_clip", r"activations of the towers are gelu \(text\) and quick_gelu \(image\)")


@pytest.mark.slow
def test_a_vit_that_differs_from_clips_is_not_exported_to_transformers(tmp_path: Path) -> None:
    start = open_tiny("open_clip", tmp_path)
    config = deepcopy(start.config)
    kwargs = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "no_ln_pre": True}}
    change_image(kwargs=kwargs)(config)
    save_whole_model(LotlipModel(config), start.tokenizer, tmp_path / "ours", {})
    assert_not_exported(
        tmp_path / "ours", "transformers", r"not built as CLIP's: no ln_pre\.weight, no ln_pre\.bias; use"
    )


def test_a_missing_package_is_an_error_naming_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = save_tiny("clip", tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "lotlip.exporting.onnx.find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    assert_not_exported(ours, "onnx", r"needs onnxscript: pip install 'lotlip\[export\]'")


@pytest.mark.slow
def test_an_export_with_different_features_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = save_tiny("clip", tmp_path)
    monkeypatch.setattr("lotlip.exporting.export.TOLERANCE", 1e-12)
    assert_not_exported(ours, "transformers", "features of the export differ from those of")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_replaces_only_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, out = save_tiny("clip", tmp_path), tmp_path / "out"
    assert program(monkeypatch, "export", ours, "--to", "transformers", "--out", out) == 0
    assert f"written to {out}" in capsys.readouterr().out
    assert "AutoProcessor" in (out / "README.md").read_text()
    message = program(monkeypatch, "export", ours, "--to", "transformers", "--out", out)
    assert "is not empty" in str(message) and "--force" in str(message)
    assert program(monkeypatch, "export", ours, "--to", "open_clip", "--out", out, "--force") == 0
    assert not (out / "model.safetensors").exists()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ForeignFileError, match="mine"):
        export(ours, "transformers", out, force=True)
    # models of training and imports have a record, too
    imported = save_tiny("siglip", make_folder(tmp_path / "siglip"))
    with pytest.raises(ValueError, match="has a model that is not an export"):
        export(ours, "transformers", imported, force=True)
    with pytest.raises(ValueError, match="contains the input"):
        export(ours, "transformers", ours, force=True)
