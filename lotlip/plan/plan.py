"""Estimates of a training run from its configuration: steps, tokens, FLOPs, memory, storage and time.

A plan lists the assumptions that it makes for unknown values. Sizes are in bytes, and 1 GB is 10⁹ bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from lotlip.config.params import Params
from lotlip.core.compute import TrainingCompute
from lotlip.core.section import merge
from lotlip.data.index import ShardIndex
from lotlip.models.text.siglip import SiglipTower
from lotlip.plan.flops import image_flops, step_flops
from lotlip.plan.memory import CONTEXT_BYTES, FP32, memory
from lotlip.plan.texts import TextLengths, text_lengths
from lotlip.plan.towers import Towers, build_towers, parameters
from lotlip.pretrain.checkpoint import KEPT
from lotlip.pretrain.config import PretrainConfig

# Defaults without shards: a JPEG of 256 pixels, and the texts of three captioners as JSON.
IMAGE_BYTES, JSON_BYTES = 30_000, 3_000


@dataclass(frozen=True)
class Gpu:
    """A GPU, by default an H100: memory in bytes, peak FLOP/s, and the fraction of the peak that training reaches."""

    memory: float = 80e9
    peak: float = 989e12
    utilisation: float = 0.4


@dataclass(frozen=True)
class Plan:
    """The estimated requirements of a run. Mappings are by component.

    Attributes:
        config: training settings of the ablation.
        compute: compute settings of the run.
        gpu: the GPU.
        trained, frozen: numbers of parameters.
        texts: mean text lengths.
        images: number of images in the data set; None if unknown.
        flops: FLOPs per step, over all GPUs.
        memory: bytes per GPU.
        feature_flops: FLOPs of the frozen tower over the data set, in the shard stage; 0 if features are not stored or
            the number of images is unknown.
        storage: bytes of the shards and of training outputs.
        remedy: what to change if memory is insufficient; else "".
        assumed: assumptions for unknown values.
    """

    config: PretrainConfig
    compute: TrainingCompute
    gpu: Gpu
    trained: dict[str, int]
    frozen: dict[str, int]
    texts: TextLengths
    images: int | None
    flops: dict[str, float]
    memory: dict[str, float]
    feature_flops: float
    storage: dict[str, float]
    remedy: str = ""
    assumed: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples trained on, counting repeats."""
        return self.config.steps * self.config.batch_size

    @property
    def used_images(self) -> int | None:
        """Number of images that are trained on, with `pretrain.samples`; None if unknown."""
        subset = self.config.samples
        if subset is None or subset >= 1:
            return self.images if subset is None else int(subset)
        return None if self.images is None else max(round(subset * self.images), 1)

    @property
    def epochs(self) -> float | None:
        """Number of times that each image that is trained on is read; None if unknown."""
        return self.samples / self.used_images if self.used_images else None

    @property
    def seconds(self) -> float:
        """Training time of one seed: FLOPs / (GPUs × peak × utilisation)."""
        throughput = self.compute.processes * self.gpu.peak * self.gpu.utilisation
        return self.config.steps * sum(self.flops.values()) / throughput

    @property
    def feature_seconds(self) -> float:
        """Time to compute the frozen features in the shard stage, on one GPU."""
        return self.feature_flops / (self.gpu.peak * self.gpu.utilisation)

    def to_json(self) -> dict[str, Any]:
        """Converts the plan to JSON types."""
        return {
            "gpus": self.compute.processes,
            "gpu": vars(self.gpu),
            "parameters": {"trained": self.trained, "frozen": self.frozen},
            "steps": self.config.steps,
            "gradient_accumulation_steps": self.compute.gradient_accumulation_steps,
            "samples": self.samples,
            "images": self.used_images,
            "epochs": self.epochs,
            "tokens_per_text": {"short": self.texts.short, "long": self.texts.long},
            "tokens": self.samples * self.texts.tokens,
            "flops_per_step": self.flops,
            "memory_bytes_per_gpu": self.memory,
            "storage_bytes": self.storage,
            "feature_seconds": self.feature_seconds,
            "seconds": self.seconds,
            "remedy": self.remedy,
            "assumed": self.assumed,
        }


