"""Compares variants of the demo's training step: `python -m benchmarks.step`.

It trains with the configuration of params.yaml. The variants alternate, one step at a time, in one process and with
equal batches, so that other work on the machine slows all of them. For each variant it prints the median CPU time of a
step, and the median ratio to the first variant's time in the same round. The shards are synthetic; with `--shards
data/shards --image-tower data/image-tower`, they are those of `make reproduce`. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.data import write_data
from lotlip.config.params import load_params
from lotlip.core.files import read_json, write_json
from lotlip.models.vision.image_tower import build_image_tower, save_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.pretrain.engine import initialise_processes
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import Job, Trainer

# For each variant, whether shards list their vocabulary, so that only the used word embeddings are trained.
VARIANTS = {"whole table": False, "used rows": True}


def synthetic_data(folder: Path) -> tuple[Path, Path]:
    """Creates shards and an image tower with the demo's sizes, and returns their folders."""
    write_data(folder / "shards", samples=2000, shards=2, image_size=64, width=128)
    spec = ImageTowerSpec("vit_scenes", 64, {"patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 8})
    save_image_tower(build_image_tower(spec), folder / "tower")
    return folder / "shards", folder / "tower"


def build(variant: str, options: argparse.Namespace, folder: Path) -> Trainer:
    """Returns a trainer of the variant."""
    shards = folder / variant
    shards.mkdir()
    for path in options.shards.glob("train-*"):
        (shards / path.name).symlink_to(path.resolve())
    index = read_json(options.shards / "index.json")
    write_json(shards / "index.json", index if VARIANTS[variant] else {**index, "tokenizer": ""})
    params = load_params(options.params)
    job = Job(
        ablation=variant,
        config=params.ablation(options.ablation).model_dump(mode="json"),
        compute={"loader_workers": 0},
        seeds=[0],
        shards=str(shards),
        image_tower=str(options.image_tower),
        scratch=str(folder),
        out=str(folder),
        tracking_uri="",
        run_ids={},
    )
    return Trainer(job, 0, NullSink())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the CPU seconds of a step of each variant, and its speed relative to the first variant's."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.shards is None:
            options.shards, options.image_tower = synthetic_data(folder)
        trainers = {variant: build(variant, options, folder) for variant in VARIANTS}
        initial = options.warm_up
        steps = {variant: trainer.loader.steps(0, initial + options.rounds) for variant, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {variant: [] for variant in trainers}
        losses: dict[str, float] = {}
        for step in range(initial + options.rounds):
            for variant, trainer in trainers.items():
                batches = next(steps[variant])
                started = time.process_time()
                losses[variant] = trainer.engine.step(batches, step).loss
                seconds[variant].append(time.process_time() - started)
    return compare({variant: times[initial:] for variant, times in seconds.items()}, losses)


def compare(seconds: dict[str, list[float]], losses: dict[str, float]) -> dict[str, Any]:
    """Returns the medians of each variant's times and of its ratios to the first variant."""
    first = next(iter(seconds.values()))
    return {
        name: {
            "cpu_seconds": median(times),
            "times_as_fast": median(before / now for before, now in zip(first, times, strict=True)),
            "last_loss": losses[name],
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--ablation", default="lotlip")
    parser.add_argument("--shards", type=Path, help="folder of the shard stage; default: synthetic shards")
    parser.add_argument("--image-tower", type=Path, help="folder of the image-tower stage")
    parser.add_argument("--rounds", type=int, default=50, help="measured steps of each variant")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.shards is None) != (options.image_tower is None):
        parser.error("--shards and --image-tower must be given together")
    initialise_processes(load_params(options.params).compute.training.model_copy(update={"processes": 1}))
    result = measure(options)
    torch.distributed.destroy_process_group()
    if options.json:
        print(json.dumps(result, allow_nan=False))
        return
    print("| variant | CPU ms per step | times as fast | last loss |\n|---|---|---|---|")
    for variant, figures in result.items():
        milliseconds, ratio, loss = figures["cpu_seconds"] * 1e3, figures["times_as_fast"], figures["last_loss"]
        print(f"| {variant} | {milliseconds:.1f} | {ratio:.2f} | {loss:.6f} |")


if __name__ == "__main__":
    main()
