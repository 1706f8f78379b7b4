"""Checks and measures this project on a GPU, in at most ten minutes: `python -m benchmarks.gpu`.

Each part runs in its own process, so that an error in one loses only its own figures. `--json` prints one object.
Without a GPU it says so and exits with 0. `--small --device cpu` runs the same code with tiny models on any machine.

Parts:
    equal: features of images and texts equal the CPU's, fp32 and bf16.
    images: images per second for features, ViT-B/16 in bf16, with and without torch.compile.
    bert: training step of BERT-base on stored features, bf16.
    clip: training step of CLIP B/16 with both towers trained, bf16.
    resume: training that is killed and resumed gives the same weights, bit for bit.
    fork: a fork of a process that has imported everything uses the GPU.
    captions: captions per second of a LLaVA of 0.4 B parameters with random weights, in bf16.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.caption import pictures
from benchmarks.train_step import draw_texts, padded
from lotlip.caption.captioners.transformers import TransformersCaptioner
from lotlip.caption.config import TransformersCaptionerConfig
from lotlip.core.compute import CaptionerCompute, TrainingCompute
from lotlip.core.temporary import temporary_folder
from lotlip.data.records import Caption
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.vision.image_tower import build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.plan.flops import step_flops
from lotlip.plan.memory import memory
from lotlip.plan.texts import TextLengths
from lotlip.plan.towers import Towers
from lotlip.pretrain.checkpoint import Checkpoints
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import Engine, initialise_processes
from lotlip.pretrain.loader import Batch
from lotlip.pretrain.model import LotlipForPreTraining
from tests.tiny_mllm import save_llava

CORNERS = 2
SHORT, LONG = (8, 16), (60, 77)  # tokens of short captions and long texts
TOLERANCE, COSINE = 1e-4, 0.99  # largest difference of fp32 features, smallest cosine of bf16 features
PART_SECONDS = 150
# sizes of CLIP B/16 and of a Llama of 0.4 B parameters
LLAVA_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
LLAVA_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


class Scale:
    """Sizes of the models and batches.

    Args:
        small: tiny sizes, to run the code on any machine.
    """

    def __init__(self, small: bool) -> None:
        tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        self.bert: dict[str, Any] = dict(tower) if small else {}
        self.clip_text: dict[str, Any] = {**tower, "projection_dim": 32} if small else {"projection_dim": 512}
        self.clip_image = {**tower, "image_size": 32, "patch_size": 16} if small else {"image_size": 224}
        self.vit = {"embed_dim": 32, "depth": 2, "num_heads": 2} if small else {}
        self.image_size = 32 if small else 224
        self.features_batch, self.bert_batch, self.clip_batch = (4, 16, 8) if small else (512, 4096, 1024)
        self.micro_batch = 8 if small else 1024
        self.llava_vision, self.llava_text = ({}, {}) if small else (LLAVA_VISION, LLAVA_TEXT)
        self.captioned, self.captions_batch, self.caption_tokens = (8, 4, 8) if small else (256, 64, 128)
        self.matrix, self.rounds = (128, 2) if small else (8192, 8)

    def vit_spec(self) -> ImageTowerSpec:
        """Returns the ViT-B/16 of the paper."""
        return ImageTowerSpec("vit_base_patch16_224", self.image_size, self.vit)

    def bert_config(self) -> LotlipConfig:
        """Returns the paper's model: BERT-base and ViT-B/16."""
        text = {"vocab_size": 30522 + CORNERS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        width = self.vit.get("embed_dim", 768)
        spec = self.vit_spec().to_json()
        return LotlipConfig({**text, **self.bert}, spec, embed_dim=width, corner_tokens=CORNERS)

    def clip_config(self) -> LotlipConfig:
        """Returns CLIP B/16 with corner tokens."""
        width = self.clip_text["projection_dim"]
        vision = {"model_type": "clip_vision_model", "patch_size": 16, **self.clip_image}
        spec = ImageTowerSpec(
            "clip_vision_model",
            self.image_size,
            {"config": vision, "projection_dim": width},
            library="transformers",
            pooling="model",
        )
        text = {"model_type": "clip_text_model", "vocab_size": 49408 + CORNERS, **self.clip_text}
        return LotlipConfig(text, spec.to_json(), embed_dim=width, context_length=77, corner_tokens=CORNERS)


# --- parts ------------------------------------------------------------------------------------------------------------


def equal(device: str, scale: Scale) -> dict[str, Any]:
    """Compares features with the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {"tolerance": TOLERANCE, "least_cosine": COSINE}
    for name, config in (("bert", scale.bert_config()), ("clip", scale.clip_config())):
        torch.manual_seed(0)
        model = LotlipModel(config).eval()
        pixels = torch.randn(8, 3, scale.image_size, scale.image_size)
        ids, lengths = texts(config, 8, LONG)
        expected = features(model, pixels, ids, lengths)
        model.to(device)
        inputs = [tensor.to(device) for tensor in (pixels, ids, lengths)]
        for kind, on_device in (("texts", 1), ("images", 0)):
            exact = features(model, *inputs)[on_device].cpu()
            found[f"{name}_{kind}_difference"] = (exact - expected[on_device]).abs().max().item()
        model.to(torch.bfloat16)
        rounded = features(model, inputs[0].bfloat16(), *inputs[1:])
        for kind, index in (("texts", 1), ("images", 0)):
            cosine = torch.nn.functional.cosine_similarity(rounded[index].float().cpu(), expected[index], dim=-1)
            found[f"{name}_{kind}_bf16_cosine"] = cosine.min().item()
    differences = [value for key, value in found.items() if key.endswith("_difference")]
    cosines = [value for key, value in found.items() if key.endswith("_cosine") and key != "least_cosine"]
    found["equal"] = max(differences) <= TOLERANCE and min(cosines) >= COSINE
    return found


def images(device: str, scale: Scale) -> dict[str, Any]:
    """Measures images per second."""
    tower = build_image_tower(scale.vit_spec()).eval().to(device)
    pixels = torch.randn(scale.features_batch, 3, scale.image_size, scale.image_size, device=device)
    found: dict[str, Any] = {"batch": scale.features_batch}
    for name, run in (("plain", tower), ("compiled", torch.compile(tower))):

        def step(run: Any = run) -> None:
            with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16):
                run(pixels)

        found[f"{name}_images_per_second"] = scale.features_batch / median_seconds(step, device, scale.rounds)
    return found


def bert(device: str, scale: Scale) -> dict[str, Any]:
    """Measures the step of BERT-base on stored features."""
    return training_step(device, scale, scale.bert_config(), scale.bert_batch, frozen=True)


def clip(device: str, scale: Scale) -> dict[str, Any]:
    """Measures the step of CLIP B/16 with both towers trained."""
    return training_step(device, scale, scale.clip_config(), scale.clip_batch, frozen=False)


def resume(device: str, scale: Scale) -> dict[str, Any]:
    """Kills a process in training and resumes it in another one."""
    with temporary_folder("resume") as folder:
        results = []
        for name, kill in (("whole", False), ("resumed", True), ("resumed", False)):
            child = multiprocessing.get_context("spawn").Process(
                target=train_steps, args=(device, scale, folder / name, kill)
            )
            child.start()
            child.join()
            results.append(child.exitcode)
        whole, resumed = (torch.load(folder / name / "weights.pt", weights_only=True) for name in ("whole", "resumed"))
        same = all(torch.equal(value, resumed[key]) for key, value in whole.items())
    return {"killed": results[1] == -signal.SIGKILL, "bit_for_bit": same}


def fork(device: str, scale: Scale) -> dict[str, Any]:
    """Forks this process, which has imported everything but not used the GPU, as the fork server does."""
    child = os.fork()
    if not child:
        try:
            found = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
            os._exit(int(found.sum().item() != 64**3))
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return {"works": os.waitpid(child, 0)[1] == 0}


def captions(device: str, scale: Scale) -> dict[str, Any]:
    """Measures captions and tokens per second of the captioner of kind `transformers`."""
    with temporary_folder("captions") as folder:
        save_llava(folder, scale.llava_vision, scale.llava_text)
        settings = TransformersCaptionerConfig(
            kind="transformers",
            path=folder,
            model=str(folder),
            max_new_tokens=scale.caption_tokens,
            dtype="bfloat16",
        )
        compute = CaptionerCompute(batch_size=scale.captions_batch, device=device)
        captioner = TransformersCaptioner("llava", settings, lambda text: len(text.split()), compute)
        records = pictures(scale.captioned)
        list(captioner.caption(records[: scale.captions_batch]))  # loads the model
        start = time.perf_counter()
        items = list(captioner.caption(records))
        seconds = time.perf_counter() - start
    written = [item.tokens for item in items if isinstance(item, Caption)]
    return {
        "batch": scale.captions_batch,
        "captions_per_second": len(items) / seconds,
        "words_per_caption": sum(written) / len(items),
        "failed": len(items) - len(written),
    }


PARTS: dict[str, Callable[[str, Scale], dict[str, Any]]] = {
    part.__name__: part for part in (equal, images, bert, clip, resume, fork, captions)
}


# --- what they share --------------------------------------------------------------------------------------------------


def texts(config: LotlipConfig, number: int, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns random token ids [B, L] and lengths [B]."""
    if config.text_config.model_type == "bert":
        return padded(draw_texts(number, lengths, f"{number} {lengths}"))
    rng = random.Random(f"{number} {lengths}")
    words = [[rng.randrange(1000, 49000) for _ in range(rng.randint(*lengths) - 2)] for _ in range(number)]
    return padded([[49406, *text, 49407] for text in words])


def features(model: LotlipModel, pixels: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns normalised features of images and of texts."""
    with torch.inference_mode():
        return model.encode_image(pixels), model.encode_text(ids, lengths)[:, 0]


def median_seconds(step: Callable[[], object], device: str, rounds: int) -> float:
    """Returns the median time of a step, after two that warm up."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def settings(config: LotlipConfig, batch: int, frozen: bool) -> PretrainConfig:
    """Returns settings of `pretrain` for a model."""
    text = {"corner_tokens": CORNERS, "context_length": config.context_length}
    return PretrainConfig.model_validate(
        {
            "steps": 1000,
            "batch_size": batch,
            "precision": "bf16",
            "text": text,
            "image_tower": {"frozen": frozen},
            "optimizer": {"warmup_steps": 1},
        }
    )


def batch_of(config: LotlipConfig, size: int, image_size: int, frozen: bool) -> Batch:
    """Returns a random batch with one long text per image."""
    shape = (config.embed_dim,) if frozen else (3, image_size, image_size)
    pictures = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))
    return Batch(
        [str(number) for number in range(size)], pictures, *texts(config, size, SHORT), *texts(config, size, LONG)
    )


