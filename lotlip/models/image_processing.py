"""The image processor, in the form that transformers expects. It prepares images exactly as training does."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor, BatchFeature

from lotlip.data.images import MEAN, STD, check_resize, decode_rgb, image_transform, to_rgb
from lotlip.models.configuration import LotlipConfig
from lotlip.models.vision.spec import ImageTowerSpec


class LotlipImageProcessor(BaseImageProcessor):
    """Converts images to normalised square pixels: bicubic resizing, by default of the centre, as in the released code.

    The CLIP processor of transformers crops a different centre if a side's length is odd.

    Args:
        image_size: side of the square in pixels.
        image_mean: mean of each channel, for pixels in 0..1.
        image_std: standard deviation of each channel, for pixels in 0..1.
        resize: how an image becomes a square: `crop`, `squash` or `pad`, as in `lotlip.data.images.square`. Processors
            saved without this field belong to models trained with `crop`.
        interpolation: filter for resizing, one of `lotlip.data.images.INTERPOLATIONS`.
        crop: fraction of the resized image's sides that is kept.

    Raises:
        ValueError: `resize`, `interpolation` or `crop` is not a possible value.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own type)

    def __init__(
        self,
        image_size: int = 224,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = STD,
        resize: str = "crop",
        interpolation: str = "bicubic",
        crop: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_resize(resize, interpolation, crop)
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize = resize
        self.interpolation = interpolation
        self.crop = crop

    @classmethod
    def of(cls, spec: ImageTowerSpec) -> LotlipImageProcessor:
        """The processor for an image tower."""
        options: dict[str, Any] = dict(spec.preprocessing)
        return cls(options.pop("image_size"), options.pop("mean"), options.pop("std"), **options)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Converts one image or a list of images to `pixel_values` [B, 3, S, S] float32.

        Args:
            images: PIL images, arrays [H, W, 3] of uint8, encoded files' bytes, paths or `data:image/…;base64,` URLs.
            return_tensors: "pt" for torch, "np" for NumPy.
            kwargs: rejected, so that no option is silently ignored.

        Raises:
            ValueError: there is no image, one cannot be read or is a web address, or an option is unknown.
        """
        if kwargs:
            raise ValueError(
                f"LotlipImageProcessor has no options {', '.join(kwargs)}; remove them, images are prepared as trained"
            )
        images = images if isinstance(images, list | tuple) else [images]
        if not images or any(isinstance(image, list | tuple) for image in images):
            what = "a list of lists" if images else "empty"
            raise ValueError(f"images is {what}; pass one image or a list of images")
        rgb_images = self.fetch_images(images)
        transform = image_transform(
            self.image_size, self.image_mean, self.image_std, self.resize, self.interpolation, self.crop
        )
        pixels = np.stack([transform(image) for image in rgb_images])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Converts each image to RGB. Overrides the method of transformers, which turns transparent pixels black."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return _as_rgb(image_url_or_urls)


def _as_rgb(image: Any) -> Image.Image:
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        # transformers would download it without limits on size, pixels or time
        raise ValueError(f"{image} is a web address; download the image, and pass its bytes or its path")
    if isinstance(image, str) and image.startswith("data:image/"):
        return decode_rgb(_decode_data_url(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes):
        return decode_rgb(image)
    if isinstance(image, str | os.PathLike):
        return decode_rgb(Path(image).read_bytes())
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"an array of {array.dtype} and shape {list(array.shape)} is not an image; pass uint8 [height, width, 3]"
        )
    return Image.fromarray(array)


def _decode_data_url(url: str) -> bytes:
    """Returns the bytes in a `data:image/…;base64,` URL."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{url[:40]!r}… is not a base64 data URL; pass the image's bytes or its path")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{url[:40]!r}… is not valid base64 ({error}); pass the image's bytes or its path") from error


# transformers looks for a torchvision backend first, and warns if it has to use another one
_BACKENDS: dict[str, type] = {"pil": LotlipImageProcessor, "torchvision": LotlipImageProcessor}
AutoImageProcessor.register(LotlipConfig, image_processor_classes=_BACKENDS, exist_ok=True)
