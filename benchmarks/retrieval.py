"""Compares time and memory of retrieval scores with the plain product of features: `python -m benchmarks.retrieval`.

Features are random; by default there are as many as in COCO. Product and scores alternate. The best round of each is
reported, in wall time and in CPU time. Other work on the machine disturbs CPU time less, and least with `--threads 1`,
because threads that wait for one another use CPU time too. Memory is measured in another process: the peak beyond its
memory after torch has multiplied matrices and the features exist. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.evaluate.metrics import retrieval

MB = 1e6


def features(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features of images [I, D] and of texts [T, D], and each text's image [T]."""
    torch.manual_seed(0)
    text_image = torch.arange(arguments.texts) % arguments.images
    images = normalize(torch.randn(arguments.images, arguments.width), dim=-1)
    return images, normalize(torch.randn(arguments.texts, arguments.width), dim=-1), text_image


def time_of(work: Callable[[], Any]) -> tuple[float, float]:
    """Measures seconds of wall time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def times(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures the best time of each computation over all rounds, in seconds."""
    images, texts, text_image = features(arguments)
    computations: dict[str, Callable[[], Any]] = {
        "product": lambda: images @ texts.T,
        "scores": lambda: retrieval(images, texts, text_image, resamples=0),
        "scores_and_intervals": lambda: retrieval(images, texts, text_image),
    }
    rounds = [{name: time_of(work) for name, work in computations.items()} for _ in range(arguments.rounds)]
    return {
        f"{name}_{clock}_seconds": min(times[name][index] for times in rounds)
        for name in computations
        for index, clock in enumerate(("wall", "cpu"))
    }


def memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Measures, in a separate process, the bytes of the features and the additional bytes at the peak."""
    images, texts, text_image = features(arguments)
    images[:64] @ texts[:64].T
    before = psutil.Process().memory_info().rss
    retrieval(images, texts, text_image)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"features_bytes": images.nbytes + texts.nbytes, "more_bytes": peak - before}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns all measurements."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--measure-memory", *sys.argv[1:]]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"images": arguments.images, "texts": arguments.texts, "width": arguments.width, **times(arguments), **peak}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--texts", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        print(json.dumps(memory(options), allow_nan=False))
    else:
        result = main(options)
        if options.json:
            print(json.dumps(result, allow_nan=False))
        else:
            print(f"{options.images:,} images, {options.texts:,} texts, dimension {options.width}")
            for name, title in (
                ("product", "plain product"),
                ("scores", "scores"),
                ("scores_and_intervals", "scores and intervals"),
            ):
                wall, cpu = (result[f"{name}_{clock}_seconds"] for clock in ("wall", "cpu"))
                wall_ratio, cpu_ratio = wall / result["product_wall_seconds"], cpu / result["product_cpu_seconds"]
                print(f"{title}: {wall:.2f} s, {wall_ratio:.2f} times; CPU time {cpu:.2f} s, {cpu_ratio:.2f} times")
            print(
                f"features {result['features_bytes'] / MB:.0f} MB; peak: {result['more_bytes'] / MB:.0f} MB in addition"
            )
