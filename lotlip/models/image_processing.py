"""Pictures to what the model takes, as transformers' image processors do; exactly as in training."""

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


class LotlipImageProcessor(BaseImageProcessor):
    """Pictures to normalised pixels: a square, resized with a bicubic filter, by default the centre (released code).

    CLIP's own processor of transformers would cut out another centre where a side's length is odd.

    Args:
        image_size: pixels of a side.
        image_mean: of the channels, for pixels in 0..1.
        image_std: likewise.
        resize: how a picture becomes a square: `crop`, `squash` or `pad`, as in `lotlip.data.images.square`. Saved
            processors without it were trained with `crop`.

    Raises:
        ValueError: `resize` is unknown.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own type)

    def __init__(
        self,
        image_size: int = 224,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = STD,
        resize: str = "crop",
        **kwargs: Any,
    ) -> None:
        check_resize(resize)
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize = resize

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """One picture or a list of them → `pixel_values` [B, 3, S, S] float32.

        Args:
            images: PIL images, arrays [H, W, 3] of uint8, encoded files' bytes, paths or `data:image/…;base64,` URLs.
            return_tensors: "pt" for torch, "np" for NumPy.
            kwargs: refused, so that no option is passed over in silence.

        Raises:
            ValueError: a picture cannot be read or is a web address, or an option is unknown.
        """
        if kwargs:
            raise ValueError(
                f"LotlipImageProcessor has no options {', '.join(kwargs)}; pictures are prepared as trained"
            )
        pictures = self.fetch_images(images if isinstance(images, list | tuple) else [images])
        transform = image_transform(self.image_size, self.image_mean, self.image_std, self.resize)
        pixels = np.stack([transform(picture) for picture in pictures])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Each picture as RGB. A processor asks for it first; transformers' own would blacken what is transparent."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return _picture(image_url_or_urls)


def _picture(image: Any) -> Image.Image:
    """As RGB."""
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        # transformers would fetch it without any limit of size, pixels or time
        raise ValueError(f"{image} is a web address; download the picture, and give its bytes or its path")
    if isinstance(image, str) and image.startswith("data:image/"):
        return decode_rgb(_data_of(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes):
        return decode_rgb(image)
    if isinstance(image, str | os.PathLike):
        return decode_rgb(Path(image).read_bytes())
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"an array of {array.dtype} and shape {list(array.shape)} is no picture; give uint8 [height, width, 3]"
        )
    return Image.fromarray(array)


def _data_of(url: str) -> bytes:
    """The bytes in a `data:image/…;base64,` URL."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{url[:40]!r}… is not a base64 data URL; give the picture's bytes or its path")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise ValueError(
            f"{url[:40]!r}… is not valid base64 ({error}); give the picture's bytes or its path"
        ) from error


# transformers looks for a torchvision backend first, and would warn that it takes another
_BACKENDS: dict[str, type] = {"pil": LotlipImageProcessor, "torchvision": LotlipImageProcessor}
AutoImageProcessor.register(LotlipConfig, image_processor_classes=_BACKENDS, exist_ok=True)
