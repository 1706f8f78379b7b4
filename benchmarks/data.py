"""Shards of synthetic samples that take as long to read as real ones."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from lotlip.core.files import write_json
from lotlip.data.tars import TarWriter, write_index

CAPTIONERS = ("instructblip", "llava", "sharegpt4v")
WORDS = [
    "the",
    "of",
    "on",
    "in",
    "with",
    "near",
    "behind",
    "red",
    "small",
    "wooden",
    "dark",
    "visible",
    "two",
    "several",
]
WORDS += ["dog", "house", "tree", "street", "table", "window", "person", "sky", "background", "standing", "sitting"]


def write_data(folder: Path, samples: int, shards: int, image_size: int, width: int) -> None:
    """Writes shards of key.json, key.npy of `width` numbers, key.jpg, and key.txt, the short caption for open_clip."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, noise = random.Random(0), np.random.default_rng(0)
    pictures = [_picture(noise, image_size) for _ in range(min(samples, 64))]  # enough variety
    sizes = [len(range(number, samples, shards)) for number in range(shards)]
    names = [f"train-{number:06d}" for number in range(shards)]
    for name, size in zip(names, sizes, strict=True):
        path = folder / f"{name}.tar"
        with path.open("wb") as file, TarWriter(file) as tar:
            for number in range(size):
                key, raw = f"{name}-{number:06d}", sentence(rng)
                captions = {captioner: [sentence(rng) for _ in range(8)] for captioner in CAPTIONERS}
                tar.add(f"{key}.json", json.dumps({"raw": raw, "captions": captions}, allow_nan=False).encode())
                feature = io.BytesIO()
                np.save(feature, noise.standard_normal(width, dtype=np.float32))
                tar.add(f"{key}.npy", feature.getvalue())
                tar.add(f"{key}.jpg", rng.choice(pictures))
                tar.add(f"{key}.txt", raw.encode())
        write_index(path)
    listed = [{"name": name, "samples": size} for name, size in zip(names, sizes, strict=True)]
    write_json(folder / "index.json", {"features": True, "splits": {"train": {"samples": samples, "shards": listed}}})


def sentence(rng: random.Random) -> str:
    """Eight to fourteen words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(8, 14)))


def _picture(noise: np.random.Generator, size: int) -> bytes:
    """Noise of every scale, strongest at coarse scales, as in photographs: about 3 bits per pixel as JPEG."""
    pixels = np.full((size, size, 3), 128.0)
    for cells, strength in ((4, 60), (16, 30), (64, 12), (size, 6)):
        coarse = noise.standard_normal((cells, cells, 3)).clip(-3, 3) * 42 + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=np.float64) - 128) * strength / 42
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
