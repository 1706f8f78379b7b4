"""Measures memory and time of the contrastive loss at a large batch, in several processes: `python -m benchmarks.loss`.

Each process has its share of the batch: image features and the features of each image's texts, as the towers return
them. The additional peak memory, which includes the gradients of the features, is attributed to the loss. `--at-once`
sets the number of logits in memory at a time; with a huge number, all are computed at once, as in other code. `--json`
prints one object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from lotlip.objectives.contrastive import LOGITS_AT_ONCE, lotlip_loss

GB = 1e9


def measure(batch: int, kinds: int, width: int, logits_at_once: int) -> dict[str, float]:
    """Measures one process: bytes of its features, additional bytes at the loss's peak, and seconds."""
    torch.manual_seed(dist.get_rank())
    local_batch = batch // dist.get_world_size()
    images = normalize(torch.randn(local_batch, width), dim=-1).requires_grad_()
    texts = normalize(torch.randn(local_batch, kinds, width), dim=-1).requires_grad_()
    scale = torch.tensor([14.3], requires_grad=True)
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    loss = lotlip_loss(images, texts, scale, logits_at_once=logits_at_once)["loss"]
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "features_bytes": images.nbytes + texts.nbytes,
        "more_bytes": peak - before,
        "seconds": time.monotonic() - started,
        "loss": loss.item(),
    }


def worker(arguments: argparse.Namespace) -> None:
    """Runs one of the processes. Rank 0 prints the results of all."""
    torch.set_num_threads(max(1, (psutil.cpu_count() or 1) // arguments.processes))
    dist.init_process_group("gloo")
    results: list[Any] = [None] * arguments.processes
    dist.all_gather_object(results, measure(arguments.batch, arguments.kinds, arguments.width, arguments.at_once))
    if dist.get_rank() == 0:
        print(json.dumps(results, allow_nan=False))
    dist.destroy_process_group()


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts the processes, and returns the maximum of each value over them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    command = [sys.executable, *launcher, "-m", "benchmarks.loss", "--worker", *sys.argv[1:]]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(done.stdout.strip().splitlines()[-1])
    maxima = {name: max(result[name] for result in results) for name in results[0]}
    return {"batch": arguments.batch, "processes": arguments.processes, "at_once": arguments.at_once, **maxima}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16384, help="number of images in all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", type=int, default=4, help="text features per image: 1 + K (m + 1)")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--at-once", type=int, default=LOGITS_AT_ONCE, help="number of logits in memory at a time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
    else:
        result = main(options)
        print(
            json.dumps(result, allow_nan=False)
            if options.json
            else f"a batch of {result['batch']:,} in {result['processes']} processes: features "
            f"{result['features_bytes'] / GB:.2f} GB per process, loss and gradients "
            f"{result['more_bytes'] / GB:.2f} GB, {result['seconds']:.1f} s"
        )
