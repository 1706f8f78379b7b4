"""Settings of the image-tower stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from lotlip.core.section import Commit, Count, Positive, Section, Seed, Share
from lotlip.core.variants import Variants
from lotlip.data.models import LOCAL
from lotlip.data.scenes import SceneObjects

# Names as in `lotlip.data.images.RESIZES`.
Resize = Literal["crop", "squash", "pad"]
# Names as in `lotlip.data.images.INTERPOLATIONS`.
Interpolation = Literal["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"]
# Names as in `lotlip.models.vision.spec.POOLINGS`.
Pooling = Literal["model", "token", "mean", "token+mean", "map"]


def _of_pixels_in_0_to_1(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{list(values)} is outside 0..1, but pixels are 0..1; divide values for 0..255 by 255")
    return values


def _above_0(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(values):
        raise ValueError(f"{list(values)} has a 0, by which pixels cannot be divided; null: as the model was trained")
    return values


Means = Annotated[tuple[float, float, float], AfterValidator(_of_pixels_in_0_to_1)]
Deviations = Annotated[Means, AfterValidator(_above_0)]

_RESIZE = (
    "how an image becomes a square. crop: resize the shorter side and keep the centre, as in the released code; "
    "squash: resize both sides, which changes the aspect ratio; pad: resize the longer side and add bars in the mean "
    "colour"
)


class SceneTowerConfig(SceneObjects):
    """A small ViT that is trained to classify attributes of generated scenes; it replaces ImageNet-21k pretraining."""

    kind: Literal["scenes"]
    scenes: Count = Field(12000, description="number of generated scenes to train on")
    seed: Seed = Field(1, description="seed of these scenes and of the initial weights")
    width: Count = Field(128, description="width of the image feature")
    depth: Count = Field(2, description="number of transformer layers")
    heads: Count = Field(8, description="number of attention heads; must divide width")
    patch_size: Count = Field(16, description="side of a patch in pixels; a power of two")
    image_size: Annotated[int, Field(ge=32, le=512)] = Field(64, description="side of an image in pixels")
    resize: Resize = Field("crop", description=_RESIZE)
    epochs: Count = Field(5, description="number of passes over the scenes")
    batch_size: Count = Field(64, description="images per training step")
    learning_rate: Positive = Field(2e-3, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="AdamW's weight decay")
    min_accuracy: Share = Field(
        0.6, description="minimum accuracy, averaged over attributes, on held-out scenes; a lower one fails the gate"
    )

    @model_validator(mode="after")
    def _divisible(self) -> SceneTowerConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}; change one of them")
        if self.patch_size.bit_count() != 1:
            raise ValueError(f"patch_size {self.patch_size} is not a power of two")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}; lower it")
        return self


class PretrainedTowerConfig(Section):
    """Settings of all pretrained image towers; null: as the model was trained."""

    pooling: Pooling = Field(
        "model",
        description="how the image's feature is computed. model: as the model's library does it, projection included; "
        "token: the [CLS] token after the last norm; mean: the mean of the patches; token+mean: both concatenated, "
        "which doubles the width; map: the model's attention pooling",
    )
    image_size: Annotated[int, Field(ge=32, le=1024)] | None = Field(None, description="side of an image in pixels")
    resize: Resize | None = Field(None, description=_RESIZE)
    interpolation: Interpolation | None = Field(None, description="filter that resizes pictures")
    crop: Annotated[float, Field(ge=0.1, le=1)] | None = Field(
        None, description="fraction of the resized image's sides that is kept, from its centre; `resize: pad` keeps all"
    )
    mean: Means | None = Field(
        None, description="mean of each channel, for pixels in 0..1; null: as the model was trained"
    )
    std: Deviations | None = Field(
        None, description="standard deviation of each channel, likewise; null: as the model was trained"
    )


class TimmTowerConfig(PretrainedTowerConfig):
    """A pretrained image tower from timm, such as the paper's `vit_base_patch16_224.augreg_in21k`."""

    kind: Literal["timm"]
    model: str = Field(description="name in timm of a ViT with or without a [CLS] token, or of a convolutional model")
    checkpoint: Path | None = Field(
        None, description="local file of weights, safetensors or torch; null: timm downloads from the model hub"
    )
    revision: Commit | None = Field(None, description="commit of the model's repository on the hub; null: the newest")
    pretrained: bool = Field(
        True,
        description="false: random weights, and nothing is downloaded; every ablation then needs "
        "pretrain.image_tower.from_scratch",
    )

    @property
    def from_hub(self) -> bool:
        """Whether the weights are downloaded."""
        return self.pretrained and self.checkpoint is None

    @model_validator(mode="after")
    def _possible(self) -> TimmTowerConfig:
        if not self.pretrained and (self.checkpoint or self.revision):
            raise ValueError("pretrained is false, so checkpoint and revision have no effect; remove them")
        if self.checkpoint is not None and self.revision is not None:
            raise ValueError("revision is a commit of the hub, but checkpoint is a local file; remove one of them")
        return self


class PackagedTowerConfig(PretrainedTowerConfig):
    """EfficientNet-Lite0 with ImageNet weights from a Python package (extra `offline-tower`); no hub is needed."""

    kind: Literal["packaged"]
    model: Literal["efficientnet-lite0"] = Field("efficientnet-lite0", description="name of the model")


class TransformersTowerConfig(PretrainedTowerConfig):
    """The image tower of a model of transformers: CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3."""

    kind: Literal["transformers"]
    model: str = Field(description="folder of a model with its preprocessor_config.json, or its name on the hub")
    revision: Commit | None = Field(None, description="commit of the model's repository on the hub; null: the newest")


class OpenClipTowerConfig(PretrainedTowerConfig):
    """The image tower of an open_clip model."""

    kind: Literal["open_clip"]
    model: str = Field(
        description="name of a configuration in open_clip, such as ViT-B-32; or local-dir:FOLDER, a model saved by "
        "open_clip, whose configuration says how images are prepared"
    )
    weights: str | None = Field(
        None, description="tag of pretrained weights in open_clip; it also decides how images are prepared"
    )
    checkpoint: Path | None = Field(
        None, description="local file with the whole model's weights; null: open_clip downloads those of the tag"
    )

    @model_validator(mode="after")
    def _possible(self) -> OpenClipTowerConfig:
        if self.model.startswith(LOCAL):
            if self.weights or self.checkpoint:
                raise ValueError(f"{self.model} has weights of its own; remove weights and checkpoint")
            return self
        if self.weights is None and (self.checkpoint is None or None in (self.mean, self.std, self.resize)):
            raise ValueError(
                "weights is null, so nothing says how images were prepared in training; name a tag of open_clip in "
                "weights, or set checkpoint, mean, std and resize"
            )
        return self


class StartTowerConfig(Section):
    """The image tower of the model that training starts from, `pretrain.start`, which the stage reads as a whole."""

    kind: Literal["start"]


ImageTowerConfig = Annotated[
    SceneTowerConfig
    | TimmTowerConfig
    | PackagedTowerConfig
    | TransformersTowerConfig
    | OpenClipTowerConfig
    | StartTowerConfig,
    Variants("lotlip.image_towers"),
]