def plan(
    params: Params,
    config: PretrainConfig,
    compute: TrainingCompute,
    gpu: Gpu,
    index: ShardIndex | None = None,
    images: int | None = None,
) -> Plan:
    """Estimates the requirements of a run.

    Args:
        params: params.yaml, for image tower, captioners and shards.
        config: training settings of the ablation.
        compute: compute settings, with the number of GPUs as `processes`.
        gpu: the GPU.
        index: the shards' index.json, if they exist; its numbers replace assumed ones.
        images: number of images in the data set; default: from `index`.

    Raises:
        ValueError: the sizes of the pretrained text tower are not available locally, or there are fewer images than
            `pretrain.samples`.
    """
    assumed: list[str] = []
    towers = build_towers(config, params.image_tower, assumed, params.pretrain.start)
    statistics = {name: index.statistics[name] for name in ("raw", *index.describers)} if index else {}
    texts = text_lengths(config, statistics, assumed)
    if isinstance(towers.model.text, SiglipTower):  # reads every text padded to its context
        texts = replace(texts, short=float(config.text.context_length), long=float(config.text.context_length))
    if images is None and index:
        images = index.splits["train"].samples
    if images and config.samples and config.samples > images:
        raise ValueError(f"pretrain.samples is {config.samples}, but there are {images} training images; set it lower")
    required = memory(config, compute, towers, texts)
    assumed.append(f"{CONTEXT_BYTES / 1e9:.1f} GB for CUDA, cuBLAS and NCCL; no fragmentation")
    assumed.append(f"{gpu.utilisation:.0%} of {gpu.peak / 1e12:.0f} TFLOP/s are used, and no step waits for data")
    return Plan(
        config,
        compute,
        gpu,
        *parameters(config, towers),
        texts,
        images,
        step_flops(config, compute, towers, texts),
        required,
        float(images * image_flops(towers.image)) if images and params.shard.store_features else 0.0,
        storage(params, config, towers, index, images, assumed),
        "" if sum(required.values()) <= gpu.memory else remedy(config, compute, towers, texts, gpu),
        assumed,
    )


def on_gpus(
    config: PretrainConfig, compute: TrainingCompute, gpus: int, differences: Mapping[str, Any] | None = None
) -> tuple[PretrainConfig, TrainingCompute]:
    """Adapts a configuration to another number of GPUs, keeping the micro-batch if accumulation steps allow it.

    Args:
        config: training settings of the ablation.
        compute: current compute settings.
        gpus: total number of GPUs.
        differences: changes to params.yaml, as in infra/gpus: "pretrain" and "compute.training".

    Raises:
        ValueError: the batch cannot be divided among the GPUs.
    """
    steps = max(1, compute.processes * compute.gradient_accumulation_steps // gpus)
    base = compute.model_dump(mode="json", exclude_unset=True)
    base |= {"launch": {"kind": "local"}, "processes": gpus, "gradient_accumulation_steps": steps}
    if gpus > 1:
        base["parallel_seeds"] = 1  # parallel seeds need a single process per seed
    changes = differences or {}
    compute_changes = changes.get("compute", {}).get("training", {})
    try:
        recipe = merge(config.model_dump(mode="json", exclude_unset=True), changes.get("pretrain", {}))
        adapted = PretrainConfig.model_validate(recipe), TrainingCompute.model_validate({**base, **compute_changes})
        adapted[1].check_batch_size(config.batch_size)
    except ValidationError as error:
        reasons = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ValueError(f"{gpus} GPUs cannot train this: {reasons}") from None
    except ValueError as error:
        raise ValueError(f"{gpus} GPUs cannot train this: {error}") from None
    return adapted


def images_by_name(name: str) -> int | None:
    """Reads the number of images from a data set's name, in millions.

    >>> images_by_name("lotlip-100m")
    100000000
    """
    match = re.search(r"(\d+)m$", name)
    return int(match[1]) * 1_000_000 if match else None


def remedy(config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths, gpu: Gpu) -> str:
    """Finds the smallest change that makes a run fit: accumulation first, then ZeRO, then GPUs or batch size."""
    for stage in range(compute.zero_stage, 4):
        for accumulation in range(compute.gradient_accumulation_steps, config.batch_size // compute.processes // 2 + 1):
            if config.batch_size % (compute.processes * accumulation):
                continue
            changed = compute.model_copy(update={"gradient_accumulation_steps": accumulation, "zero_stage": stage})
            if sum(memory(config, changed, towers, texts).values()) <= gpu.memory:
                more = f" and zero_stage to {stage}" if stage > compute.zero_stage else ""
                return f"raise compute.training.gradient_accumulation_steps to {accumulation}{more}"
    return "use more GPUs or lower pretrain.batch_size; neither accumulation nor ZeRO is enough"


def storage(
    params: Params,
    config: PretrainConfig,
    towers: Towers,
    index: ShardIndex | None,
    images: int | None,
    assumed: list[str],
) -> dict[str, float]:
    """Estimates bytes on disk: per sample and of all shards, of a checkpoint and of all kept at once, and of the
    published model."""
    train = index.splits["train"] if index else None
    if train and train.samples:
        sample = sum(shard.bytes for shard in train.shards) / train.samples
    else:
        members = [IMAGE_BYTES, JSON_BYTES]
        if params.shard.store_features:
            members.append(128 + FP32 * towers.model.config.embed_dim)
        sample = sum(512 + 512 * math.ceil(size / 512) for size in members)  # tar: a header and padded blocks
        assumed.append(f"{IMAGE_BYTES / 1e3:.0f} kB per stored image and {JSON_BYTES / 1e3:.0f} kB for its texts")
    checkpoint = float(3 * FP32 * towers.trained)  # fp32 weights and AdamW moments, for any precision and ZeRO stage
    frozen = sum(value.numel() for value in towers.image.parameters()) if config.image_tower.frozen else 0
    total = {"shards": float(sample * images)} if images else {}
    return {
        "sample": float(sample),
        **total,
        "checkpoint": checkpoint,
        "peak checkpoints": (KEPT + 1) * checkpoint,
        "model": float(FP32 * (towers.trained + frozen)),
    }
