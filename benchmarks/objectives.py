"""Measures time and peak memory of each objective next to plain InfoNCE: `python -m benchmarks.objectives`.

The features are random, as the towers return them. An objective's time is that of the loss and the gradients of its
inputs. Its memory is what the process has at most, beyond what it had before. The objectives take turns, and the ratios
are medians over rounds. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.objectives.conditioned import ConditionedPooling
from lotlip.objectives.contrastive import lotlip_loss

MB = 1e6
HEADS = 8


def objectives(sizes: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns, by name, functions that create the arguments of `lotlip_loss`."""
    batch, kinds, width = sizes.batch, sizes.kinds, sizes.width

    def plain() -> dict[str, Any]:
        return {
            "image_features": normalize(torch.randn(batch, width), dim=-1),
            "text_features": normalize(torch.randn(batch, kinds, width), dim=-1),
        }

    def with_settings(**settings: Any) -> Callable[[], dict[str, Any]]:
        return lambda: plain() | settings

    def sigmoid() -> dict[str, Any]:
        return plain() | {"objective": "siglip", "logit_bias": torch.tensor([-10.0])}

    def masks() -> dict[str, Any]:
        return plain() | {"channel_masks": torch.rand(batch, kinds, width), "mask_penalty": 0.1}

    def flair() -> dict[str, Any]:
        tokens, pooling = ConditionedPooling(width, width, HEADS)(torch.randn(batch, sizes.patches, width))
        draws = torch.randint(2**31, (batch, 2))
        pooled = {"image_tokens": tokens.detach(), "pooling": pooling.detach(), "pooling_heads": HEADS, "draws": draws}
        return sigmoid() | pooled

    def filip() -> dict[str, Any]:
        return {
            "image_features": normalize(torch.randn(batch, sizes.patches, width), dim=-1),
            "text_features": normalize(torch.randn(batch, kinds, sizes.tokens, width), dim=-1),
            "text_mask": torch.ones(batch, kinds, sizes.tokens, dtype=torch.bool),
        }

    return {
        "infonce": plain,
        "label smoothing": with_settings(label_smoothing=0.1),
        "siglip": sigmoid,
        "long-clip": with_settings(image_components=32),
        "himo-clip": with_settings(text_components=0.9),
        "margin": with_settings(hard_negative_margin=0.5),
        "smartclip": masks,
        "flair": flair,
        "filip": filip,
    }


def measure(create: Callable[[], dict[str, Any]]) -> dict[str, float]:
    """Measures one loss with its gradients: seconds, and bytes at its peak."""
    inputs = create()
    for value in inputs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    scale = torch.tensor([14.3], requires_grad=True)
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier losses have freed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    started = time.perf_counter()
    lotlip_loss(**inputs, logit_scale=scale)["loss"].backward()
    return {"seconds": time.perf_counter() - started, "bytes": _memory("VmHWM") - before}


def _memory(name: str) -> int:
    """Returns a size of this process from its status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns seconds and bytes of each objective, and both as multiples of those of infonce in the same round."""
    torch.manual_seed(0)
    created = {name: create for name, create in objectives(options).items() if name not in options.skip}
    measure(created["infonce"])  # the first run starts threads
    rounds = [{name: measure(create) for name, create in created.items()} for _ in range(options.rounds)]
    return {
        name: {unit: statistics.median(found[name][unit] for found in rounds) for unit in ("seconds", "bytes")}
        | {
            f"times_{unit}": statistics.median(found[name][unit] / found["infonce"][unit] for found in rounds)
            for unit in ("seconds", "bytes")
        }
        for name in created
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--kinds", type=int, default=2, help="text features per image")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--patches", type=int, default=16, help="patches of an image, for flair and filip")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a text, for filip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="objectives to leave out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = main(options)
    if options.json:
        print(json.dumps(results, allow_nan=False))
    else:
        print(f"a batch of {options.batch:,}, {options.kinds} texts of width {options.width} per image")
        for name, found in results.items():
            print(
                f"{name:16} {found['seconds']:7.2f} s ({found['times_seconds']:5.2f} times infonce)"
                f" {found['bytes'] / MB:7.0f} MB ({found['times_bytes']:5.2f} times)"
            )
