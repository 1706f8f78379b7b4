"""Compares the loading speed with open_clip's training pipeline: `python -m benchmarks.loader`.

It writes shards of pictures that take as long to decode as photographs, with features of dimension 768 and short and
long captions. Both loaders read them with the same number of workers. open_clip's loader is `get_wds_dataset` of its
training code. open_clip does not support features, so for them the same steps read the stored .npy instead of the
picture, and decode only the members that are used. open_clip tokenizes the short caption. Ours reads the short caption
and a long text from the token ids that the shard stage stores, or tokenizes both for tars without them. A round runs
every variant once, from the start of its workers to the epoch's last batch. Rates are medians over rounds, and ratios
are medians of the rounds' ratios. The share of time that training waits for data is measured with simulated steps of a
given length, in which the processor is idle. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import open_clip
import webdataset as wds
from open_clip_train import data as open_clip_data
from tqdm import tqdm

from benchmarks.data import write_data
from lotlip.data.images import Transform, training_transform
from lotlip.data.tokenizer import TextTokenizer
from lotlip.pretrain.config import AugmentationConfig, LongTextsConfig, PretrainConfig
from lotlip.pretrain.loader import BatchSlice, Loader

SIDE, WIDTH = 224, 768  # side of the tower's pictures, dimension of its features

# Pairs of variants that are compared: ours, open_clip's.
PAIRS = {
    "stored features": ("ours, features", "open_clip, features"),
    "stored features without token ids": ("ours, features, no ids", "open_clip, features"),
    "images, centre": ("ours, centre", "open_clip, centre"),
    "images, augmented": ("ours, augmented", "open_clip, augmented"),
}

# open_clip was written for a version of webdataset that did not mark the end of a tar.
open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)

Batches = Callable[[], Iterable[Any]]


# --- both loaders -------------------------------------------------------------------------------------------------


def ours(
    folder: Path, workers: int, batch: int, tokenizer: TextTokenizer, transform: Transform | None
) -> Iterator[Any]:
    """Returns the batches of an epoch of this project's loader."""
    settings = PretrainConfig(long_texts=LongTextsConfig())
    loader = Loader(folder, settings, tokenizer, 0, BatchSlice(batch), transform, workers=workers)
    return loader.steps(0, loader.steps_per_epoch)


def open_clip_images(
    folder: Path, workers: int, batch: int, tokenizer: Any, samples: int, augmented: bool
) -> Iterable[Any]:
    """Returns the batches of an epoch of open_clip's pipeline."""
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
    """Returns the batches of an epoch with the steps of `get_wds_dataset`, but features instead of pictures."""
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


def without_token_ids(folder: Path) -> Path:
    """Links the shards without their token ids into a subfolder, and returns it."""
    subfolder = folder / "without"
    subfolder.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffixes[-2:] != [".token-ids", ".arrow"]:
            os.link(path, subfolder / path.name)
    return subfolder


# --- measuring ----------------------------------------------------------------------------------------------------


def samples_per_second(batches: Batches, batch: int) -> float:
    """Measures the rate over an epoch, including the start of the workers."""
    started = time.perf_counter()
    count = sum(1 for _ in batches())
    return count * batch / (time.perf_counter() - started)


def waiting_share(batches: Batches, step_seconds: float, steps: int) -> float:
    """Measures the share of time that steps wait for data, without the first step, in which the workers start."""
    stream = iter(batches())
    next(stream)
    started, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        time.sleep(step_seconds)
        requested = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - requested
    return waited / (time.perf_counter() - started)


def measure(
    samples: int, shards: int, image_size: int, workers: int, batch: int, step_ms: float, rounds: int, images: bool
) -> dict[str, Any]:
    """Returns samples per second and waiting share of every variant, and ratios of ours to open_clip's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, samples, shards, image_size, WIDTH)
        tokenizer = TextTokenizer("bert-base-uncased")
        our_loader = partial(ours, folder, workers, batch, tokenizer)
        clip_tokenizer = open_clip.get_tokenizer("ViT-B-32")
        theirs = partial(open_clip_images, folder, workers, batch, clip_tokenizer, samples)
        variants: dict[str, Batches] = {
            "ours, features": partial(our_loader, None),
            "ours, features, no ids": partial(ours, without_token_ids(folder), workers, batch, tokenizer, None),
            "open_clip, features": partial(open_clip_features, folder, workers, batch, clip_tokenizer, samples),
        }
        if images:
            variants |= {
                "ours, centre": partial(our_loader, training_transform(SIDE)),
                "open_clip, centre": partial(theirs, False),
                "ours, augmented": partial(our_loader, training_transform(SIDE, augmentation=AugmentationConfig())),
                "open_clip, augmented": partial(theirs, True),
            }
        rates: dict[str, list[float]] = {name: [] for name in variants}
        waits: dict[str, list[float]] = {name: [] for name in variants}
        steps = min(20, samples // batch - 1)
        for name in tqdm([*variants] * rounds, desc="rounds × variants", disable=None):
            rates[name].append(samples_per_second(variants[name], batch))
            waits[name].append(waiting_share(variants[name], step_ms / 1000, steps))
    ratios = {
        pair: median(a / b for a, b in zip(rates[mine], rates[other], strict=True))
        for pair, (mine, other) in PAIRS.items()
        if mine in rates
    }
    return {
        "samples_per_second": {name: median(values) for name, values in rates.items()},
        "waiting_share": {name: median(values) for name, values in waits.items()},
        "ours_over_open_clip": ratios,
    }


def table(measured: dict[str, Any], step_ms: float) -> str:
    """Returns the measurement as a Markdown table."""
    lines = [f"| | samples/s | waiting, with steps of {step_ms:g} ms |", "|---|---|---|"]
    for name, rate in measured["samples_per_second"].items():
        lines.append(f"| {name} | {rate:.0f} | {measured['waiting_share'][name]:.0%} |")
    ratios = (f"{pair} {ratio:.2f} times" for pair, ratio in measured["ours_over_open_clip"].items())
    return "\n".join([*lines, "", f"Ours compared with open_clip's: {', '.join(ratios)}."])


def main() -> None:
    """Runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    sizes = {"samples": 4000, "shards": 4, "image-size": 256, "workers": 1, "batch": 64, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--images", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    measured = measure(**arguments)
    print(json.dumps({**arguments, **measured}, allow_nan=False) if as_json else table(measured, arguments["step_ms"]))


if __name__ == "__main__":
    main()
