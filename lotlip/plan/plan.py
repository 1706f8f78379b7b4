"""Estimates of a training run from its configuration: steps, tokens, FLOPs, memory, storage and time.

Towers are built on the meta device, where tensors have shapes but no data. A plan lists the assumptions that it makes
for unknown values. Sizes are in bytes, and 1 GB is 10⁹ bytes. FLOPs are those of matrix products, with 2 per
multiply-add.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from timm.models import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PretrainedConfig

from lotlip.config.params import Params
from lotlip.core.compute import TrainingCompute
from lotlip.core.section import merge
from lotlip.data.index import ShardIndex
from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.data.text import Sampler
from lotlip.evaluate.flops import text_tower_flops
from lotlip.image_tower.config import ImageTowerConfig as ImageTowerSettings
from lotlip.image_tower.config import (
    OpenClipTowerConfig,
    PackagedTowerConfig,
    SceneTowerConfig,
    StartTowerConfig,
    TimmTowerConfig,
    TransformersTowerConfig,
)
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.bert import BertTower
from lotlip.models.text.siglip import SiglipTower
from lotlip.models.text.text_tower import TextTower
from lotlip.models.vision.image_tower import ImageTower, build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.objectives.contrastive import LOGITS_AT_ONCE
from lotlip.pretrain.checkpoint import KEPT
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.config import TextTowerConfig as TextTowerSettings
from lotlip.pretrain.engine import deepspeed_config
from lotlip.pretrain.initialisation import WHOLE_MODELS, text_config
from lotlip.pretrain.model import LotlipForPreTraining

FP32 = 4
# Defaults without shards: word pieces of a short caption, and of a sub-caption including its full stop.
SHORT_TOKENS, SUB_CAPTION_TOKENS = 10, 20
# Defaults without shards: a JPEG of 256 pixels, and the texts of three captioners as JSON.
IMAGE_BYTES, JSON_BYTES = 30_000, 3_000
# Memory of CUDA, cuBLAS and NCCL before the first tensor.
CONTEXT_BYTES = 1.5e9
# Number of logit matrices in memory: similarities and logits kept for the backward pass; or, for a block at a time, its
# matrices with their gradients.
LOGITS_KEPT, LOGITS_PER_BLOCK = 2, 5


@dataclass(frozen=True)
class Gpu:
    """A GPU, by default an H100: memory in bytes, peak FLOP/s, and the fraction of the peak that training reaches."""

    memory: float = 80e9
    peak: float = 989e12
    utilisation: float = 0.4


@dataclass(frozen=True)
class Towers:
    """Both towers on the meta device.

    Attributes:
        model: the module that DeepSpeed wraps; its image tower is None if frozen.
        image: the image tower, frozen or not.
    """

    model: LotlipForPreTraining
    image: ImageTower

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class TextLengths:
    """Mean lengths in tokens, including special and corner tokens.

    Attributes:
        short: tokens of a short caption.
        long: tokens of a long text.
        per_image: long texts per image and step (K).
    """

    short: float
    long: float
    per_image: int

    @property
    def tokens(self) -> float:
        """Tokens per sample."""
        return self.short + self.per_image * self.long


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
    if config.similarity == "late-interaction":
        assumed.append("products and similarities of late interaction are not counted")
    return Plan(
        config,
        compute,
        gpu,
        *parameters(config, towers),
        texts,
        images,
        step_flops(config, compute, towers, texts),
        required,
        float(images * _image_flops(towers.image)) if images and params.shard.store_features else 0.0,
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


# --- towers -------------------------------------------------------------------------------------------------------


def build_towers(
    config: PretrainConfig, image: ImageTowerSettings, assumed: list[str] | None = None, start: str | None = None
) -> Towers:
    """Builds both towers on the meta device.

    Args:
        config: training settings of the ablation.
        image: section `image_tower` of params.yaml.
        assumed: receives assumptions for unknown sizes.
        start: `pretrain.start`, whose image tower is used if `image` says so.

    Raises:
        ValueError: the sizes of the pretrained text tower are not available locally, or the kind of image tower is
            unknown.
    """
    encoder: PretrainedConfig | None = None
    if isinstance(image, SceneTowerConfig):
        from lotlip.demo.tower import scenes_spec

        spec = scenes_spec(image)
    elif isinstance(image, TimmTowerConfig):
        from lotlip.image_tower.timm import timm_spec

        spec = timm_spec(image)
    elif isinstance(image, PackagedTowerConfig):
        from lotlip.image_tower.packaged import packaged_spec

        spec = packaged_spec(image)
    elif isinstance(image, TransformersTowerConfig):
        from lotlip.image_tower.transformers import transformers_spec

        spec = transformers_spec(image, local_files_only=True)
    elif isinstance(image, OpenClipTowerConfig):
        from lotlip.image_tower.open_clip import open_clip_spec

        spec = open_clip_spec(image)
    elif isinstance(image, StartTowerConfig) and start:
        from lotlip.importing.start import open_start

        opened = open_start(start, local_files_only=True)
        spec = ImageTowerSpec.from_json(opened.config.image_config)
        if config.start:
            encoder = _extended(opened.config.text_config, opened.tokenizer.vocabulary_size, config.text)
    else:
        raise ValueError(f"`lotlip plan` does not support image towers of kind {image.kind}")
    with torch.device("meta"):
        tower = build_image_tower(spec)
        model = LotlipForPreTraining(
            LotlipConfig(
                text_config=encoder or _encoder_config(config.text, assumed),
                image_config=spec.to_json(),
                embed_dim=tower.width,
                context_length=config.text.context_length,
                corner_tokens=config.text.corner_tokens,
                corner_mask=config.text.corner_mask,
                register_tokens=config.text.register_tokens,
                similarity=config.similarity,
                logit_bias=config.loss.objective == "siglip",
            ),
            image_tower=not config.image_tower.frozen,
        )
        model.add_objective(config.loss, tower.token_width)
    return Towers(model, tower)


def _encoder_config(text: TextTowerSettings, assumed: list[str] | None) -> PretrainedConfig:
    """Returns the encoder's configuration; that of a pretrained one is read from its folder or the hub's cache."""
    tokenizer = open_tokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)
    sizes = {"model_type": "bert", "pad_token_id": tokenizer.pad_id, **text.config}
    model: Any = AutoConfig.for_model(**sizes)
    if text.pretrained:
        try:
            seeds = sorted(Path(text.pretrained).glob("seed-*"))  # an ablation's folder has a model per seed
            name = str(seeds[0]) if seeds else text.pretrained
            model = text_config(name, text.config, text.revision, local_files_only=True)
        except OSError as error:
            if not text.pretrained.endswith("bert-base-uncased"):
                raise ValueError(
                    f"the sizes of text.pretrained {text.pretrained} are not available locally; train it first, "
                    f"download it (`hf download {text.pretrained}`), or give its folder"
                ) from error
            if assumed is not None:
                assumed.append(f"{text.pretrained} has BERT-base's sizes (it is not on this machine)")
    encoder = model.text_config if model.model_type in ("lotlip", *WHOLE_MODELS) else model
    return _extended(encoder, tokenizer.vocabulary_size, text)


def _extended(encoder: PretrainedConfig, words: int, text: TextTowerSettings) -> PretrainedConfig:
    """Returns the configuration of an encoder with corner and register tokens and interpolated positions."""
    encoder.vocab_size = words + text.corner_tokens + text.register_tokens
    if text.position_interpolation:
        encoder.max_position_embeddings = text.position_interpolation.interpolated
    return encoder


def parameters(config: PretrainConfig, towers: Towers) -> tuple[dict[str, int], dict[str, int]]:
    """Counts trained and frozen parameters by component; the trained ones add up to `towers.trained`."""
    text = towers.model.text
    width = text.transformer.config.hidden_size
    extra = (config.text.corner_tokens + config.text.register_tokens) * width
    encoder = sum(value.numel() for value in text.parameters()) - text.proj.weight.numel()
    image = sum(value.numel() for value in towers.image.parameters())
    trained = {
        "text encoder": encoder - extra,
        "corner and register tokens": extra,
        "projection": text.proj.weight.numel(),
        "temperature and bias": 1 + (config.loss.objective == "siglip"),
    }
    if objective := sum(value.numel() for value in towers.model.objective.parameters()):
        trained["modules of the objective"] = objective
    return (trained, {"image tower": image}) if config.image_tower.frozen else ({**trained, "image tower": image}, {})


# --- tokens and FLOPs ---------------------------------------------------------------------------------------------


def text_lengths(
    config: PretrainConfig, statistics: Mapping[str, Any], assumed: list[str] | None = None
) -> TextLengths:
    """Estimates the mean lengths of texts in a step; a [SEP] replaces each full stop.

    Args:
        config: training settings of the ablation.
        statistics: statistics of the shards: "raw" or captioner → sub_captions_per_text, tokens_per_text; empty without
            shards.
        assumed: receives assumptions for missing statistics.

    Raises:
        ValueError: the ablation uses captions that the shards do not have.
    """
    text, long_texts = config.text, config.long_texts
    fixed = 1 + text.corner_tokens + text.register_tokens
    if not statistics and assumed is not None:
        assumed.append(
            f"{SHORT_TOKENS} word pieces per short caption, {SUB_CAPTION_TOKENS} per sub-caption (there are no shards)"
        )
    short = statistics["raw"]["tokens_per_text"] if statistics else SHORT_TOKENS
    window = float(long_texts.sub_captions * SUB_CAPTION_TOKENS)
    captioners = long_texts.captioners or [name for name in statistics if name != "raw"]
    if missing := [name for name in captioners if statistics and name not in statistics]:
        available = ", ".join(name for name in statistics if name != "raw") or "none"
        raise ValueError(
            f"long_texts.captioners names {', '.join(missing)}, but the shards have captions by {available}; "
            "rewrite the shards (`dvc repro shard`) or remove these captioners"
        )
    if statistics and captioners:
        sampler, sub_captions = long_texts.sampler, long_texts.sub_captions
        window = fmean(_window(statistics[name], sampler, sub_captions) for name in captioners)
        of_short = config.short_texts.sampler
        if of_short != "raw" and of_short != "raw-or-rewrite":  # rewrites are about as long as short captions
            short = fmean(_window(statistics[name], of_short, 1) for name in captioners)
    limit = text.context_length
    per_image = long_texts.per_image if long_texts.sub_captions else 0
    return TextLengths(min(fixed + short + 1, limit), min(fixed + window, limit), per_image)


def _window(statistics: Mapping[str, float], sampler: Sampler, window: int) -> float:
    """Mean tokens of a text from a long caption, which is at most the whole caption."""
    sentences = max(statistics["sub_captions_per_text"], 1)
    drawn: dict[Sampler, float] = {
        "window": window,
        "merged": (window + 1) / 2,
        "all": sentences,
        "first": (sentences + 1) / 2,
        "without-first": max(sentences / 2, 1),
        "summary": 1,
        "details": max(sentences - 1, 1),
        "subset": (sentences + 1) / 2,
    }
    return statistics["tokens_per_text"] * min(drawn[sampler] / sentences, 1)


def step_flops(
    config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths
) -> dict[str, float]:
    """Estimates the FLOPs of one step over all GPUs.

    A backward pass costs two forward passes. Gradient accumulation adds a forward pass without gradients, to compute
    all features before the loss, and activation checkpointing one that recomputes activations. Logits computed in
    blocks are computed twice.
    """
    passes = 3 + (compute.gradient_accumulation_steps > 1) + compute.activation_checkpointing
    model = towers.model.config
    text = text_tower_flops(model, round(texts.short))
    if texts.per_image:
        text += texts.per_image * text_tower_flops(model, round(texts.long))
    image_passes = int(config.from_pixels) if config.image_tower.frozen else passes
    features = 1 + texts.per_image * (1 + config.text.corner_tokens)
    batch = config.batch_size
    pooling = {}
    if config.loss.conditioned:  # computed in blocks, so twice
        _, tokens, _ = _blocks(towers.image)
        pair = 4 * tokens * model.embed_dim + 2 * model.embed_dim**2  # attention and its output
        pooling = {"pooling of patches": 4.0 * batch * (batch + features - 1) * pair}
    return {
        **pooling,
        "text tower": float(batch * passes * text),
        "image tower": float(batch * image_passes * _image_flops(towers.image)) if image_passes else 0.0,
        "loss": (6.0 if _logits(config, compute, features) <= LOGITS_AT_ONCE else 8.0)
        * batch**2
        * features
        * model.embed_dim,
    }


def _image_flops(tower: ImageTower) -> int:
    size = tower.spec.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


# --- memory -------------------------------------------------------------------------------------------------------


def memory(config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths) -> dict[str, float]:
    """Estimates the bytes per GPU by component, at the end of a forward pass and during gradient exchange."""
    patches = _blocks(towers.image)[1] if config.loss.conditioned else 0
    return {
        **state_bytes(config, compute, towers.trained),
        **activation_bytes(config, compute, towers, texts),
        "features and logits": loss_bytes(config, compute, texts, towers.model.config.embed_dim, patches),
        "CUDA context": CONTEXT_BYTES,
    }


def state_bytes(config: PretrainConfig, compute: TrainingCompute, trained: int) -> dict[str, float]:
    """Estimates weights, gradients and optimizer states per process (ZeRO, arXiv 1910.02054, section 3).

    ZeRO 1 and 2 partition the optimizer's fp32 weights and AdamW's two moments over the processes. ZeRO 3 also
    partitions the weights and gathers them when needed, at most all at once. A process keeps its partition of the
    reduced gradients. With accumulation, ZeRO 1 keeps all gradients until the reduction.

    Args:
        config: training settings of the ablation.
        compute: compute settings.
        trained: number of trained parameters.
    """
    zero = deepspeed_config(config, compute)["zero_optimization"]
    stage, processes = zero["stage"], compute.processes
    size = _size(config)
    split = processes if stage else 1
    full_gradients = stage == 0 or (stage == 1 and compute.gradient_accumulation_steps > 1)
    bucket = zero["reduce_bucket_size"]
    if stage == 0:
        bucket = min(bucket, trained) if processes > 1 else 0
    return {
        "weights": size * trained / (processes if stage == 3 else 1),
        "gathered weights": float(size * trained) if stage == 3 and processes > 1 else 0.0,
        "gradients": size * trained / (1 if full_gradients else split),
        "fp32 weights": FP32 * trained / split if stage else 0.0,
        "AdamW's moments": 2 * FP32 * trained / split,
        "gradient reduction buffers": float(size * bucket),
    }


def activation_bytes(
    config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths
) -> dict[str, float]:
    """Estimates the activations that autograd keeps for one micro-batch, and the images if a step reads them."""
    size, model = _size(config), towers.model
    batch = config.batch_size // (compute.processes * compute.gradient_accumulation_steps)
    encoder = model.text.transformer.config
    corners = config.text.corner_tokens
    late, packed = config.similarity == "late-interaction", model.text.packs
    # Packed short captions need only [CLS], which does not attend to masked corner tokens, so those are left out.
    dropped = corners if packed and config.text.corner_mask else 0
    kinds = [(texts.short if late else texts.short - dropped, 1)] + texts.per_image * [(texts.long, 1 + corners)]
    text = 0.0
    layers = encoder.num_hidden_layers if compute.activation_checkpointing else 0
    for length, outputs in kinds:
        last = outputs if packed and not late else None
        if type(model.text) is BertTower:
            kept = encoder_bytes(encoder, batch, length, size, masked=True, outputs=last)
        else:
            kept = batch * _other_text_bytes(model.text, round(length)) * size / FP32
        text += _checkpointed(kept, layers, batch * length * encoder.hidden_size * size)
        # Input and output of the pooler's tanh, features before and after normalisation.
        heads = length if late else outputs
        text += batch * heads * 2 * (encoder.hidden_size + model.config.embed_dim) * size
    parts = {"text activations": text, "images and image activations": 0.0}
    if config.from_pixels:
        image = _image_bytes(config, towers.image, batch)
        if not config.image_tower.frozen and compute.activation_checkpointing:
            blocks, tokens, width = _blocks(towers.image)
            image = _checkpointed(image, blocks, batch * tokens * width * size)
        parts["images and image activations"] = image
    return parts


def _checkpointed(kept: float, layers: int, hidden: float) -> float:
    """Returns the bytes with activation checkpointing: the input of each layer, and all activations of one layer.

    Args:
        kept: bytes without checkpointing.
        layers: number of layers that are checkpointed; 0: checkpointing is off.
        hidden: bytes of a layer's input.
    """
    return min(kept, layers * hidden + kept / layers) if layers else kept


def _blocks(tower: ImageTower) -> tuple[int, int, int]:
    """Returns an image tower's number of blocks, of tokens, and the width of a token; convolutional towers have 1."""
    size = tower.spec.image_size
    with torch.no_grad():
        hidden = tower.hidden_states(torch.zeros(1, 3, size, size, device="meta"))
    trunk: Any = getattr(tower.trunk, "trunk", tower.trunk)
    found = getattr(trunk, "blocks", None) or getattr(getattr(trunk, "transformer", None), "resblocks", None)
    number = len(found) if found is not None else getattr(getattr(trunk, "config", None), "num_hidden_layers", 1)
    return number, hidden.shape[1], hidden.shape[2]


