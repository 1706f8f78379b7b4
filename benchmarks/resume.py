"""Kills training at random moments and compares the result with an undisturbed run: `python -m benchmarks.resume`.

Two processes train a small model with dropout. Each kill is `kill -9` of one of them, or of their launcher, at a random
moment: during a step, while a checkpoint is written, or during the start. Then training is restarted. The final weights
and the loss curve must be bit-identical to those of an undisturbed run; otherwise the exit status is 1. `--json` prints
one object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.data import write_data
from flows.runtime.processes import launch
from flows.runtime.supervisor import end_group, start_group
from lotlip.core.compute import LocalLaunch, TrainingCompute
from lotlip.core.files import SCRATCH
from lotlip.core.record import read_record
from lotlip.models.vision.image_tower import build_image_tower, save_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.job import Job
from lotlip.pretrain.records import HISTORY, History

WIDTH = 64
MODULE = "lotlip.train"


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both, and returns the kills and whether the results are identical."""
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root / "shards", samples=1000, shards=3, image_size=32, width=WIDTH)
        spec = ImageTowerSpec("vit_scenes", 32, {"patch_size": 16, "embed_dim": WIDTH, "depth": 1, "num_heads": 2})
        save_image_tower(build_image_tower(spec), root / "tower")
        undisturbed, killed = (_job(root, name, arguments) for name in ("undisturbed", "killed"))
        started = time.monotonic()
        _train(undisturbed, arguments.processes, None, rng)
        seconds = time.monotonic() - started
        kills: list[dict[str, Any]] = []
        while not (killed.parent / "out").exists():
            moment = _moment(rng, arguments) if len(kills) < arguments.kills else None
            kill = _train(killed, arguments.processes, moment, rng)
            if kill:
                kills.append(kill)
                print(f"killed {kill['process']} {kill['when']}", file=sys.stderr)
        comparison = _compare(undisturbed.parent / "out" / "seed-0", killed.parent / "out" / "seed-0")
    return {"kills": kills, "seconds_undisturbed": seconds, **comparison}


def _job(root: Path, name: str, arguments: argparse.Namespace) -> Path:
    text = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}
    settings = PretrainConfig.model_validate(
        {
            "steps": arguments.steps,
            "batch_size": 32,
            "text": {"config": text},
        }
    )
    compute = TrainingCompute(
        processes=arguments.processes,
        gradient_accumulation_steps=2,
        zero_stage=arguments.zero_stage,
        log_every=1,
        checkpoint_every=5,
        stop_at_chance_after=0,  # the captions are random words
    )
    job = Job(
        ablation=name,
        config=settings,
        compute=compute,
        seeds=settings.seeds,
        shards=root / "shards",
        image_tower=root / "tower",
        scratch=root / name / SCRATCH,
        out=root / name / "out",
        tracking_uri="",
        run_ids={},
    )
    job.write(root / name / "job.json")
    return root / name / "job.json"


def _moment(rng: random.Random, arguments: argparse.Namespace) -> tuple[int, float]:
    """Chooses when to kill a process: the number of steps in its run (0: during the start), and a delay in seconds."""
    max_steps = arguments.steps // (arguments.kills + 1)
    return (0 if rng.random() < 0.2 else rng.randint(1, max_steps), rng.uniform(0, 0.2))


def _train(job: Path, processes: int, moment: tuple[int, float] | None, rng: random.Random) -> dict[str, Any] | None:
    """Trains to the end, or kills a process at the given moment. Returns the kill: which process, and when.

    Raises:
        RuntimeError: training failed although no process was killed.
    """
    process = start_group(
        launch(MODULE, [str(job)], processes, LocalLaunch()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=errors.extend, args=(process.stderr,))
    reader.start()
    killed = None
    try:
        if moment and moment[0] == 0:
            time.sleep(5 * moment[1] / 0.2)
            killed = _kill(process.pid, rng, "during the start")
        steps = 0
        for line in process.stdout:
            steps += "loss" in line
            if moment and not killed and steps == moment[0]:
                time.sleep(moment[1])
                killed = _kill(process.pid, rng, line.split(": ")[1].split(",")[0])
        if process.wait() and not killed:
            raise RuntimeError(f"training ended with {process.returncode}: {''.join(errors[-20:])}")
    finally:
        end_group(process)
        reader.join()
    return killed


def _kill(launcher: int, rng: random.Random, when: str) -> dict[str, Any]:
    parent = psutil.Process(launcher)
    ranks = [child for child in parent.children(recursive=True) if MODULE in child.cmdline()]
    victim = rng.choice([parent, *ranks])
    victim.kill()
    return {"process": "the launcher" if victim == parent else "a training process", "when": when}


def _compare(first: Path, second: Path) -> dict[str, Any]:
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    curves = [[point["loss"] for point in read_record(folder / HISTORY, History)] for folder in (first, second)]
    differences = [(weights[0][name].double() - weights[1][name].double()).abs().max().item() for name in weights[0]]
    identical = weights[0].keys() == weights[1].keys() and all(
        torch.equal(value, weights[1][name]) for name, value in weights[0].items()
    )
    return {
        "weights_identical": identical,
        "largest_difference": max(differences),
        "curves_identical": curves[0] == curves[1],
        "steps": len(curves[0]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments and the choice of processes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = main(options)
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        for kill in result["kills"]:
            print(f"kill -9 of {kill['process']}, {kill['when']}")
        print(
            f"after {len(result['kills'])} kills in {result['steps']} steps: weights "
            f"{'bit-identical' if result['weights_identical'] else 'NOT identical'} "
            f"(largest difference {result['largest_difference']:g}), loss curves "
            f"{'identical' if result['curves_identical'] else 'NOT identical'}"
        )
    sys.exit(not (result["weights_identical"] and result["curves_identical"]))
