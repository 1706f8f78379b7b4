"""The image tower: parity with the released code, saving and loading, and the demo's training."""

from __future__ import annotations

import io
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lotlip.data.images import RESIZES, image_transform
from lotlip.demo.tower import _draw_scenes, _Scenes, scenes_spec, train_image_tower
from lotlip.demo.world import attribute_classes
from lotlip.image_tower.config import SceneTowerConfig, TimmTowerConfig
from lotlip.image_tower.timm import timm_tower
from lotlip.models.vision.image_tower import build_image_tower, load_image_tower, save_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.pretrain.config import ImageTowerTraining
from lotlip.pretrain.trainer import Trainer
from lotlip.shard.features import frozen_features

PARITY = Path(__file__).parent / "data" / "parity"
TINY = ImageTowerSpec("vit_scenes", 32, {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2})


@pytest.mark.parametrize("case", ["m0", "m2"])
def test_features_equal_the_released_code(case: str) -> None:
    prefix = "module.visual.trunk."
    weights = dict(np.load(PARITY / case / "weights.npz"))
    tower = build_image_tower(ImageTowerSpec("test_vit", 160)).eval()
    trunk = {name.removeprefix(prefix): torch.from_numpy(weights[name]) for name in weights if name.startswith(prefix)}
    tower.trunk.load_state_dict(trunk)
    expected = load_file(PARITY / case / "expected.safetensors")
    with torch.inference_mode():
        features = tower(expected["pixel_values"])
    torch.testing.assert_close(F.normalize(features, dim=-1), expected["image_features"], atol=1e-5, rtol=1e-4)


def test_a_tower_is_loaded_as_saved(tmp_path: Path) -> None:
    tower = build_image_tower(TINY).eval()
    save_image_tower(tower, tmp_path / "tower")
    loaded = load_image_tower(tmp_path / "tower")
    assert loaded.spec == TINY
    assert loaded.width == 16
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), tower(images))


@pytest.mark.parametrize("resize", RESIZES)
def test_features_for_shards_and_pixels_for_training_follow_the_resize_mode(tmp_path: Path, resize: str) -> None:
    spec = replace(TINY, resize=resize)
    tower = build_image_tower(spec).eval()
    save_image_tower(tower, tmp_path / "tower")
    noise = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    image, file = Image.fromarray(noise), io.BytesIO()
    image.save(file, "PNG")
    pixels = image_transform(32, resize=resize)(image)
    with torch.inference_mode():
        expected = tower(torch.from_numpy(pixels)[None]).numpy()
    np.testing.assert_allclose(frozen_features(tmp_path / "tower")([image]), expected, atol=1e-6)
    job, config = SimpleNamespace(image_tower=tmp_path / "tower"), SimpleNamespace(image_tower=ImageTowerTraining())
    _, transform = Trainer._open_image_tower(SimpleNamespace(job=job, config=config))  # type: ignore[arg-type]
    assert np.array_equal(transform(file.getvalue(), random.Random(0)), pixels)


def test_a_tower_saved_without_a_resize_mode_crops() -> None:
    older = {name: value for name, value in TINY.to_json().items() if name != "resize"}
    assert ImageTowerSpec.from_json(older) == TINY
    assert TINY.resize == "crop"


def test_an_unknown_resize_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown resize mode 'stretch'"):
        ImageTowerSpec.from_json({**TINY.to_json(), "resize": "stretch"})


def test_the_configured_resize_mode_is_saved_with_the_tower(tmp_path: Path) -> None:
    assert scenes_spec(SceneTowerConfig(kind="scenes", resize="pad")).resize == "pad"
    save_file(build_image_tower(ImageTowerSpec("test_vit", 32)).trunk.state_dict(), tmp_path / "vit.safetensors")
    config = TimmTowerConfig(
        kind="timm", model="test_vit", image_size=32, checkpoint=tmp_path / "vit.safetensors", resize="squash"
    )
    assert timm_tower(config).spec.resize == "squash"


def test_a_missing_tower_is_an_error_naming_its_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the image_tower stage"):
        load_image_tower(tmp_path)


