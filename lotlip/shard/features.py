"""Features of the frozen image tower, which training reads instead of images."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lotlip.core.device import choose_device
from lotlip.data.images import image_transform
from lotlip.models.vision.image_tower import for_inference, load_image_tower
from lotlip.shard.shards import Features


def frozen_features(folder: Path, device: str = "auto", precision: str = "fp32") -> Features:
    """Returns a function that encodes pictures as the tower's features, float32 [n, D]; one call runs at a time.

    Args:
        folder: of the image tower.
        device: name of the device, as `choose_device` takes it.
        precision: "fp32", or "bf16" for autocast.

    Raises:
        ValueError: the device does not exist, or the tower cannot be read.
    """
    device = choose_device(device)
    tower = for_inference(load_image_tower(folder), device)
    transform = image_transform(**tower.spec.preprocessing)
    lock = threading.Lock()  # one call already uses the whole device

    def features(pictures: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([transform(picture) for picture in pictures]))
        bf16 = precision == "bf16"
        with lock, torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            return tower(pixels.to(device)).float().cpu().numpy()

    return features
