"""Trains the demo's image tower on scenes of its own."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lotlip.data.images import MEAN, STD
from lotlip.demo.world import attribute_classes, attribute_labels, generate_scene, render
from lotlip.image_tower.config import SceneTowerConfig
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.image_tower import ImageTower, ImageTowerSpec, build_image_tower

# Scenes for the accuracies, beyond those for training.
_MAX_HELD_OUT = 1000
# A worker process takes as long to start as drawing some hundred scenes.
_SCENES_PER_WORKER = 1000


def train_image_tower(config: SceneTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Trains a small ViT to tell the attributes of scenes from its [CLS] feature.

    The scenes are a stream of their own ("tower"), so that the tower has seen none of those it will be asked about.

    Args:
        config: sizes and schedule; equal values give equal weights on one machine.
        on_progress: called with (step, steps, loss) once in 10 steps.

    Raises:
        ValueError: there are fewer scenes than a batch has.
    """
    if config.scenes < config.batch_size:
        raise ValueError(
            f"image_tower.scenes is {config.scenes}, less than one batch (image_tower.batch_size {config.batch_size})"
        )
    spec = scenes_spec(config)
    held_out = min(config.scenes, _MAX_HELD_OUT)
    pixels, labels = _draw(_Scenes(config.seed, config.scenes + held_out, config.image_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tower = build_image_tower(spec)
        heads = _Heads(tower.width)
        history = _fit(tower, heads, pixels[: config.scenes], labels[: config.scenes], config, on_progress)
    tower.eval()
    accuracy = _accuracy(tower, heads, pixels[config.scenes :], labels[config.scenes :])
    return TowerResult(tower, config.scenes * config.epochs, accuracy, history)


def scenes_spec(config: SceneTowerConfig) -> ImageTowerSpec:
    """What the demo's tower is built from."""
    kwargs = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    return ImageTowerSpec("vit_scenes", config.image_size, kwargs, resize=config.resize)


class _Heads(nn.Module):
    """Linear classifiers of all attributes, in one matrix.

    Attributes:
        kinds: kind → (labels of that kind, classes of each).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = {kind: (len(labels), max(labels.values())) for kind, labels in attribute_classes().items()}
        self.linear = nn.Linear(width, sum(count * classes for count, classes in self.kinds.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Features [B, D] → for each kind its logits [B, labels, classes]."""
        parts = self.linear(features).split([count * classes for count, classes in self.kinds.values()], dim=1)
        shapes = zip(self.kinds.items(), parts, strict=True)
        return {kind: part.unflatten(1, size) for (kind, size), part in shapes}

    def by_kind(self, labels: Tensor) -> dict[str, Tensor]:
        """Labels [B, all] → for each kind its own [B, labels]."""
        return dict(zip(self.kinds, labels.split([count for count, _ in self.kinds.values()], dim=1), strict=True))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, the mean over all labels."""
        truth = self.by_kind(labels)
        losses = [
            F.cross_entropy(part.flatten(0, 1), truth[kind].flatten()) * part.shape[1]
            for kind, part in self(features).items()
        ]
        return torch.stack(losses).sum() / labels.shape[1]


def _fit(
    tower: ImageTower,
    heads: _Heads,
    pixels: Tensor,
    labels: Tensor,
    config: SceneTowerConfig,
    on_progress: OnProgress | None,
) -> list[tuple[int, float]]:
    model = nn.ModuleList([tower, heads])
    batches = len(pixels) // config.batch_size
    steps = batches * config.epochs
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps, pct_start=0.1)
    history: list[tuple[int, float]] = []
    # where the CPU multiplies bf16 itself that is twice as fast; where it does not, ten times slower
    rounded = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    tower.train()
    for step in range(1, steps + 1):
        if (step - 1) % batches == 0:
            order = torch.randperm(len(pixels))
        start = (step - 1) % batches * config.batch_size
        chosen = order[start : start + config.batch_size]
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            features = tower(_normalised(pixels[chosen]))
        loss = heads.loss(features.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            history.append((step, loss.item()))
            if on_progress is not None:
                on_progress(step, steps, loss.item())
    return history


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _normalised(pixels: Tensor) -> Tensor:
    shift = torch.tensor(MEAN)[:, None, None]
    scale = torch.tensor(STD)[:, None, None]
    return ((pixels.float() / 255 - shift) / scale).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _accuracy(tower: ImageTower, heads: _Heads, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    features = torch.cat([tower(_normalised(part)) for part in pixels.split(250)])
    truth = heads.by_kind(labels)
    accuracy = {}
    for kind, logits in heads(features).items():
        right = logits.argmax(-1) == truth[kind]
        # A shape that no small object has, has no colour to tell.
        accuracy[kind] = (right[truth[kind] > 0] if kind.endswith("by shape") else right).float().mean().item()
    return accuracy


class _Scenes(Dataset[tuple[Tensor, Tensor]]):
    """The tower's own scenes: pixels uint8 [3, size, size] and labels int64 [attributes]."""

    def __init__(self, seed: int, count: int, size: int) -> None:
        self._seed, self._count, self._size = seed, count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        scene = generate_scene(self._seed, "tower", number)
        pixels = torch.from_numpy(np.array(render(scene, self._size))).permute(2, 0, 1)
        return pixels, torch.tensor(attribute_labels(scene))


def _draw(scenes: _Scenes) -> tuple[Tensor, Tensor]:
    """Draws scenes on all cores: pixels uint8 [N, 3, size, size], labels int64 [N, attributes]."""
    workers = min(len(os.sched_getaffinity(0)), len(scenes) // _SCENES_PER_WORKER)
    pixels, labels = zip(*DataLoader(scenes, batch_size=100, num_workers=workers), strict=True)
    return torch.cat(pixels), torch.cat(labels)