def _image_bytes(config: PretrainConfig, tower: ImageTower, batch: int) -> float:
    if not isinstance(tower.trunk, VisionTransformer) or not hasattr(tower.trunk.blocks[0], "mlp"):
        return batch * _other_image_bytes(tower, trained=not config.image_tower.frozen)
    trunk: Any = tower.trunk
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    hidden = trunk.blocks[0].mlp.fc1.out_features
    pixels = batch * 3 * tower.spec.image_size**2 * FP32
    if config.image_tower.frozen:  # nothing is kept for a backward pass; the widest layer is the peak
        return pixels + batch * tokens * (tower.width + 2 * hidden) * FP32
    sizes = SimpleNamespace(
        hidden_size=tower.width,
        intermediate_size=hidden,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=trunk.blocks[0].attn.num_heads,
    )
    return pixels + encoder_bytes(sizes, batch, tokens, _size(config), masked=False)


def _other_image_bytes(tower: ImageTower, trained: bool) -> float:
    """Measures the bytes of one image in a tower of any kind, by a forward pass on the meta device.

    Trained towers keep what autograd saves; a frozen one needs the inputs and outputs of its widest layer.
    """
    widest = 0.0

    def measure(_module: Any, inputs: Any, output: Any) -> None:
        nonlocal widest
        tensors = [one for one in (*inputs, output) if isinstance(one, torch.Tensor)]
        widest = max(widest, sum(one.numel() * FP32 for one in tensors))

    size = tower.spec.image_size
    hooks = [module.register_forward_hook(measure) for module in tower.modules()]
    try:
        saved = _saved_bytes(tower, lambda: tower(torch.zeros(1, 3, size, size, device="meta", requires_grad=True)))
    finally:
        for hook in hooks:
            hook.remove()
    return saved if trained else 3 * size**2 * FP32 + widest  # what is saved includes the image


