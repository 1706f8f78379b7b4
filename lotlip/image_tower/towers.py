"""Selects the implementation that builds the image tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lotlip.core.variants import implementation
from lotlip.image_tower.config import ImageTowerConfig
from lotlip.models.vision.image_tower import ImageTower
from lotlip.models.vision.spec import ImageTowerSpec

_BUILT_IN = {
    "scenes": "lotlip.demo.tower:train_image_tower",
    "timm": "lotlip.image_tower.timm:pretrained_tower",
    "packaged": "lotlip.image_tower.packaged:packaged_tower",
    "transformers": "lotlip.image_tower.transformers:pretrained_tower",
    "open_clip": "lotlip.image_tower.open_clip:pretrained_tower",
}

# What each kind builds, without building it.
SPECIFICATIONS = {
    "scenes": "lotlip.demo.tower:scenes_spec",
    "timm": "lotlip.image_tower.timm:timm_spec",
    "packaged": "lotlip.image_tower.packaged:packaged_spec",
    "transformers": "lotlip.image_tower.transformers:transformers_spec",
    "open_clip": "lotlip.image_tower.open_clip:open_clip_spec",
}

OnProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TowerResult:
    """An image tower that is ready to be frozen.

    Attributes:
        tower: in evaluation mode.
        samples: number of images that it was trained on here; an image counts once per epoch.
        accuracy: attribute → accuracy on held-out scenes. Attributes of small objects use scenes that have some.
        history: (step, loss), once per 10 steps.
    """

    tower: ImageTower
    samples: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)


def make_tower(settings: ImageTowerConfig, on_progress: OnProgress | None = None) -> TowerResult:
    """Builds the image tower that `image_tower` of params.yaml describes.

    Args:
        settings: the stage's settings.
        on_progress: called with (step, steps, loss) from time to time if the tower is trained here.

    Raises:
        ValueError: the settings, the weights or the entry point cannot be used.
    """
    return implementation("lotlip.image_towers", settings.kind, _BUILT_IN)(settings, on_progress)


def tower_spec(settings: ImageTowerConfig) -> ImageTowerSpec:
    """Returns the specification of the tower that `make_tower` builds. Nothing is downloaded.

    Raises:
        ValueError: the settings cannot be used, or the model's configuration is not available locally.
    """
    return implementation("lotlip.image_towers", settings.kind, SPECIFICATIONS)(settings)
