"""The image tower: a timm ViT whose [CLS] token, after the last norm, is the image feature (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.layers import PatchEmbed
from timm.models import VisionTransformer, register_model
from torch import Tensor, nn

from lotlip.core.files import atomic_write, read_json, write_json
from lotlip.data.images import MEAN, STD, check_resize
from lotlip.data.weights import read_weights

# Options of timm's create_model that load files. They are rejected, because a configuration may be untrusted.
LOADING_OPTIONS = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass(frozen=True)
class ImageTowerSpec:
    """Everything needed to build an image tower and to prepare images for it.

    Attributes:
        timm_model: name of a ViT in timm, or `vit_scenes`.
        kwargs: arguments of that model that differ from its defaults; plain JSON types.
        image_size: side of the square input in pixels.
        mean, std: mean and standard deviation of each channel, for pixels in 0..1.
        resize: how an image becomes a square, one of `lotlip.data.images.RESIZES`.

    Raises:
        ValueError: `resize` is unknown.
    """

    timm_model: str
    image_size: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "crop"

    def __post_init__(self) -> None:
        check_resize(self.resize)

    def to_json(self) -> dict[str, Any]:
        """Returns all fields as plain JSON types."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageTowerSpec:
        """Inverts `to_json`; missing fields take the values of the released models."""
        return cls(**{**data, **{name: tuple(data[name]) for name in ("mean", "std") if name in data}})


class ImageTower(nn.Module):
    """A timm ViT without its classifier.

    Attributes:
        trunk: the timm model.
        spec: what it was built from.
        width: D, the size of a feature.
    """

    def __init__(self, trunk: nn.Module, spec: ImageTowerSpec) -> None:
        super().__init__()
        self.trunk = trunk
        self.spec = spec
        self.width = int(trunk.num_features)  # type: ignore[arg-type]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised pixels [B, 3, S, S] to [CLS] features [B, D], which are not normalised."""
        return self.feature(self.hidden_states(pixel_values))

    def hidden_states(self, pixel_values: Tensor) -> Tensor:
        """Returns the ViT's tokens after its last norm, [B, T, D]: [CLS], other prefix tokens, then patches."""
        return self.trunk.forward_features(pixel_values)  # type: ignore[operator]

    def feature(self, hidden: Tensor) -> Tensor:
        """Returns the feature of [CLS], [B, D], from hidden states [B, T, D]."""
        return self.trunk.forward_head(hidden)  # type: ignore[operator]

    def patches(self, hidden: Tensor) -> Tensor:
        """Returns the features of the patches, [B, P, D], from hidden states [B, T, D]."""
        return hidden[:, self.trunk.num_prefix_tokens :]  # type: ignore[misc]


def build_image_tower(spec: ImageTowerSpec, pretrained: bool = False, revision: str | None = None) -> ImageTower:
    """Builds the tower, with random weights unless `pretrained` is set.

    Args:
        spec: the tower's specification.
        pretrained: whether timm downloads its weights from the model hub.
        revision: commit of the model's repository on the hub; None: the newest.

    Raises:
        ValueError: timm has no such model, it is not a ViT with a [CLS] token, `spec.kwargs` would load files, or
            `revision` is set and the weights are not on the hub.
    """
    if not timm.is_model(spec.timm_model):
        raise ValueError(
            f"timm {timm.__version__} has no model {spec.timm_model!r}; timm.list_models('vit*') lists the names"
        )
    if options := [name for name in LOADING_OPTIONS if name in spec.kwargs]:
        raise ValueError(f"kwargs of the image tower {spec.timm_model} load other files: remove {', '.join(options)}")
    arguments = {"num_classes": 0, "global_pool": "token", "img_size": spec.image_size, **spec.kwargs}
    if revision is not None:
        source = timm.get_pretrained_cfg(spec.timm_model)
        if source is None or not source.hf_hub_id:
            raise ValueError(f"timm's weights of {spec.timm_model} are not on the hub; remove the revision {revision}")
        arguments["pretrained_cfg_overlay"] = {"hf_hub_id": f"{source.hf_hub_id}@{revision}"}
    try:
        trunk = timm.create_model(spec.timm_model, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError) as error:  # timm raises either for unsupported arguments, such as this pooling
        raise ValueError(f"{spec.timm_model} cannot be an image tower: {error}; choose a ViT of timm") from error
    if getattr(trunk, "cls_token", None) is None:
        raise ValueError(f"{spec.timm_model} has no [CLS] token to take the image feature from; choose another ViT")
    return ImageTower(trunk, spec)


def save_image_tower(tower: ImageTower, spec: ImageTowerSpec, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` atomically."""
    with atomic_write(folder) as partial:
        partial.mkdir()
        save_file(
            {name: value.contiguous() for name, value in tower.state_dict().items()}, partial / "model.safetensors"
        )
        write_json(partial / "config.json", spec.to_json())


def load_image_tower(folder: Path) -> ImageTower:
    """Loads what `save_image_tower` wrote, in evaluation mode.

    Raises:
        ValueError: the folder has no tower, or its weights do not match its specification.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no image tower (no config.json); run the image_tower stage first")
    spec = ImageTowerSpec.from_json(read_json(folder / "config.json"))
    tower = build_image_tower(spec)
    load_weights(tower, read_weights(folder / "model.safetensors"), folder / "model.safetensors")
    return tower.eval()


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Loads weights, whose names and shapes must match the module's exactly.

    Raises:
        ValueError: names or shapes differ; the message names the file and the first few weights.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if wrong:
        first = "; ".join(f"{name}: model {expected.get(name)}, file {actual.get(name)}" for name in wrong[:3])
        raise ValueError(f"{file} does not fit the model in {len(wrong)} of {len(expected)} weights ({first})")
    module.load_state_dict(dict(weights))


# --- the demo's ViT -----------------------------------------------------------------------------------------------


class ConvStem(PatchEmbed):
    """Patch embedding by 3×3 convolutions of stride 2, which learn small objects faster than one large convolution."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **others: Any) -> None:
        super().__init__(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **others)
        halvings = int(log2(patch_size))
        if 2**halvings != patch_size:
            raise ValueError(
                f"patch_size {patch_size} is not a power of 2; the stem halves the resolution in each step"
            )
        layers: list[nn.Module] = []
        channels = in_chans
        for step in range(halvings):
            width = embed_dim // 2 ** max(halvings - 2 - step, 0)
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))  # type: ignore[assignment]


@register_model
def vit_scenes(
    pretrained: bool = False,
    pretrained_cfg: Any = None,  # timm passes these three; this model does not use them
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> VisionTransformer:
    """A small ViT with a convolutional stem for the demo's scenes; `kwargs` set all sizes."""
    if pretrained:
        raise ValueError("vit_scenes has no pretrained weights; run the image_tower stage to train it")
    return VisionTransformer(embed_layer=ConvStem, **kwargs)