def _other_text_bytes(tower: TextTower, length: int) -> float:
    """Measures the fp32 bytes that autograd keeps of one text in a tower of any kind, on the meta device.

    The last layer counts in full, although a step computes only a part of it.
    """
    ids, lengths = torch.zeros(1, length, dtype=torch.int64, device="meta"), torch.full((1,), length, device="meta")
    return _saved_bytes(tower, lambda: tower.hidden_states(ids, lengths))


def _saved_bytes(module: torch.nn.Module, run: Callable[[], object]) -> float:
    """Measures what autograd keeps between forward and backward, without the module's weights."""
    saved = dict[int, float]()
    weights = {value.untyped_storage()._cdata for value in module.state_dict().values()}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = float(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        kept = run()  # storages must live until all are counted
    del kept
    return sum(saved.values())


def encoder_bytes(config: Any, texts: int, length: float, size: int, masked: bool, outputs: int | None = None) -> float:
    """Estimates the bytes that autograd keeps for a transformer encoder (BERT-like or ViT) with fused attention.

    Per token and layer there are 8 H + 2 I values: the inputs of both norms; the inputs of the four matrix products
    (one shared by query, key and value; the attention output; two of the feed-forward part, the second I wide); query,
    key and value; and the input of the activation. The statistics of the norms and the normaliser of attention are
    fp32. The mask of a layer has L² values per text. Embeddings and last hidden states add 2 H. Dropout keeps a byte
    per value that it may drop, H at the embeddings and 2 H per layer, as CUDA does; the dropout of attention is
    recomputed.

    Args:
        config: `hidden_size` H, `intermediate_size` I, layers, heads and dropout, as named by transformers.
        texts: number of texts or images.
        length: tokens per text, L.
        size: bytes per value.
        masked: whether attention has a mask for each pair of tokens.
        outputs: for packed texts, the number of tokens per text whose last hidden states are needed. After attention,
            the last layer processes only these. The attention output then exists twice, grouped by length and packed.
            None for padded texts, with the hidden states of all tokens.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)  # DistilBERT has another name for it
    layer = (8 * hidden + 2 * inner) * size + (4 + config.num_attention_heads) * FP32 + masked * length * size
    dropped = (1 + 2 * layers) * hidden if getattr(config, "hidden_dropout_prob", 0) else 0
    if outputs is None:
        return texts * length * (layers * layer + 2 * hidden * size + dropped)
    layer += hidden * size
    after = (5 * hidden + 2 * inner) * size + 4 * FP32  # of the operations after attention, with the last hidden states
    fraction = min(outputs / length, 1)
    return texts * length * (layers * layer - (1 - fraction) * after + 2 * hidden * size + dropped)


def loss_bytes(
    config: PretrainConfig, compute: TrainingCompute, texts: TextLengths, embed_dim: int, patches: int = 0
) -> float:
    """Estimates the features of a process, the gathered image features, their gradients, and the logits, in fp32.

    `patches` is the number of an image's patches that the loss pools; 0: none.
    """
    kinds = 1 + texts.per_image * (1 + config.text.corner_tokens)
    features = 2 * config.batch_size // compute.processes * (1 + kinds + patches) * embed_dim
    gathered = 2 * config.batch_size * embed_dim if compute.processes > 1 else 0
    logits = min(LOGITS_KEPT * _logits(config, compute, kinds), LOGITS_PER_BLOCK * LOGITS_AT_ONCE)
    return FP32 * (features + gathered + logits)


def _logits(config: PretrainConfig, compute: TrainingCompute, kinds: int) -> int:
    """Number of logits per process: its texts of all kinds by all images."""
    return kinds * config.batch_size**2 // compute.processes


def _size(config: PretrainConfig) -> int:
    return 2 if config.precision == "bf16" else FP32


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


# --- storage ------------------------------------------------------------------------------------------------------


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


# --- output -------------------------------------------------------------------------------------------------------


def describe(plan: Plan, title: str) -> list[str]:
    """Formats the plan as lines of text."""
    config, compute, gpu = plan.config, plan.compute, plan.gpu
    required = sum(plan.memory.values())
    micro = config.batch_size // (compute.processes * compute.gradient_accumulation_steps)
    count = "1 GPU" if compute.processes == 1 else f"{compute.processes} GPUs"
    epochs = f"{plan.epochs:.1f} of {plan.used_images:,} images" if plan.epochs else "unknown (--images)"
    zero = deepspeed_config(config, compute)["zero_optimization"]["stage"]
    tokens = {"short caption": plan.texts.short, **({"long text": plan.texts.long} if plan.texts.per_image else {})}
    lines = [f"{title} on {count}, {config.precision}, ZeRO {zero}"]
    lines += _table("parameters, trained", {name: f"{count:,}" for name, count in plan.trained.items()})
    lines.append(_row("total", f"{sum(plan.trained.values()):,}"))
    if plan.frozen:
        lines += _table("parameters, frozen", {name: f"{count:,}" for name, count in plan.frozen.items()})
    lines += _table(
        "run, one seed",
        {
            "steps": f"{config.steps:,}",
            "batch": f"{config.batch_size:,}",
            "gradient accumulation steps": f"{compute.gradient_accumulation_steps:,}",
            "micro-batch per GPU": f"{micro:,}",
            "samples": f"{plan.samples:,}",
            "epochs": epochs,
            **{f"tokens per {name}": f"{count:.1f}" for name, count in tokens.items()},
            "tokens": f"{plan.samples * plan.texts.tokens / 1e9:,.1f} G",
        },
    )
    lines += _table("TFLOP per step", {name: f"{value / 1e12:,.1f}" for name, value in plan.flops.items() if value})
    lines += _table("GB per GPU", {name: f"{value / 1e9:,.2f}" for name, value in plan.memory.items() if value})
    lines.append(_row("total", f"{required / 1e9:,.2f} of {gpu.memory / 1e9:,.0f}"))
    lines += _table("storage", {name: _bytes(value) for name, value in plan.storage.items()})
    if plan.feature_flops:
        hours = f"{plan.feature_seconds / 3600:,.1f}"
        lines += _table("frozen features, once for all ablations", {"hours on one GPU": hours})
    lines += _table("time", {"hours": f"{plan.seconds / 3600:,.1f}", "GPU hours": f"{_gpu_hours(plan):,.0f}"})
    lines += ["", "assumed", *(f"  {line}" for line in plan.assumed)]
    if plan.remedy:
        lines += ["", f"does not fit in memory: {plan.remedy}"]
    return lines


def _gpu_hours(plan: Plan) -> float:
    return plan.seconds / 3600 * plan.compute.processes


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return ["", title, *(_row(name, value) for name, value in rows.items())]


def _row(name: str, value: str) -> str:
    return f"  {name:<32}{value:>24}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
