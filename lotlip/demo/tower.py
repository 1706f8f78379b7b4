"""Trains the demo's image tower on generated scenes."""

from __future__ import annotations

import os
import threading

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from lotlip.data.images import MEAN, STD
from lotlip.demo.world import SMALL_OBJECTS, attribute_classes, attribute_labels, generate_scene, render
from lotlip.image_tower.config import SceneTowerConfig
from lotlip.image_tower.towers import OnProgress, TowerResult
from lotlip.models.vision.image_tower import ImageTower, build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec

# Maximum number of held-out scenes, on which accuracy is measured.
_MAX_HELD_OUT = 1000
# Starting a worker process takes as long as drawing several hundred scenes.
_SCENES_PER_WORKER = 1000


def train_image_tower(config: SceneTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Trains a small ViT to classify the attributes of scenes from its [CLS] feature.

    The scenes come from a separate random stream ("tower"), so none of them occurs in training or evaluation later.

    Args:
        config: sizes and schedule; equal values give equal weights on the same machine.
        on_progress: called with (step, steps, loss) once per 10 steps.

    Raises:
        ValueError: there are fewer scenes than the batch size.
    """
    if config.scenes < config.batch_size:
        raise ValueError(
            f"image_tower.scenes is {config.scenes}, fewer than image_tower.batch_size {config.batch_size}; "
            "raise image_tower.scenes or lower image_tower.batch_size"
        )
    spec = scenes_spec(config)
    held_out = min(config.scenes, _MAX_HELD_OUT)
    pixels, labels = _draw_scenes(
        _Scenes(config.seed, config.scenes + held_out, config.image_size, config.small_objects)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tower = build_image_tower(spec)
        heads = _AttributeHeads(tower.width)
        history = _fit(tower, heads, pixels[: config.scenes], labels[: config.scenes], config, on_progress)
    tower.eval()
    accuracy = _accuracy(tower, heads, pixels[config.scenes :], labels[config.scenes :])
    return TowerResult(tower, config.scenes * config.epochs, accuracy, history)


def scenes_spec(config: SceneTowerConfig) -> ImageTowerSpec:
    """Returns the specification of the demo's tower."""
    kwargs = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    return ImageTowerSpec("vit_scenes", config.image_size, kwargs, resize=config.resize)


class _AttributeHeads(nn.Module):
    """Linear classifiers of all attributes, in one matrix.

    Attributes:
        kinds: kind of attribute → (number of labels, number of classes of each label).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = {kind: (len(labels), max(labels.values())) for kind, labels in attribute_classes().items()}
        self.linear = nn.Linear(width, sum(count * classes for count, classes in self.kinds.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Returns the logits [B, labels, classes] of each kind for features [B, D]."""
        parts = self.linear(features).split([count * classes for count, classes in self.kinds.values()], dim=1)
        shapes = zip(self.kinds.items(), parts, strict=True)
        return {kind: part.unflatten(1, size) for (kind, size), part in shapes}

    def by_kind(self, labels: Tensor) -> dict[str, Tensor]:
        """Splits labels [B, all] by kind, into [B, labels] each."""
        return dict(zip(self.kinds, labels.split([count for count, _ in self.kinds.values()], dim=1), strict=True))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross-entropy, averaged over all labels."""
        truth = self.by_kind(labels)
        losses = [
            F.cross_entropy(part.flatten(0, 1), truth[kind].flatten()) * part.shape[1]
            for kind, part in self(features).items()
        ]
        return torch.stack(losses).sum() / labels.shape[1]


def _fit(
    tower: ImageTower,
    heads: _AttributeHeads,
    pixels: Tensor,
    labels: Tensor,
    config: SceneTowerConfig,
    on_progress: OnProgress | None,
) -> list[tuple[int, float]]:
    model = nn.ModuleList([tower, heads])
    batches = len(pixels) // config.batch_size
    steps = batches * config.epochs
    optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps, pct_start=0.1)
    history: list[tuple[int, float]] = []
    # bf16 is twice as fast on CPUs that support it in hardware, and ten times slower on others. The backward pass of
    # fused attention in bf16 would take 40 % of a step.
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    tower.train()
    for step in range(1, steps + 1):
        if (step - 1) % batches == 0:
            order = torch.randperm(len(pixels))
        start = (step - 1) % batches * config.batch_size
        indices = order[start : start + config.batch_size]
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = tower(_normalise(pixels[indices]))
        loss = heads.loss(features.float(), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            history.append((step, loss.item()))
            if on_progress is not None:
                on_progress(step, steps, loss.item())
    return history


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _normalise(pixels: Tensor) -> Tensor:
    shift = torch.tensor(MEAN)[:, None, None]
    scale = torch.tensor(STD)[:, None, None]
    return ((pixels.float() / 255 - shift) / scale).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _accuracy(tower: ImageTower, heads: _AttributeHeads, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    features = torch.cat([tower(_normalise(part)) for part in pixels.split(250)])
    truth = heads.by_kind(labels)
    accuracy = {}
    for kind, logits in heads(features).items():
        correct = logits.argmax(-1) == truth[kind]
        # Class 0 means that no small object has this shape; there is no colour to classify.
        accuracy[kind] = (correct[truth[kind] > 0] if kind.endswith("by shape") else correct).float().mean().item()
    return accuracy


class _Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes to train the tower on: pixels uint8 [3, size, size] and labels int64 [attributes]."""

    def __init__(self, seed: int, count: int, size: int, small_objects: tuple[int, int] = SMALL_OBJECTS) -> None:
        self._seed, self._count, self._size, self._small_objects = seed, count, size, small_objects

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        scene = generate_scene(self._seed, "tower", number, self._small_objects)
        pixels = torch.from_numpy(np.array(render(scene, self._size))).permute(2, 0, 1)
        return pixels, torch.tensor(attribute_labels(scene))


def _draw_scenes(scenes: _Scenes) -> tuple[Tensor, Tensor]:
    """Draws scenes on all cores: pixels uint8 [N, 3, size, size], labels int64 [N, attributes]."""
    workers = min(len(os.sched_getaffinity(0)), len(scenes) // _SCENES_PER_WORKER)
    loader = DataLoader(scenes, batch_size=100, num_workers=workers, worker_init_fn=_forget_threads)
    pixels, labels = zip(*loader, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def _forget_threads(_: int) -> None:
    """Drops the exit handlers of threads that a forked worker does not have.

    Prefect's handlers fail there, and the loader takes the worker's exit status for a crash.
    """
    threading._threading_atexits.clear()  # type: ignore[attr-defined]
