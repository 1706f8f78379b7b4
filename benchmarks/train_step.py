"""Compares the speed of the training step with the released one: `python -m benchmarks.train_step`.

Each side runs in a separate process. The sides alternate, one step at a time, so that other work on the machine slows
both. Medians are reported; on a busy machine, CPU time with `--threads 1` is more reliable. Weights are random and
equal on both sides. The losses on the same images and captions are compared first. `--json` prints one object.
docs/performance.md has results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from benchmarks.released_step import ReleasedStep
from lotlip.models.configuration import LotlipConfig
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.pretrain.model import LotlipForPreTraining

DEMO = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
TEXT_TOWERS: dict[str, dict[str, int]] = {"bert-base": {}, "demo": DEMO}
IMAGE_SIZE, CORNER_TOKENS, WORDS = 224, 2, 30522
CHECKED = 4  # images whose loss both sides compute
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
MATRIX_SIZES = (512, 1024, 2048)

Texts = list[list[int]]


# --- inputs of both sides -------------------------------------------------------------------------------------------


def build_model(options: argparse.Namespace) -> LotlipForPreTraining:
    """Returns the model with random weights, which are the same in every process."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.dropout}
    text = AutoConfig.for_model("bert", vocab_size=WORDS + CORNER_TOKENS, **TEXT_TOWERS[options.text], **dropout)
    with torch.device("meta"):
        width = timm.create_model(options.vision).num_features
    assert isinstance(width, int)  # timm's models have no types
    config = LotlipConfig(text, embed_dim=width, corner_tokens=CORNER_TOKENS)
    return LotlipForPreTraining(config, image_tower=False)


def draw_texts(number: int, lengths: tuple[int, int], seed: str) -> Texts:
    """Returns token ids of `number` texts with uniformly distributed lengths."""
    rng = random.Random(seed)
    corners = range(WORDS, WORDS + CORNER_TOKENS)
    words = [rng.randint(*lengths) - 2 - CORNER_TOKENS for _ in range(number)]
    return [[101, *corners, *(rng.randrange(1000, WORDS) for _ in range(count)), 102] for count in words]


def draw_batch(options: argparse.Namespace, batch: int, seed: int) -> tuple[Texts, Texts]:
    """Returns short and long texts, one of each per image."""
    return (
        draw_texts(batch, options.short, f"short {batch} {seed}"),
        draw_texts(batch, options.long, f"long {batch} {seed}"),
    )


def padded(texts: Texts) -> tuple[Tensor, Tensor]:
    """Returns token ids [B, L], padded to the longest, and lengths [B], as the loader does."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return ids, lengths


# --- the two sides --------------------------------------------------------------------------------------------------


class Released:
    """The released step, on pixels."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.module = ReleasedStep(build_model(options), options.vision)
        self.optimizer = self.module.optimizer(**ADAMW)

    def images(self, batch: int) -> Tensor:
        """Returns pixels [B, 3, S, S]."""
        return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))

    def loss(self, images: Tensor, raw: Texts, long: Texts) -> Tensor:
        """The training loss, a scalar."""
        return self.module(images, raw, long)


