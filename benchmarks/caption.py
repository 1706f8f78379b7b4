"""Compares the captioning speed with a plain loop over the images: `python -m benchmarks.caption`.

Ours is the captioner of kind `transformers`, as the caption stage runs it. The plain loop is the code of a model card:
for each image, it decodes the image, calls `processor` and `model.generate`, and decodes the text. Both have the same
weights, images, prompt and greedy decoding. Their texts must be equal, or the benchmark fails. A round runs both once.
Rates are medians over rounds, and the ratio is the median of the rounds' ratios. The default is one thread: with more,
threads wait for one another in the tiny model's small layers, especially in the loop. The model is a generated tiny
LLaVA with random weights; `--model` uses the model in a folder instead. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from lotlip.caption.captioners.transformers import TransformersCaptioner
from lotlip.caption.config import TransformersCaptionerConfig as Settings
from lotlip.core.compute import CaptionerCompute
from lotlip.data.records import Caption, ImageRecord
from tests.tiny_mllm import save_llava

SIZES = [(320, 240), (240, 320), (640, 480), (400, 400), (480, 270)]


class PlainLoop:
    """Captions one image after another, without this project's code."""

    def __init__(self, folder: Path, prompt: str, tokens: int) -> None:
        self.processor, self.tokens = AutoProcessor.from_pretrained(folder, trust_remote_code=False), tokens
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        self.text = prompt
        if self.processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            message = {"role": "user", "content": content}
            self.text = self.processor.apply_chat_template([message], add_generation_prompt=True)

    def __call__(self, records: list[ImageRecord]) -> tuple[list[str], int]:
        """Returns the texts and the number of generated tokens."""
        texts, count = [], 0
        for record in records:
            image = Image.open(io.BytesIO(record.image)).convert("RGB")
            inputs = self.processor(images=image, text=self.text, return_tensors="pt")
            with torch.inference_mode():
                (tokens,) = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
            tokens = tokens[inputs["input_ids"].shape[1] :]
            texts.append(self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
            count += len(tokens)
        return texts, count


def pictures(count: int) -> list[ImageRecord]:
    """Returns JPEG images of mixed sizes that take as long to decode as photographs."""
    rng, records = np.random.default_rng(0), []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
        records.append(ImageRecord(f"k{number}", file.getvalue(), "jpg", "a picture", width, height, ""))
    return records


def measure(model: Path | None, images: int, batch: int, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Returns images and tokens per second of both, and the ratio of ours to the loop."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = model or save_llava(Path(name))
        settings = Settings(
            kind="transformers",
            path=folder,
            model=str(folder),
            max_new_tokens=tokens,
            dtype="float32",
        )
        compute = CaptionerCompute(batch_size=batch, device="cpu")
        loop = PlainLoop(folder, settings.prompt, tokens)
        captioner = TransformersCaptioner("ours", settings, lambda text: len(text.split()), compute)
        records = pictures(images)
        loop(records[:2]), list(captioner.caption(records[:2]))  # warm-up: loads the weights
        seconds: dict[str, list[float]] = {"ours": [], "loop": []}
        for _ in tqdm(range(rounds), desc="rounds", disable=None):
            started = time.perf_counter()
            expected, count = loop(records)
            seconds["loop"].append(time.perf_counter() - started)
            started = time.perf_counter()
            items = list(captioner.caption(records))
            seconds["ours"].append(time.perf_counter() - started)
            texts = [item.text if isinstance(item, Caption) else "" for item in items]
            if texts != expected:
                raise AssertionError("texts of batches differ from those of single images")
    return {
        "images_per_second": {name: images / median(times) for name, times in seconds.items()},
        "tokens_per_second": {name: count / median(times) for name, times in seconds.items()},
        "tokens_per_image": count / images,
        "ours_over_loop": median(b / a for a, b in zip(seconds["ours"], seconds["loop"], strict=True)),
    }


def table(measured: dict[str, Any]) -> str:
    """Returns the measurement as a Markdown table."""
    lines = ["| | images/s | tokens/s |", "|---|---|---|"]
    for name, rate in measured["images_per_second"].items():
        lines.append(f"| {name} | {rate:.1f} | {measured['tokens_per_second'][name]:.0f} |")
    ratio = f"Ours over the plain loop: {measured['ours_over_loop']:.2f} times"
    return "\n".join([*lines, "", f"{ratio}, with equal texts of {measured['tokens_per_image']:.1f} tokens."])


def main() -> None:
    """Runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.caption", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: a tiny one with random weights)")
    for name, default in {"images": 64, "batch": 16, "tokens": 64, "threads": 1, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    measured = measure(**arguments)
    settings = {**arguments, "model": str(arguments["model"] or "tiny LLaVA")}
    print(json.dumps({**settings, **measured}, allow_nan=False) if as_json else table(measured))


if __name__ == "__main__":
    main()
