"""Creates shards of synthetic samples that take as long to read as real ones."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from lotlip.data.index import ShardEntry, ShardIndex, SplitEntry, write_index
from lotlip.data.tars import TarWriter
from lotlip.data.tars import write_index as write_places
from lotlip.data.token_ids import write_token_ids
from lotlip.data.tokenizer import used_tokens

TOKENIZER = "bert-base-uncased"
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
    """Writes shards with key.json, key.npy [width], key.jpg, and key.txt with the short caption for open_clip.

    Files with token ids are written beside them, as by the shard stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, noise = random.Random(0), np.random.default_rng(0)
    pictures = [_picture(noise, image_size) for _ in range(min(samples, 64))]
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
        write_places(path)
        write_token_ids(path, TOKENIZER)
    listed = [
        ShardEntry(name=name, samples=size, bytes=(folder / f"{name}.tar").stat().st_size, sha256="")
        for name, size in zip(names, sizes, strict=True)
    ]
    splits = {"train": SplitEntry(samples=samples, shards=listed)}
    vocabulary = sorted(used_tokens(TOKENIZER, WORDS))
    fields = {"statistics": {}, "features": True, "tokenizer": TOKENIZER, "vocabulary": vocabulary}
    write_index(folder, [], ShardIndex, splits=splits, **fields)


def sentence(rng: random.Random) -> str:
    """Returns a random sentence of 8 to 14 words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(8, 14)))


def _picture(noise: np.random.Generator, size: int) -> bytes:
    """Returns a JPEG of noise at all scales, strongest at coarse ones as in photographs: about 3 bits per pixel."""
    pixels = np.full((size, size, 3), 128.0)
    for cells, strength in ((4, 60), (16, 30), (64, 12), (size, 6)):
        coarse = noise.standard_normal((cells, cells, 3)).clip(-3, 3) * 42 + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=np.float64) - 128) * strength / 42
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
