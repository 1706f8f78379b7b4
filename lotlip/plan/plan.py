"""What a training run takes, from its configuration alone: steps, tokens, arithmetic, memory, storage, time.

Towers are built on the meta device, where tensors have shapes and no values. What a configuration cannot tell is
assumed, and the plan names what it assumed. All sizes are bytes, GB are 10⁹ of them; operations are those of matrix
products, 2 for a multiply-add.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PretrainedConfig

from lotlip.config.params import Params
from lotlip.core.compute import TrainingCompute
from lotlip.core.section import merge
from lotlip.data.index import ShardIndex
from lotlip.data.tokenizer import TextTokenizer
from lotlip.evaluate.flops import text_tower_flops
from lotlip.image_tower.config import ImageTowerConfig as ImageTowerSettings
from lotlip.image_tower.config import SceneTowerConfig, TimmTowerConfig
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text_tower import PACKED
from lotlip.models.vision.image_tower import ImageTower, ImageTowerSpec, build_image_tower
from lotlip.objectives.contrastive import LOGITS_AT_ONCE
from lotlip.pretrain.checkpoint import KEPT
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.config import TextTowerConfig as TextTowerSettings
from lotlip.pretrain.engine import deepspeed_config
from lotlip.pretrain.initialisation import text_config
from lotlip.pretrain.model import LotlipForPreTraining

FP32 = 4
# Where no shards tell: word pieces of a short caption and of one sub-caption of a long one, its full stop counted.
RAW_TOKENS, SUB_CAPTION_TOKENS = 10, 20
# Where no shards tell: a picture of 256 pixels as JPEG, and the texts of three captioners as JSON.
IMAGE_BYTES, JSON_BYTES = 30_000, 3_000
# CUDA, cuBLAS and NCCL, before the first tensor.
CONTEXT_BYTES = 1.5e9
# Matrices of logits that are there at a time: similarities and logits kept for the backward pass, or one block's and
# their gradients.
LOGITS_KEPT, LOGITS_OF_A_BLOCK = 2, 5


@dataclass(frozen=True)
class Gpu:
    """One of the GPUs: an H100's numbers, and the share of its peak that training is taken to reach."""

    memory: float = 80e9
    peak: float = 989e12
    utilisation: float = 0.4


@dataclass(frozen=True)
class Towers:
    """Both towers, without weights.

    Attributes:
        model: what DeepSpeed wraps; its image tower is None where that is frozen.
        image: the image tower, frozen or not.
    """

    model: LotlipForPreTraining
    image: ImageTower

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Texts:
    """Mean lengths in tokens, special and corner tokens among them.

    Attributes:
        raw: of a short caption.
        long: of a long text.
        per_image: long texts of an image at a step (K).
    """

    raw: float
    long: float
    per_image: int

    @property
    def tokens(self) -> float:
        """Of one sample."""
        return self.raw + self.per_image * self.long