def test_weights_of_another_tower_are_an_error(tmp_path: Path) -> None:
    save_image_tower(build_image_tower(TINY), tmp_path / "tower")
    other = ImageTowerSpec("vit_scenes", 32, {**TINY.kwargs, "embed_dim": 32})
    save_file(build_image_tower(other).state_dict(), tmp_path / "tower" / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit.*model \(.*file \("):
        load_image_tower(tmp_path / "tower")


@pytest.mark.parametrize(("model", "reason"), [("vit_nothing", "no model"), ("resnet18", r"no \[CLS\] token")])
def test_a_model_that_cannot_be_built_is_an_error(model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_image_tower(ImageTowerSpec(model, 64))


def test_a_timm_tower_takes_a_local_checkpoint(tmp_path: Path) -> None:
    trunk = build_image_tower(ImageTowerSpec("test_vit", 64)).trunk
    weights = {name: torch.randn_like(value) for name, value in trunk.state_dict().items()}
    save_file({**weights, "head.weight": torch.zeros(1000, 64)}, tmp_path / "model.safetensors")
    tower = timm_tower(
        TimmTowerConfig(kind="timm", model="test_vit", checkpoint=tmp_path / "model.safetensors", image_size=64)
    )
    assert not tower.training
    torch.testing.assert_close(tower.trunk.state_dict()["norm.weight"], weights["norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("mean", [None, (0.1, 0.2, 0.3)])
def test_the_normalisation_of_a_model_is_the_default(tmp_path: Path, mean: Any) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"  # trained with mean 0.5, unlike CLIP
    save_file(build_image_tower(ImageTowerSpec(name, 32)).trunk.state_dict(), tmp_path / "vit.safetensors")
    tower = timm_tower(
        TimmTowerConfig(kind="timm", model=name, checkpoint=tmp_path / "vit.safetensors", image_size=32, mean=mean)
    )
    assert (tower.spec.mean, tower.spec.std) == (mean or (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    save_image_tower(tower, tmp_path / "tower")
    assert load_image_tower(tmp_path / "tower").spec == tower.spec


def test_a_norm_named_like_the_classifier_is_kept(tmp_path: Path) -> None:
    trunk = build_image_tower(ImageTowerSpec("test_convnext", 64, pooling="model")).trunk
    weights = {name: torch.randn_like(value) for name, value in trunk.state_dict().items()}
    save_file({**weights, "head.fc.weight": torch.zeros(1000, 64)}, tmp_path / "model.safetensors")
    tower = timm_tower(TimmTowerConfig(kind="timm", model="test_convnext", checkpoint=tmp_path / "model.safetensors"))
    assert "head.norm.weight" in weights
    torch.testing.assert_close(tower.trunk.state_dict()["head.norm.weight"], weights["head.norm.weight"])


def test_hub_weights_have_the_configured_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, str | None]] = []

    def download(repo_id: str, *_: Any, revision: str | None = None, **__: Any) -> None:
        requests.append((repo_id, revision))
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    settings = {"kind": "timm", "model": "vit_tiny_patch16_224.augreg_in21k"}
    with pytest.raises(ValueError, match="no route to host"):
        timm_tower(TimmTowerConfig(**settings, revision="0123456789" * 4))
    assert set(requests) == {("timm/vit_tiny_patch16_224.augreg_in21k", "0123456789" * 4)}
    with pytest.raises(ValueError, match=r"test_vit4 are not on the hub"):
        timm_tower(TimmTowerConfig(kind="timm", model="test_vit4", revision="0123456789" * 4))
    with pytest.raises(ValidationError, match="checkpoint is a local file"):
        TimmTowerConfig(**settings, revision="0123456789" * 4, checkpoint="vit.safetensors")
    with pytest.raises(ValidationError, match="revision"):
        TimmTowerConfig(**settings, revision="main")


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_tower\.checkpoint.*nowhere"):
        timm_tower(TimmTowerConfig(kind="timm", model="test_vit", checkpoint=tmp_path / "nowhere", image_size=64))


def test_an_unreachable_hub_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*image_tower\.checkpoint"):
        timm_tower(TimmTowerConfig(kind="timm", model="test_vit"))


# --- the demo's training ------------------------------------------------------------------------------------------

SMALL = SceneTowerConfig(
    kind="scenes", scenes=256, width=32, depth=1, heads=2, patch_size=16, image_size=32, epochs=5, batch_size=32
)


@pytest.mark.integration
def test_training_learns_and_is_reproducible() -> None:
    progress: list[tuple[int, int, float]] = []
    first = train_image_tower(SMALL, lambda *step: progress.append(step))
    repeated = train_image_tower(SMALL)
    assert progress[-1][:2] == (40, 40)
    assert [(step, loss) for step, _, loss in progress] == first.history == repeated.history
    assert first.history[-1][1] < first.history[0][1]
    assert first.accuracy == repeated.accuracy
    assert not first.tower.training
    for name, value in first.tower.state_dict().items():
        torch.testing.assert_close(value, repeated.tower.state_dict()[name], rtol=0, atol=0)


@pytest.mark.integration
def test_accuracy_is_reported_for_each_attribute() -> None:
    result = train_image_tower(SMALL.model_copy(update={"epochs": 1}))
    salient = {f"salient {attribute}" for attribute in ("shape", "colour", "texture", "size")}
    small = {f"small {attribute}" for attribute in ("shape", "colour", "texture", "position", "colour by shape")}
    assert set(result.accuracy) == {"place", "time"} | salient | small
    assert all(0 <= share <= 1 for share in result.accuracy.values())


def test_fewer_scenes_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scenes is 16.*batch_size 32"):
        train_image_tower(SMALL.model_copy(update={"scenes": 16}))


def test_the_scenes_have_the_number_of_small_objects_asked_for() -> None:
    kinds = attribute_classes()
    first = sum(len(labels) for kind, labels in kinds.items() if kind != "small colour by shape")
    first -= len(kinds["small position"])
    _, labels = _draw_scenes(_Scenes(seed=1, count=20, size=32, small_objects=(7, 8)))
    positions = labels[:, first : first + len(kinds["small position"])].sum(dim=1)
    assert set(positions.tolist()) == {7, 8}


@pytest.mark.integration
def test_scenes_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = _Scenes(seed=1, count=250, size=32)
    pixels, labels = _draw_scenes(scenes)
    monkeypatch.setattr("lotlip.demo.tower._SCENES_PER_WORKER", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    parallel, parallel_labels = _draw_scenes(scenes)
    assert pixels.shape == (250, 3, 32, 32) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, parallel) and torch.equal(labels, parallel_labels)


@pytest.mark.integration
def test_scenes_are_drawn_where_exit_handlers_of_threads_fail_in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Prefect's do: its threads do not exist in a fork."""
    parent = os.getpid()

    def fail_in_a_fork() -> None:
        assert os.getpid() == parent

    monkeypatch.setattr(threading, "_threading_atexits", [fail_in_a_fork])
    monkeypatch.setattr("lotlip.demo.tower._SCENES_PER_WORKER", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    pixels, _ = _draw_scenes(_Scenes(seed=1, count=250, size=32))
    assert len(pixels) == 250