class Ours:
    """This project's step, on stored features."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.module = build_model(options)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True, **ADAMW)

    def images(self, batch: int) -> Tensor:
        """Returns stored features [B, D]."""
        return torch.randn(batch, self.module.config.embed_dim, generator=torch.Generator().manual_seed(0))

    def loss(self, images: Tensor, raw: Texts, long: Texts) -> Tensor:
        """The training loss, a scalar."""
        features = self.module(images, *padded(raw), *padded(long))
        return lotlip_loss(**{name: value.float() for name, value in features.items()})["loss"]


SIDES: dict[str, type[Released | Ours]] = {"released": Released, "ours": Ours}


def serve(name: str, options: argparse.Namespace, orders: Connection) -> None:
    """Runs a side's process, which executes the commands that it receives."""
    torch.set_num_threads(options.threads)
    before = peak_memory()
    side = SIDES[name](options)
    batch = options.released_batch if name == "released" else options.batch
    images = side.images(batch)
    rounded = options.precision == "bf16"

    def loss(images: Tensor, texts: tuple[Texts, Texts]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if rounded else nullcontext():
            return side.loss(images, *texts)

    def step(seed: int) -> None:
        side.optimizer.zero_grad()
        loss(images, draw_batch(options, batch, seed)).backward()
        side.optimizer.step()

    def check(features: Any) -> dict[str, Any]:
        """Returns the loss of the first images. The released side also returns their features, the input of ours."""
        side.module.eval()
        texts = draw_batch(options, CHECKED, 0)
        with torch.no_grad():
            if isinstance(side, Released):
                pixels = side.images(CHECKED)
                result = {"loss": loss(pixels, texts).item(), "features": side.module.image_features(pixels)}
            else:
                result = {"loss": loss(features, texts).item()}
        side.module.train()
        return result

    def run(seed: int) -> tuple[float, float]:
        started, cpu_started = time.perf_counter(), time.process_time()
        step(seed)
        return time.perf_counter() - started, time.process_time() - cpu_started

    def count(seed: int) -> int:
        with FlopCounterMode(display=False) as counter:
            step(seed)
        return counter.get_total_flops()

    def memory(_: Any) -> int:
        return peak_memory() - before

    commands: dict[str, Callable[[Any], Any]] = {"check": check, "run": run, "count": count, "memory": memory}
    while (order := orders.recv()) is not None:
        command, argument = order
        orders.send(commands[command](argument))


def peak_memory() -> int:
    """Returns the process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the measurement ------------------------------------------------------------------------------------------------


def matrix_product_rate(size: int, precision: str) -> float:
    """Measures the operations per second of a product of square matrices."""
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    started = time.perf_counter()
    left @ right
    return 2 * size**3 / (time.perf_counter() - started)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures speed, memory and share of the machine's peak of each side, both losses, and the ratio of speeds."""
    torch.set_num_threads(options.threads)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in options.sides:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, options, theirs), daemon=True).start()

    def ask(name: str, command: str, argument: Any = None) -> Any:
        pipes[name].send((command, argument))
        return pipes[name].recv()

    result: dict[str, Any] = {}
    if set(options.sides) == set(SIDES):
        released = ask("released", "check")
        result["losses"] = [released["loss"], ask("ours", "check", released["features"])["loss"]]
    flops = {name: ask(name, "count", 0) for name in options.sides}  # also a warm-up
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in options.sides}
    peak = 0.0
    for number in range(1, options.rounds + 1):
        for name in options.sides:
            seconds[name].append(ask(name, "run", number))
        peak = max(peak, *(matrix_product_rate(size, options.precision) for size in MATRIX_SIZES))
    result["matrix_product_gflops"] = peak / 1e9
    for name in options.sides:
        batch = options.released_batch if name == "released" else options.batch
        step, cpu_step = (statistics.median(times) for times in zip(*seconds[name], strict=True))
        tokens = sum(len(text) for texts in draw_batch(options, batch, 1) for text in texts)
        result[name] = {
            "batch": batch,
            "seconds_per_step": step,
            "cpu_seconds_per_step": cpu_step,
            "images_per_second": batch / step,
            "tokens_per_second": tokens / step,
            "peak_memory_gib": ask(name, "memory") / 2**30,
            "gflop_per_image": flops[name] / batch / 1e9,
            "gflops": flops[name] / step / 1e9,
            "share_of_peak": flops[name] / step / peak,
        }
        pipes[name].send(None)
    if set(options.sides) == set(SIDES):
        released, ours = result["released"], result["ours"]
        result["ratio"] = ours["images_per_second"] / released["images_per_second"]
        cpu_per_image = [side["cpu_seconds_per_step"] / side["batch"] for side in (released, ours)]
        result["cpu_ratio"] = cpu_per_image[0] / cpu_per_image[1]
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the measurement as a Markdown table."""
    sides = [name for name in SIDES if name in result]
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for figure in result[sides[0]]:
        cells = [f"{result[name][figure]:.3g}" for name in sides]
        lines.append(f"| {figure.replace('_', ' ')} | " + " | ".join(cells) + " |")
    lines.append(f"\nThe machine's best matrix product: {result['matrix_product_gflops']:.0f} GFLOP/s.")
    if "ratio" in result:
        released, ours = result["losses"]
        lines.append(f"Loss on the same {CHECKED} images: released {released:.6f}, ours {ours:.6f}.")
        lines.append(
            f"Ours trains {result['ratio']:.1f} times as many images per second, "
            f"{result['cpu_ratio']:.1f} times by CPU time."
        )
    return "\n".join(lines)


def length_range(text: str) -> tuple[int, int]:
    """Parses "9" or "6-20"."""
    first, _, last = text.partition("-")
    lengths = int(first), int(last or first)
    if not 2 + CORNER_TOKENS < lengths[0] <= lengths[1] <= 128:
        raise argparse.ArgumentTypeError(f"{text} is not a valid range of lengths from {3 + CORNER_TOKENS} to 128")
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vision", default="vit_base_patch16_224", help="timm name of the released side's image tower")
    parser.add_argument("--text", default="bert-base", choices=TEXT_TOWERS, help="the text tower's size")
    parser.add_argument("--batch", type=int, default=64, help="our batch size")
    parser.add_argument("--released-batch", type=int, default=16)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--short", type=length_range, default="9", help="tokens of a short caption: 9, or 6-20")
    parser.add_argument("--long", type=length_range, default="34", help="tokens of a long text")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads per side")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, allow_nan=False) if options.json else table(result))


if __name__ == "__main__":
    main()
