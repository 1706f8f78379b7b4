"""How fast samples come, beside open_clip's training pipeline: `python -m benchmarks.loader`.

It writes shards of pictures that cost what photographs cost to decode, features of 768 numbers, raw and long captions,
and reads them both ways with as many workers. open_clip's is `get_wds_dataset` of its training code; with features, the
same steps with the stored .npy in place of the picture, which open_clip has not, and only what is used decoded. It
tokenizes the raw caption, ours the raw caption and a long text. A round runs every way once, each from starting its
workers to the epoch's last batch; rates are medians over rounds, ratios medians of each round's. The share of time that
training waits for data is of steps of a given length in which the processor is free. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import webdataset as wds
from open_clip_train import data as open_clip_data
from PIL import Image
from tqdm import tqdm

from lotlip.config import Augmentation, LongTexts, Pretrain
from lotlip.config import Loader as LoaderSettings
from lotlip.data.images import Transform, training_transform
from lotlip.data.loader import Loader, Rows
from lotlip.data.tars import write_index
from lotlip.data.tokenizer import TextTokenizer
from lotlip.files import write_json
from lotlip.partitions import TarWriter

SIDE, WIDTH = 224, 768  # of the tower's pictures, and of its features
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

# A pair that is compared: ours, open_clip's.
PAIRS = {
    "stored features": ("ours, features", "open_clip, features"),
    "images, centre": ("ours, centre", "open_clip, centre"),
    "images, augmented": ("ours, augmented", "open_clip, augmented"),
}

# open_clip was written for a webdataset that did not mark where a tar ends.
open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)

Batches = Callable[[], Iterable[Any]]


# --- the data -----------------------------------------------------------------------------------------------------


def write_data(folder: Path, samples: int, shards: int, image_size: int) -> None:
    """Shards that both read: key.json, key.npy, key.jpg, and the raw caption again as key.txt for open_clip."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    pictures = [_picture(noise, image_size) for _ in range(min(samples, 64))]  # enough to differ
    sizes = [len(range(number, samples, shards)) for number in range(shards)]
    names = [f"train-{number:06d}" for number in range(shards)]
    for name, size in zip(names, sizes, strict=True):
        path = folder / f"{name}.tar"
        with path.open("wb") as file, TarWriter(file) as tar:
            for number in range(size):
                key, raw = f"{name}-{number:06d}", _sentence(rng)
                captions = {captioner: [_sentence(rng) for _ in range(8)] for captioner in CAPTIONERS}
                tar.add(f"{key}.json", json.dumps({"raw": raw, "captions": captions}).encode())
                feature = io.BytesIO()
                np.save(feature, noise.standard_normal(WIDTH, dtype=np.float32))
                tar.add(f"{key}.npy", feature.getvalue())
                tar.add(f"{key}.jpg", rng.choice(pictures))
                tar.add(f"{key}.txt", raw.encode())
        write_index(path)
    listed = [{"name": name, "samples": size} for name, size in zip(names, sizes, strict=True)]
    write_json(folder / "index.json", {"splits": {"train": {"samples": samples, "shards": listed}}})


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(8, 14)))


def _picture(noise: np.random.Generator, size: int) -> bytes:
    """Noise of every scale, the coarse strongest, as in photographs: some 3 bits a pixel as JPEG."""
    pixels = np.full((size, size, 3), 128.0)
    for cells, strength in ((4, 60), (16, 30), (64, 12), (size, 6)):
        coarse = noise.standard_normal((cells, cells, 3)).clip(-3, 3) * 42 + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=np.float64) - 128) * strength / 42
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# --- both ways ----------------------------------------------------------------------------------------------------


def ours(
    folder: Path, workers: int, batch: int, tokenizer: TextTokenizer, transform: Transform | None
) -> Iterator[Any]:
    """An epoch of this project's loader."""
    settings = Pretrain(long_texts=LongTexts(), loader=LoaderSettings(workers=workers))
    loader = Loader(folder, settings, tokenizer, 0, Rows(batch), transform)
    return loader.steps(0, loader.steps_per_epoch)


