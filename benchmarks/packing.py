"""Compares packed with padded texts in each family of text towers: `python -m benchmarks.packing`.

The padded side is the encoder of transformers with this project's masks, one call for the short captions and one for
the long texts. The packed side is what training runs. Both have the same random weights and texts; their features are
compared first. They alternate, one forward and backward pass at a time, so that other work on the machine slows both.
CPU times are medians over rounds, and the ratio is the median of the rounds' ratios. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.packing import TextBatch
from lotlip.models.text.text_tower import TextTower, build_text_tower

CORNERS, WORDS = 2, 1000
START, END, PAD = 998, 999, 1
SHORT = (8, 16)  # tokens of short captions
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 200},
    "modernbert": {"cls_token_id": START, "sep_token_id": END},
    "clip_text_model": {"max_position_embeddings": 128, "projection_dim": 64},
    "siglip_text_model": {"max_position_embeddings": 128, "projection_size": 64},
}
TOLERANCE = 1e-3  # largest difference of features


def build(family: str, width: int, layers: int) -> TextTower:
    """Returns a tower with random weights and two corner tokens."""
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # of BERT and RoBERTa
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "vocab_size": WORDS + CORNERS}
    config = LotlipConfig(
        text_config={"model_type": family, **sizes, **dropout, **ids, **FAMILIES[family]},
        embed_dim=64,
        context_length=128,
        corner_tokens=CORNERS,
    )
    torch.manual_seed(0)
    return build_text_tower(config).train()


def draw(tower: TextTower, number: int, limits: tuple[int, int], short: bool) -> TextBatch:
    """Returns texts with uniformly distributed numbers of tokens, from the fewest to the most."""
    generator = torch.Generator().manual_seed(limits[1])
    lengths = torch.randint(limits[0], limits[1] + 1, (number,), generator=generator)
    ids = torch.full((number, int(lengths.max())), PAD)
    corners = torch.arange(WORDS, WORDS + CORNERS) if tower.first_word > 1 else torch.arange(0)  # else appended later
    for row, length in zip(ids, lengths.tolist(), strict=True):
        words = torch.randint(5, START, (length - 2 - len(corners),), generator=generator)
        row[:length] = torch.cat([torch.tensor([START]), corners, words, torch.tensor([END])])
    return TextBatch(ids, lengths, short)


def encode(tower: TextTower, batches: list[TextBatch], packed: bool) -> Tensor:
    """Returns the features of all texts, [Σ B·K, D]."""
    features = tower.encode(*batches) if packed else TextTower.encode(tower, *batches)
    return torch.cat([part.flatten(0, 1) for part in features])


def measure(family: str, options: argparse.Namespace) -> dict[str, float]:
    """Measures CPU seconds of a pass of both sides, and how many times as fast the packed one is."""
    tower = build(family, options.width, options.layers)
    batches = [draw(tower, options.texts, SHORT, True), draw(tower, options.texts, options.long, False)]
    with torch.no_grad():
        packed, padded = encode(tower, batches, True), encode(tower, batches, False)
    if (difference := (packed - padded).abs().max().item()) > TOLERANCE:
        raise AssertionError(f"the features of {family} differ by {difference}")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(options.rounds + 1):
        for side, times in seconds.items():
            start = time.process_time()
            encode(tower, batches, side).square().mean().backward()
            if number:  # the first round warms up
                times.append(time.process_time() - start)
    return {
        "packed_seconds": median(seconds[True]),
        "padded_seconds": median(seconds[False]),
        "times_as_fast": median(b / a for a, b in zip(seconds[True], seconds[False], strict=True)),
        "padding": 1 - float(batches[1].lengths.sum()) / batches[1].ids.numel(),  # share of the long texts' tokens
    }


def main() -> None:
    """Runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__.splitlines()[0])
    for name, default in {"width": 256, "layers": 4, "texts": 64, "rounds": 7, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--long", type=int, nargs=2, default=(20, 77), help="tokens of long texts: fewest and most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = {family: measure(family, options) for family in FAMILIES}
    if options.json:
        print(json.dumps(measured, allow_nan=False))
        return
    print("| family | packed, CPU ms | padded, CPU ms | times as fast |\n|---|---|---|---|")
    for family, figures in measured.items():
        packed, padded = (1e3 * figures[f"{side}_seconds"] for side in ("packed", "padded"))
        print(f"| {family} | {packed:.0f} | {padded:.0f} | {figures['times_as_fast']:.2f} |")


if __name__ == "__main__":
    main()