@dataclass(frozen=True)
class Plan:
    """A run's needs. Each mapping is by part.

    Attributes:
        config: of the ablation.
        compute: how it would run.
        gpu: what it runs on.
        trained, frozen: parameters.
        texts: mean lengths.
        images: in the data set; None where nobody said.
        flops: of a step, over all GPUs.
        memory: of each GPU.
        feature_flops: of the frozen tower over the whole data set, in the shard stage; 0 where it has no part or the
            number of images is unknown.
        storage: of shards and of what training writes.
        remedy: what to change where memory does not suffice; "" where it does.
        assumed: what was not known.
    """

    config: PretrainConfig
    compute: TrainingCompute
    gpu: Gpu
    trained: dict[str, int]
    frozen: dict[str, int]
    texts: Texts
    images: int | None
    flops: dict[str, float]
    memory: dict[str, float]
    feature_flops: float
    storage: dict[str, float]
    remedy: str = ""
    assumed: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Trained on, each as often as it comes."""
        return self.config.steps * self.config.batch_size

    @property
    def seconds(self) -> float:
        """FLOPs / (GPUs × peak × utilisation), of one seed."""
        used = self.compute.processes * self.gpu.peak * self.gpu.utilisation
        return self.config.steps * sum(self.flops.values()) / used

    @property
    def feature_seconds(self) -> float:
        """Of the shard stage's frozen features, on one GPU."""
        return self.feature_flops / (self.gpu.peak * self.gpu.utilisation)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {
            "gpus": self.compute.processes,
            "gpu": vars(self.gpu),
            "parameters": {"trained": self.trained, "frozen": self.frozen},
            "steps": self.config.steps,
            "gradient_accumulation_steps": self.compute.gradient_accumulation_steps,
            "samples": self.samples,
            "epochs": self.samples / self.images if self.images else None,
            "tokens_per_text": {"raw": self.texts.raw, "long": self.texts.long},
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
    """What a run of `config` takes.

    Args:
        params: the whole configuration: image tower, captioners, shards.
        config: of the ablation.
        compute: how it runs, with the GPUs as `processes`.
        gpu: what each of them is.
        index: the shards' index.json, where they are written; its numbers go before assumed ones.
        images: in the data set; those of the index where this is None.

    Raises:
        ValueError: the pretrained text tower's sizes are not to be had here.
    """
    assumed: list[str] = []
    towers = build_towers(config, params.image_tower, assumed)
    statistics = index.statistics if index else {}
    texts = text_lengths(config, statistics, assumed)
    if images is None and index:
        images = index.splits["train"].samples
    needed = memory(config, compute, towers, texts)
    assumed.append(f"{CONTEXT_BYTES / 1e9:.1f} GB for CUDA, cuBLAS and NCCL; no fragmentation")
    assumed.append(f"{gpu.utilisation:.0%} of {gpu.peak / 1e12:.0f} TFLOP/s are used, and no step waits for data")
    if config.similarity == "late-interaction":
        assumed.append("late interaction's own products and similarities are left out")
    return Plan(
        config,
        compute,
        gpu,
        *parameters(config, towers),
        texts,
        images,
        step_flops(config, compute, towers, texts),
        needed,
        float(images * _image_flops(towers.image)) if images and params.shard.store_features else 0.0,
        storage(params, config, towers, index, images, assumed),
        "" if sum(needed.values()) <= gpu.memory else remedy(config, compute, towers, texts, gpu),
        assumed,
    )


def on_gpus(
    config: PretrainConfig, compute: TrainingCompute, gpus: int, differences: Mapping[str, Any] | None = None
) -> tuple[PretrainConfig, TrainingCompute]:
    """A configuration on another number of GPUs: each keeps its micro-batch, as far as accumulation allows.

    Args:
        config: of the ablation.
        compute: how it is trained now.
        gpus: all together.
        differences: from params.yaml, as those in infra/gpus: "pretrain" and "compute.training".

    Raises:
        ValueError: the batch cannot be divided so.
    """
    steps = max(1, compute.processes * compute.gradient_accumulation_steps // gpus)
    base = compute.model_dump(mode="json", exclude_unset=True)
    base |= {"launch": {"kind": "local"}, "processes": gpus, "gradient_accumulation_steps": steps}
    if gpus > 1:
        base["parallel_seeds"] = 1  # seeds side by side are for single processes
    given = differences or {}
    own = given.get("compute", {}).get("training", {})
    try:
        recipe = merge(config.model_dump(mode="json", exclude_unset=True), given.get("pretrain", {}))
        found = PretrainConfig.model_validate(recipe), TrainingCompute.model_validate({**base, **own})
        found[1].check_batch_size(config.batch_size)
    except ValidationError as error:
        reasons = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ValueError(f"{gpus} GPUs cannot train this: {reasons}") from None
    except ValueError as error:
        raise ValueError(f"{gpus} GPUs cannot train this: {error}") from None
    return found


def images_by_name(name: str) -> int | None:
    """How many images a data set has whose name tells it in millions.

    >>> images_by_name("lotlip-100m")
    100000000
    """
    found = re.search(r"(\d+)m$", name)
    return int(found[1]) * 1_000_000 if found else None


# --- towers -------------------------------------------------------------------------------------------------------


def build_towers(config: PretrainConfig, image: ImageTowerSettings, assumed: list[str] | None = None) -> Towers:
    """Both towers on the meta device.

    Args:
        config: of the ablation.
        image: section `image_tower` of params.yaml.
        assumed: takes a line for each size that was not known.

    Raises:
        ValueError: the pretrained text tower's sizes are not to be had here.
    """
    if isinstance(image, SceneTowerConfig):
        from lotlip.demo.tower import scenes_spec

        spec = scenes_spec(image)
    elif isinstance(image, TimmTowerConfig):
        spec = ImageTowerSpec(image.model, image.image_size, resize=image.resize)
    else:
        raise ValueError(f"the sizes of an image tower of kind {image.kind} are not known to `lotlip plan`")
    with torch.device("meta"):
        tower = build_image_tower(spec)
        model = LotlipForPreTraining(
            LotlipConfig(
                text_config=_encoder_config(config.text, assumed),
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
    return Towers(model, tower)


def _encoder_config(text: TextTowerSettings, assumed: list[str] | None) -> PretrainedConfig:
    """The encoder's sizes; a pretrained one's from its folder or from the hub's cache, never from the net."""
    tokenizer = TextTokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)
    sizes = {"model_type": "bert", "pad_token_id": tokenizer.pad_id, **text.config}
    found: Any = AutoConfig.for_model(**sizes)
    if text.pretrained:
        try:
            seeds = sorted(Path(text.pretrained).glob("seed-*"))  # an ablation's folder has a model for each
            name = str(seeds[0]) if seeds else text.pretrained
            found = text_config(name, text.config, text.revision, local_files_only=True)
        except OSError as error:
            if not text.pretrained.endswith("bert-base-uncased"):
                raise ValueError(
                    f"the sizes of text.pretrained {text.pretrained} are not known here; train it first, fetch it once "
                    f"(`hf download {text.pretrained}`), or name its folder"
                ) from error
            if assumed is not None:
                assumed.append(f"{text.pretrained} has BERT-base's sizes (it is not on this machine)")
    encoder = found.text_config if isinstance(found, LotlipConfig) else found
    encoder.vocab_size = tokenizer.vocabulary_size + text.corner_tokens + text.register_tokens
    if text.position_interpolation:
        encoder.max_position_embeddings = text.position_interpolation.interpolated
    return encoder


def parameters(config: PretrainConfig, towers: Towers) -> tuple[dict[str, int], dict[str, int]]:
    """How many are trained and how many are frozen, by part; the trained ones add up to `towers.trained`."""
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
    return (trained, {"image tower": image}) if config.image_tower.frozen else ({**trained, "image tower": image}, {})


# --- tokens and arithmetic ----------------------------------------------------------------------------------------


def text_lengths(config: PretrainConfig, statistics: Mapping[str, Any], assumed: list[str] | None = None) -> Texts:
    """Mean lengths of what a step reads; a full stop's place is taken by a [SEP].

    Args:
        config: of the ablation.
        statistics: of the shards: "raw" or captioner → sub_captions_per_text, tokens_per_text; empty where none are.
        assumed: takes a line for what the statistics do not tell.

    Raises:
        ValueError: the ablation draws captions that the shards do not have.
    """
    text, drawn = config.text, config.long_texts
    fixed = 1 + text.corner_tokens + text.register_tokens
    if not statistics and assumed is not None:
        assumed.append(
            f"{RAW_TOKENS} word pieces in a short caption, {SUB_CAPTION_TOKENS} in a sub-caption (no shards to count)"
        )
    raw = statistics["raw"]["tokens_per_text"] if statistics else RAW_TOKENS
    window = float(drawn.sub_captions * SUB_CAPTION_TOKENS)
    captioners = drawn.captioners or [name for name in statistics if name != "raw"]
    if missing := [name for name in captioners if statistics and name not in statistics]:
        there = ", ".join(name for name in statistics if name != "raw") or "none"
        raise ValueError(
            f"long_texts.captioners names {', '.join(missing)}, but the shards have captions by {there}; "
            "write the shards anew (`dvc repro shard`), or plan without them"
        )
    if statistics and captioners:
        windows = [_window(statistics[name], drawn.sub_captions) for name in captioners]
        window = sum(windows) / len(windows)
    limit = text.context_length
    return Texts(min(fixed + raw + 1, limit), min(fixed + window, limit), drawn.per_image if drawn.sub_captions else 0)


def _window(statistics: Mapping[str, float], sub_captions: int) -> float:
    """Tokens of a window of so many sub-captions, or of the whole caption where it has fewer."""
    there = max(statistics["sub_captions_per_text"], 1)
    return statistics["tokens_per_text"] * min(sub_captions / there, 1)


def step_flops(config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: Texts) -> dict[str, float]:
    """Operations of one step over all GPUs.

    A backward pass costs two forward ones. With accumulation all features are computed once more, without gradients,
    before the loss is known. Logits that do not exist all at once are computed twice, too.
    """
    passes = 3 if compute.gradient_accumulation_steps == 1 else 4
    model = towers.model.config
    text = text_tower_flops(model, round(texts.raw))
    if texts.per_image:
        text += texts.per_image * text_tower_flops(model, round(texts.long))
    image_passes = int(config.from_pixels) if config.image_tower.frozen else passes
    features = 1 + texts.per_image * (1 + config.text.corner_tokens)
    batch = config.batch_size
    return {
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


def memory(config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: Texts) -> dict[str, float]:
    """Bytes of one GPU by part, at the end of a forward pass and while gradients are exchanged."""
    return {
        **state_bytes(config, compute, towers.trained),
        **activation_bytes(config, compute, towers, texts),
        "features and logits": loss_bytes(config, compute, texts, towers.model.config.embed_dim),
        "CUDA context": CONTEXT_BYTES,
    }


def state_bytes(config: PretrainConfig, compute: TrainingCompute, trained: int) -> dict[str, float]:
    """Weights, gradients and optimizer states of one process (ZeRO, arXiv 1910.02054, section 3).

    ZeRO 1 and 2 split the optimizer's fp32 weights and AdamW's two moments over the processes, 3 the weights too, which
    it gathers as it needs them: at most all. What a process keeps of the gradients is its part, once they are added up;
    with accumulation, ZeRO 1 keeps the whole until then.

    Args:
        config: of the ablation.
        trained: parameters.
    """
    told = deepspeed_config(config, compute)["zero_optimization"]
    stage, processes = told["stage"], compute.processes
    size = _size(config)
    split = processes if stage else 1
    whole_gradients = stage == 0 or (stage == 1 and compute.gradient_accumulation_steps > 1)
    bucket = told["reduce_bucket_size"]
    if stage == 0:
        bucket = min(bucket, trained) if processes > 1 else 0
    return {
        "weights": size * trained / (processes if stage == 3 else 1),
        "gathered weights": float(size * trained) if stage == 3 and processes > 1 else 0.0,
        "gradients": size * trained / (1 if whole_gradients else split),
        "fp32 weights": FP32 * trained / split if stage else 0.0,
        "AdamW's moments": 2 * FP32 * trained / split,
        "gradients on their way": float(size * bucket),
    }


def activation_bytes(
    config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: Texts
) -> dict[str, float]:
    """What autograd keeps of one micro-batch, and pictures where a step reads them."""
    size, model = _size(config), towers.model
    batch = config.batch_size // (compute.processes * compute.gradient_accumulation_steps)
    encoder = model.text.transformer.config
    corners = config.text.corner_tokens
    late, packed = config.similarity == "late-interaction", encoder.model_type in PACKED
    unseen = corners if packed and config.text.corner_mask else 0  # by what is wanted of a short caption: its [CLS]
    kinds = [(texts.raw if late else texts.raw - unseen, 1)] + texts.per_image * [(texts.long, 1 + corners)]
    text = 0.0
    for length, wanted in kinds:
        last = wanted if packed and not late else None
        text += encoder_bytes(encoder, batch, length, size, masked=True, wanted=last)
        # input and output of the pooler's tanh, features before and after normalisation
        heads = length if late else wanted
        text += batch * heads * 2 * (encoder.hidden_size + model.config.embed_dim) * size
    parts = {"text activations": text, "pictures and image activations": 0.0}
    if config.from_pixels:
        parts["pictures and image activations"] = _image_bytes(config, towers.image, batch)
    return parts


def _image_bytes(config: PretrainConfig, tower: ImageTower, batch: int) -> float:
    trunk: Any = tower.trunk
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    hidden = trunk.blocks[0].mlp.fc1.out_features
    pixels = batch * 3 * tower.spec.image_size**2 * FP32
    if config.image_tower.frozen:  # nothing is kept, but the widest layer is there for a moment
        return pixels + batch * tokens * (tower.width + 2 * hidden) * FP32
    sizes = SimpleNamespace(
        hidden_size=tower.width,
        intermediate_size=hidden,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=trunk.blocks[0].attn.num_heads,
    )
    return pixels + encoder_bytes(sizes, batch, tokens, _size(config), masked=False)


def encoder_bytes(config: Any, texts: int, length: float, size: int, masked: bool, wanted: int | None = None) -> float:
    """What autograd keeps of a transformer encoder, of BERT's kind or a ViT, whose attention is one fused operation.

    For a token and a layer: the inputs of both norms and of the four products that read hidden states (query, key and
    value share one; attention's output; the first and, 4 H wide, the second of the feed-forward part), query, key and
    value, and the activation's input: (8 H + 2 I) numbers; the norms' statistics and attention's normaliser in fp32. A
    layer's mask is L² numbers of a text. Embeddings and the last states add 2 H. Dropout keeps a byte for each number
    it may drop, of H at the embeddings and of 2 H in a layer (as CUDA does; attention's own is drawn anew).

    Args:
        config: `hidden_size` H, `intermediate_size` I, layers, heads and dropout, as transformers names them.
        texts: or pictures.
        length: tokens of each: L.
        size: bytes of a number.
        masked: whether attention takes a mask for each pair of tokens.
        wanted: where texts are packed, tokens of each whose last states are wanted: the last layer goes on from
            attention with them alone. Attention's output is there twice then, by groups of like length and as a row.
            None: all, padded.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)  # DistilBERT names it otherwise
    layer = (8 * hidden + 2 * inner) * size + (4 + config.num_attention_heads) * FP32 + masked * length * size
    dropped = (1 + 2 * layers) * hidden if getattr(config, "hidden_dropout_prob", 0) else 0
    if wanted is None:
        return texts * length * (layers * layer + 2 * hidden * size + dropped)
    layer += hidden * size
    after = (5 * hidden + 2 * inner) * size + 4 * FP32  # of what follows attention, the last states among it
    narrow = min(wanted / length, 1)
    return texts * length * (layers * layer - (1 - narrow) * after + 2 * hidden * size + dropped)


def loss_bytes(config: PretrainConfig, compute: TrainingCompute, texts: Texts, embed_dim: int) -> float:
    """A process's features and everybody's image features with their gradients, and logits, all in fp32."""
    kinds = 1 + texts.per_image * (1 + config.text.corner_tokens)
    features = 2 * config.batch_size // compute.processes * (1 + kinds) * embed_dim
    gathered = 2 * config.batch_size * embed_dim if compute.processes > 1 else 0
    logits = min(LOGITS_KEPT * _logits(config, compute, kinds), LOGITS_OF_A_BLOCK * LOGITS_AT_ONCE)
    return FP32 * (features + gathered + logits)


def _logits(config: PretrainConfig, compute: TrainingCompute, kinds: int) -> int:
    """Of a process: its texts of so many kinds with all images."""
    return kinds * config.batch_size**2 // compute.processes


def _size(config: PretrainConfig) -> int:
    return 2 if config.precision == "bf16" else FP32


def remedy(config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: Texts, gpu: Gpu) -> str:
    """The smallest change that makes a run fit: accumulation first, then ZeRO, then GPUs or the batch."""
    for stage in range(compute.zero_stage, 4):
        for accumulation in range(compute.gradient_accumulation_steps, config.batch_size // compute.processes // 2 + 1):
            if config.batch_size % (compute.processes * accumulation):
                continue
            changed = compute.model_copy(update={"gradient_accumulation_steps": accumulation, "zero_stage": stage})
            if sum(memory(config, changed, towers, texts).values()) <= gpu.memory:
                more = f" and zero_stage to {stage}" if stage > compute.zero_stage else ""
                return f"raise compute.training.gradient_accumulation_steps to {accumulation}{more}"
    return "take more GPUs or lower pretrain.batch_size: neither accumulation nor ZeRO suffices"


# --- storage ------------------------------------------------------------------------------------------------------


def storage(
    params: Params,
    config: PretrainConfig,
    towers: Towers,
    index: ShardIndex | None,
    images: int | None,
    assumed: list[str],
) -> dict[str, float]:
    """Bytes on disk: of a sample in the shards and of all, of a checkpoint and of those that are there at once, of the
    model that is published."""
    train = index.splits["train"] if index else None
    if train and train.samples:
        sample = sum(shard.bytes for shard in train.shards) / train.samples
    else:
        members = [IMAGE_BYTES, JSON_BYTES]
        if params.shard.store_features:
            members.append(128 + FP32 * towers.model.config.embed_dim)
        sample = sum(512 + 512 * math.ceil(size / 512) for size in members)  # tar: a header, whole blocks
        assumed.append(f"{IMAGE_BYTES / 1e3:.0f} kB for a picture and {JSON_BYTES / 1e3:.0f} kB for its texts, stored")
    checkpoint = float(3 * FP32 * towers.trained)  # weights and AdamW's moments, whatever precision and ZeRO are
    frozen = sum(value.numel() for value in towers.image.parameters()) if config.image_tower.frozen else 0
    total = {"shards": float(sample * images)} if images else {}
    return {
        "sample": float(sample),
        **total,
        "checkpoint": checkpoint,
        "checkpoints at once": (KEPT + 1) * checkpoint,
        "model": float(FP32 * (towers.trained + frozen)),
    }


# --- for a reader -------------------------------------------------------------------------------------------------


def describe(plan: Plan, title: str) -> list[str]:
    """The plan as lines of text."""
    config, compute, gpu = plan.config, plan.compute, plan.gpu
    needed = sum(plan.memory.values())
    micro = config.batch_size // (compute.processes * compute.gradient_accumulation_steps)
    count = "1 GPU" if compute.processes == 1 else f"{compute.processes} GPUs"
    epochs = f"{plan.samples / plan.images:.1f} of {plan.images:,} images" if plan.images else "unknown (--samples)"
    zero = deepspeed_config(config, compute)["zero_optimization"]["stage"]
    tokens = {"short caption": plan.texts.raw, **({"long text": plan.texts.long} if plan.texts.per_image else {})}
    lines = [f"{title} on {count}, {config.precision}, ZeRO {zero}"]
    lines += _table("parameters, trained", {name: f"{count:,}" for name, count in plan.trained.items()})
    lines.append(_row("all", f"{sum(plan.trained.values()):,}"))
    if plan.frozen:
        lines += _table("parameters, frozen", {name: f"{count:,}" for name, count in plan.frozen.items()})
    lines += _table(
        "run, one seed",
        {
            "steps": f"{config.steps:,}",
            "batch": f"{config.batch_size:,}",
            "gradient accumulation steps": f"{compute.gradient_accumulation_steps:,}",
            "micro-batch of a GPU": f"{micro:,}",
            "samples": f"{plan.samples:,}",
            "epochs": epochs,
            **{f"tokens of a {name}": f"{count:.1f}" for name, count in tokens.items()},
            "tokens": f"{plan.samples * plan.texts.tokens / 1e9:,.1f} G",
        },
    )
    lines += _table("TFLOP of a step", {name: f"{value / 1e12:,.1f}" for name, value in plan.flops.items() if value})
    lines += _table("GB of a GPU", {name: f"{value / 1e9:,.2f}" for name, value in plan.memory.items() if value})
    lines.append(_row("all", f"{needed / 1e9:,.2f} of {gpu.memory / 1e9:,.0f}"))
    lines += _table("storage", {name: _bytes(value) for name, value in plan.storage.items()})
    if plan.feature_flops:
        hours = f"{plan.feature_seconds / 3600:,.1f}"
        lines += _table("frozen features, once for all ablations", {"one GPU, hours": hours})
    lines += _table("time", {"hours": f"{plan.seconds / 3600:,.1f}", "GPU hours": f"{_gpu_hours(plan):,.0f}"})
    lines += ["", "assumed", *(f"  {line}" for line in plan.assumed)]
    if plan.remedy:
        lines += ["", f"does not fit: {plan.remedy}"]
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