def open_clip_images(
    folder: Path, workers: int, batch: int, tokenizer: Any, samples: int, augmented: bool
) -> Iterable[Any]:
    """An epoch of open_clip's pipeline, in the order of `get_wds_dataset`."""
    args = SimpleNamespace(
        train_data="::".join(map(str, sorted(folder.glob("*.tar")))),
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    preprocess = open_clip.image_transform(SIDE, is_train=augmented)
    return open_clip_data.get_wds_dataset(args, preprocess, True, floor=True, tokenizer=tokenizer).dataloader


def open_clip_features(folder: Path, workers: int, batch: int, tokenizer: Any, samples: int) -> Iterable[Any]:
    """The same steps with the stored .npy in place of the picture."""
    steps = [
        wds.SimpleShardList([str(path) for path in sorted(folder.glob("*.tar"))]),
        wds.split_by_worker,
        open_clip_data.tarfile_to_samples_nothrow,
        wds.shuffle(open_clip_data._SAMPLE_SHUFFLE_SIZE, initial=open_clip_data._SAMPLE_SHUFFLE_INITIAL),
        wds.decode(only=["npy", "txt"]),
        wds.rename(image="npy", text="txt"),
        wds.map_dict(text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    ]
    dataset = wds.DataPipeline(*steps).with_epoch(samples // batch // max(workers, 1))
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=workers)


# --- measuring ----------------------------------------------------------------------------------------------------


def samples_per_second(batches: Batches, batch: int) -> float:
    """Of a whole epoch, the start of its workers included."""
    started = time.perf_counter()
    count = sum(1 for _ in batches())
    return count * batch / (time.perf_counter() - started)


def waiting_share(batches: Batches, step_seconds: float, steps: int) -> float:
    """Share of time that steps of a given length wait for data; the first is not counted: workers start with it."""
    stream = iter(batches())
    next(stream)
    started, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        time.sleep(step_seconds)
        asked = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - started)


def measure(
    samples: int, shards: int, image_size: int, workers: int, batch: int, step_ms: float, rounds: int
) -> dict[str, Any]:
    """Every way's samples per second and share of waiting, and ours over open_clip's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, samples, shards, image_size)
        own = partial(ours, folder, workers, batch, TextTokenizer("bert-base-uncased"))
        clip_tokenizer = open_clip.get_tokenizer("ViT-B-32")
        theirs = partial(open_clip_images, folder, workers, batch, clip_tokenizer, samples)
        ways: dict[str, Batches] = {
            "ours, features": partial(own, None),
            "open_clip, features": partial(open_clip_features, folder, workers, batch, clip_tokenizer, samples),
            "ours, centre": partial(own, training_transform(SIDE)),
            "open_clip, centre": partial(theirs, False),
            "ours, augmented": partial(own, training_transform(SIDE, augmentation=Augmentation())),
            "open_clip, augmented": partial(theirs, True),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        waits: dict[str, list[float]] = {way: [] for way in ways}
        steps = min(20, samples // batch - 1)
        for way in tqdm([*ways] * rounds, desc="rounds × ways", disable=None):
            rates[way].append(samples_per_second(ways[way], batch))
            waits[way].append(waiting_share(ways[way], step_ms / 1000, steps))
    ratios = {
        pair: median(a / b for a, b in zip(rates[mine], rates[other], strict=True))
        for pair, (mine, other) in PAIRS.items()
    }
    return {
        "samples_per_second": {way: median(found) for way, found in rates.items()},
        "waiting_share": {way: median(found) for way, found in waits.items()},
        "ours_over_open_clip": ratios,
    }


def table(measured: dict[str, Any], step_ms: float) -> str:
    """The measurement as a Markdown table."""
    lines = [f"| | samples/s | waits, of steps of {step_ms:g} ms |", "|---|---|---|"]
    for way, rate in measured["samples_per_second"].items():
        lines.append(f"| {way} | {rate:.0f} | {measured['waiting_share'][way]:.0%} |")
    ratios = (f"{pair} {ratio:.2f} times" for pair, ratio in measured["ours_over_open_clip"].items())
    return "\n".join([*lines, "", f"Ours over open_clip's: {', '.join(ratios)}."])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    sizes = {"samples": 4000, "shards": 4, "image-size": 256, "workers": 1, "batch": 64, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--json", action="store_true")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    measured = measure(**arguments)
    print(json.dumps({**arguments, **measured}) if as_json else table(measured, arguments["step_ms"]))


if __name__ == "__main__":
    main()
