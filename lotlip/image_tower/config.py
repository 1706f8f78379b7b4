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
    "how a picture becomes a square. crop: the shorter side is resized and the centre kept, as in the released code; "
    "squash: both sides are resized, which changes the aspect ratio; pad: the whole picture, bars in the mean colour"
)


class SceneTowerConfig(Section):
    """A small ViT trained on the attributes of scenes of its own; stands for ImageNet-21k pretraining."""

    kind: Literal["scenes"]
    scenes: Count = Field(12000, description="generated scenes that the tower is trained on")
    seed: int = Field(1, description="of these scenes and of the first weights")
    width: Count = Field(128, description="size of the image feature")
    depth: Count = Field(2, description="transformer layers")
    heads: Count = Field(8, description="attention heads; must divide width")
    patch_size: Count = Field(16, description="pixels of a patch's side, a power of two")
    image_size: Annotated[int, Field(ge=32, le=512)] = Field(64, description="pixels of an image's side")
    resize: Resize = Field("crop", description=_RESIZE)
    epochs: Count = Field(5, description="passes over the scenes")
    batch_size: Count = Field(64, description="images in a training step")
    learning_rate: Positive = Field(2e-3, description="highest learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="AdamW's weight decay")
    min_accuracy: Share = Field(
        0.6, description="mean over attributes, on scenes it was not trained on; less fails the gate"
    )


class TimmTowerConfig(Section):
    """A pretrained image tower from timm, as the paper's `vit_base_patch16_224.augreg_in21k`."""

    kind: Literal["timm"]
    model: str = Field(description="name of a ViT with a [CLS] token in timm")
    checkpoint: Path | None = Field(None, description="local safetensors file; without one timm asks the model hub")
    revision: Commit | None = Field(
        None, description="commit of the model's repository on the hub; without one, whatever the hub has"
    )
    image_size: Annotated[int, Field(ge=32, le=1024)] = Field(224, description="pixels of an image's side")
    resize: Resize = Field("crop", description=_RESIZE)
    mean: Channels | None = Field(
        None, description="of the channels, for pixels in 0..1; null: what the model was trained with"
    )
    std: Channels | None = Field(None, description="standard deviation of the channels; null: as mean")

    @model_validator(mode="after")
    def _possible(self) -> TimmTowerConfig:
        if self.checkpoint is not None and self.revision is not None:
            raise ValueError("revision is a commit of the hub, but checkpoint is a local file; leave one of them out")
        return self


ImageTowerConfig = Annotated[SceneTowerConfig | TimmTowerConfig, Variants("lotlip.image_towers")]
