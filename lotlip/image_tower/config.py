"""Settings of the image-tower stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lotlip.core.section import Commit, Count, Positive, Section, Share
from lotlip.core.variants import Variants

# Names as in `lotlip.data.images.RESIZES`.
Resize = Literal["crop", "squash", "pad"]
Channels = tuple[float, float, float]


_RESIZE = (
    "how an image becomes a square. crop: resize the shorter side and keep the centre, as in the released code; "
    "squash: resize both sides, which changes the aspect ratio; pad: resize the longer side and add bars in the mean "
    "colour"
)


class SceneTowerConfig(Section):
    """A small ViT that is trained to classify attributes of generated scenes; it replaces ImageNet-21k pretraining."""

    kind: Literal["scenes"]
    scenes: Count = Field(12000, description="number of generated scenes to train on")
    seed: int = Field(1, description="seed of these scenes and of the initial weights")
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


class TimmTowerConfig(Section):
    """A pretrained image tower from timm, such as the paper's `vit_base_patch16_224.augreg_in21k`."""

    kind: Literal["timm"]
    model: str = Field(description="name in timm of a ViT with a [CLS] token")
    checkpoint: Path | None = Field(None, description="local safetensors file; null: timm downloads from the model hub")
    revision: Commit | None = Field(None, description="commit of the model's repository on the hub; null: the newest")
    image_size: Annotated[int, Field(ge=32, le=1024)] = Field(224, description="side of an image in pixels")
    resize: Resize = Field("crop", description=_RESIZE)
    mean: Channels | None = Field(
        None, description="mean of each channel, for pixels in 0..1; null: as the model was trained"
    )
    std: Channels | None = Field(None, description="standard deviation of each channel; null: as the model was trained")

    @model_validator(mode="after")
    def _possible(self) -> TimmTowerConfig:
        if self.checkpoint is not None and self.revision is not None:
            raise ValueError("revision is a commit of the hub, but checkpoint is a local file; remove one of them")
        return self


ImageTowerConfig = Annotated[SceneTowerConfig | TimmTowerConfig, Variants("lotlip.image_towers")]