def build(scale: Scale, config: LotlipConfig, batch: int, frozen: bool) -> tuple[Engine, TrainingCompute]:
    """Returns an engine with random weights, which are the same in every process."""
    compute = TrainingCompute(gradient_accumulation_steps=max(batch // scale.micro_batch, 1))
    initialise_processes(compute)
    torch.manual_seed(0)
    model = LotlipForPreTraining(config, image_tower=not frozen)
    return Engine(model.train(), settings(config, batch, frozen), compute, seed=0), compute


def training_step(device: str, scale: Scale, config: LotlipConfig, batch: int, frozen: bool) -> dict[str, Any]:
    """Measures samples per second, the share of the measured peak of matrix products, and memory."""
    half = torch.randn(scale.matrix, scale.matrix, device=device, dtype=torch.bfloat16)
    peak = 2 * scale.matrix**3 / median_seconds(lambda: half @ half, device, scale.rounds)
    engine, compute = build(scale, config, batch, frozen)
    parts = batch_of(config, batch, scale.image_size, frozen).by_length(compute.gradient_accumulation_steps)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    steps = iter(range(1000))
    seconds = median_seconds(lambda: engine.step(parts, next(steps)), device, scale.rounds)
    lengths = TextLengths(sum(SHORT) / 2, sum(LONG) / 2, 1)
    with torch.device("meta"):
        tower = build_image_tower(ImageTowerSpec.from_json(config.image_config))
        towers = Towers(LotlipForPreTraining(config, image_tower=not frozen), tower)
    planned = settings(config, batch, frozen)
    flops = sum(step_flops(planned, compute, towers, lengths).values())
    found = {
        "batch": batch,
        "micro_batch": batch // compute.gradient_accumulation_steps,
        "samples_per_second": batch / seconds,
        "measured_peak_tflops": peak / 1e12,
        "share_of_peak": flops / seconds / peak,
        "planned_memory_gb": sum(memory(planned, compute, towers, lengths).values()) / 1e9,
    }
    if device.startswith("cuda"):
        found["peak_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def train_steps(device: str, scale: Scale, folder: Path, kill: bool) -> None:
    """Trains six steps from the last checkpoint, with a checkpoint after the third, and saves the weights.

    Args:
        device: of the benchmark.
        scale: sizes.
        folder: of checkpoints and weights.
        kill: kill this process after the fourth step.
    """
    config = scale.bert_config()
    engine, compute = build(scale, config, scale.micro_batch, frozen=True)
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.load(engine.deepspeed)
    parts = batch_of(config, scale.micro_batch, scale.image_size, True).by_length(compute.gradient_accumulation_steps)
    for step in range(state["step"] if state else 0, 6):
        engine.step(parts, step)
        if step == 2:
            checkpoints.save(engine.deepspeed, 3, {})
        if step == 3 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save({name: value.cpu() for name, value in engine.model.state_dict().items()}, folder / "weights.pt")


def run_part(part: Callable[[str, Scale], dict[str, Any]], device: str, small: bool, results: Connection) -> None:
    """Runs a part in its own process and sends its figures or its error."""
    try:
        start = time.perf_counter()
        found = part(device, Scale(small))
        results.send(found | {"seconds": time.perf_counter() - start})
    except Exception as error:
        results.send({"error": f"{type(error).__name__}: {error}"})


def measure(device: str, small: bool, parts: list[str]) -> dict[str, Any]:
    """Returns part → its figures, or {"error": reason}."""
    # Neither CUDA nor the threads of OpenMP, which the caller may have used, survive a fork. Forks of a new process
    # save the imports.
    context: Any = multiprocessing.get_context("spawn" if device.startswith("cuda") else "forkserver")
    context.set_forkserver_preload([__name__])
    found: dict[str, Any] = {}
    for name in parts:
        results, sender = context.Pipe(duplex=False)
        process = context.Process(target=run_part, args=(PARTS[name], device, small, sender))
        process.start()
        sender.close()  # so that the end of the process ends the wait
        if results.poll(PART_SECONDS):
            try:
                found[name] = results.recv()
            except EOFError:
                process.join()
                found[name] = {"error": f"the process ended with {process.exitcode}"}
        else:
            found[name] = {"error": f"no result after {PART_SECONDS} s"}
            process.kill()
        process.join()
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Runs the parts and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script on any machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch finds no GPU on this machine, so nothing is measured")
        return
    found = measure(options.device, options.small, options.parts or list(PARTS))
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    result = {"device": name, "torch": torch.__version__, **found}
    if options.json:
        print(json.dumps(result, allow_nan=False))
        return
    for part, figures in result.items():
        print(part, figures if isinstance(figures, str) else "")
        if isinstance(figures, dict):
            for figure, value in figures.items():
                print(f"  {figure:<28} {value:.6g}" if isinstance(value, float) else f"  {figure:<28} {value}")


if __name__ == "__main__":
    main()
