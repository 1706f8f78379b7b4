"""What an image tower is built from, and how pictures are prepared for it; importable without torch and timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from lotlip.data.images import MEAN, STD, check_resize

# Folder in that of the image tower with the complete model that training starts from, if it starts from one.
START = "start"

LIBRARIES = ("timm", "transformers", "open_clip")
POOLINGS = ("model", "token", "mean", "token+mean", "map")
# What `config.json` of an image tower has besides the spec.
_SIZES = ("width", "token_width")


class Preprocessing(TypedDict):
    """Arguments of `lotlip.data.images.image_transform`."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str
    interpolation: str
    crop: float


@dataclass(frozen=True)
class ImageTowerSpec:
    """Everything that is needed to build an image tower and to prepare pictures for it.

    Attributes:
        model: name of the model in its library: of timm (or `vit_scenes`), the model type of transformers, or the
            configuration of open_clip.
        image_size: pixels of a side.
        kwargs: what the library needs besides the name, as plain JSON types.
        mean, std: of the channels, for pixels in 0..1.
        resize: how a picture becomes a square, one of `lotlip.data.images.RESIZES`.
        library: one of `LIBRARIES`.
        pooling: how tokens become the image's feature, one of `POOLINGS`: `token` is the normalised [CLS] token, `mean`
            the mean of the patches, `token+mean` both in a row, `map` the model's attention pooling, and `model`
            whatever its library does, projection included.
        interpolation: filter for resizing, one of `lotlip.data.images.INTERPOLATIONS`.
        crop: share of the resized picture's sides that is kept.

    Raises:
        ValueError: an option is unknown.
    """

    model: str
    image_size: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "crop"
    library: str = "timm"
    pooling: str = "token"
    interpolation: str = "bicubic"
    crop: float = 1.0

    def __post_init__(self) -> None:
        check_resize(self.resize, self.interpolation, self.crop)
        for name, value, known in (("library", self.library, LIBRARIES), ("pooling", self.pooling, POOLINGS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r} of an image tower; use one of {', '.join(known)}")

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are prepared."""
        return Preprocessing(
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            resize=self.resize,
            interpolation=self.interpolation,
            crop=self.crop,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all fields as plain JSON types."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageTowerSpec:
        """The inverse of `to_json`. Missing fields have the values of the released models."""
        given: dict[str, Any] = {name: value for name, value in data.items() if name not in _SIZES}
        if "timm_model" in given:  # files of earlier versions
            given["model"] = given.pop("timm_model")
        if "pooling" not in given and given.get("library", "timm") == "timm":
            # as those versions built the model
            given |= {"pooling": "model", "kwargs": {"global_pool": "token", **given.get("kwargs", {})}}
        given |= {name: tuple(given[name]) for name in ("mean", "std") if name in given}
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"the configuration of an image tower is not valid: {error}") from error
