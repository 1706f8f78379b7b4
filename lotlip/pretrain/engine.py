"""The optimizer step: DeepSpeed with a contrastive loss whose negatives come from the entire global batch.

The loss needs the features of the entire batch before the first gradient, but not all activations. So a batch of
several micro-batches passes through the towers twice (GradCache, arXiv 2101.06983). The first pass computes the
features without gradients, and the loss gives the gradient of each feature. The second pass, one micro-batch at a time,
backpropagates these gradients. Memory holds the activations of one micro-batch only, and loss and gradients equal those
of the undivided batch.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lotlip.core.compute import TrainingCompute
from lotlip.core.cores import available_cores
from lotlip.models.text.text_tower import position_table
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.pretrain.checkpoint import assign_weights, trained_parameters
from lotlip.pretrain.config import OptimizerConfig, PretrainConfig
from lotlip.pretrain.loader import Batch
from lotlip.pretrain.model import LotlipForPreTraining, padded

if TYPE_CHECKING:
    from lotlip.models.vision.image_tower import ImageTower

# Outputs of the model that are shared by all samples.
SHARED = ("logit_scale", "logit_bias", "pooling")


# Gradients per exchange. ZeRO allocates a buffer of this size even for small models; its default is half a billion.
BUCKET = 50_000_000


class NotFinite(FloatingPointError):
    """The loss of a step is NaN or infinite.

    Attributes:
        loss: the loss.
        broken: keys of samples, in all processes, whose image features are not finite.
        keys: keys of this process's samples.
    """

    def __init__(self, loss: float, broken: list[str], keys: list[str]) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss, self.broken, self.keys = loss, broken, keys


@dataclass(frozen=True)
class StepResult:
    """Metrics of a step, equal in every process.

    Attributes:
        loss: loss of the global batch.
        recall: share of its texts that are closer to their own image than to any other image of the batch.
    """

    loss: float
    recall: float


def deepspeed_config(config: PretrainConfig, compute: TrainingCompute) -> dict[str, Any]:
    """Derives DeepSpeed's configuration from params.yaml."""
    bf16 = config.precision == "bf16"
    # without ZeRO, DeepSpeed's bf16 optimizer gives no access to its fp32 weights; stage 1 gives the same results
    stage = max(compute.zero_stage, int(bf16))
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size
        // (compute.processes * compute.gradient_accumulation_steps),
        "gradient_accumulation_steps": compute.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW, and LAMB
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "steps_per_print": sys.maxsize,  # the training loop reports
    }


def parameter_groups(model: nn.Module, config: PretrainConfig) -> list[dict[str, Any]]:
    """Splits trainable parameters by the learning rate and weight decay of their tower or mask network.

    Norms, biases and the temperature do not decay (released code), nor does a table of which some rows are frozen.

    Returns:
        groups of AdamW, each with its peak learning rate as `lr`.
    """
    adamw, text, loss = config.optimizer, config.text, config.loss
    parts = {"text": text, "image": config.image_tower, "objective.masks": loss.masks}
    frozen_rows = position_table(model.get_submodule("text.transformer")) if text.frozen_positions else None
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        settings = next((found for part, found in parts.items() if name.startswith(f"{part}.")), None)
        rate = getattr(settings, "learning_rate", None) or adamw.learning_rate
        own = getattr(settings, "weight_decay", None)
        decay = adamw.weight_decay if own is None else own
        if value.ndim < 2 or "norm" in name.lower() or (frozen_rows and value is frozen_rows[1].weight):
            decay = 0.0
        groups.setdefault((rate, decay), []).append(value)
    # those that decay come first
    ordered = sorted(groups.items(), key=lambda item: item[0][1] == 0)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in ordered]


def learning_rate_factor(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Returns the learning rate relative to its peak, at a step from 0: linear warm-up, then decay to 0."""
    warmup = optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 1 - done if optimizer.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def decay_factor(steps: int, config: PretrainConfig) -> float:
    """Returns the factor by which weight decay has scaled a word without gradients after a number of steps."""
    adamw, text = config.optimizer, config.text
    peak = text.learning_rate or adamw.learning_rate
    decay = adamw.weight_decay if text.weight_decay is None else text.weight_decay
    rates = (peak * learning_rate_factor(step, config.steps, adamw) for step in range(steps))
    return math.prod(1 - rate * decay for rate in rates)


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds AdamW, or timm's LAMB, which adapts the steps of the weights that decay (arXiv 1904.00962)."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "lamb":
        from timm.optim import Lamb  # timm takes 2 s to import

        return Lamb(groups, max_grad_norm=None, **options)  # the engine clips gradients
    return torch.optim.AdamW(groups, fused=True, **options)


class Engine:
    """DeepSpeed's engine with the optimizer, and the step of the contrastive loss. Each process has one.

    Args:
        model: the model to train.
        config: model and training settings.
        compute: processes, gradient accumulation and ZeRO.
        seed: seed of the run; dropout uses it.
        frozen_tower: computes image features; None if they are stored, or if the model has the image tower.

    Attributes:
        deepspeed: DeepSpeed's engine.
        device: device of this process.
    """

    def __init__(
        self,
        model: LotlipForPreTraining,
        config: PretrainConfig,
        compute: TrainingCompute,
        seed: int,
        frozen_tower: ImageTower | None = None,
    ) -> None:
        deepspeed = import_deepspeed()
        if compute.activation_checkpointing:
            model.text.enable_checkpointing()
            if model.image is not None:
                model.image.enable_checkpointing()
        groups = parameter_groups(model, config)
        self._peaks = [group["lr"] for group in groups]
        optimizer = build_optimizer(groups, config.optimizer)
        self.config, self.seed = config, seed
        rounds = config.precision == "bf16"
        exact = {name: value.detach().clone() for name, value in trained_parameters(model).items()} if rounds else {}
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, compute)
        )
        # DeepSpeed reduces gradients in groups of its own, which have torch's timeout of 30 minutes
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d.set_timeout(timedelta(seconds=compute.peer_timeout_seconds), group)
        if exact:
            assign_weights(self.deepspeed, exact)
        if dist.get_world_size() == 1 and not self.deepspeed.zero_optimization_stage():
            # with one process, DeepSpeed would copy all gradients for nothing: an eighth of the demo's step
            self.deepspeed.enable_backward_allreduce = False
        self.device: torch.device = self.deepspeed.device
        self.frozen_tower = None if frozen_tower is None else frozen_tower.to(self.device).eval().requires_grad_(False)

    @property
    def model(self) -> LotlipForPreTraining:
        """The model in training."""
        return self.deepspeed.module

    def learning_rate(self, step: int) -> float:
        """Returns the largest learning rate of any parameter in a step, which counts from 0."""
        return max(self._peaks) * learning_rate_factor(step, self.config.steps, self.config.optimizer)

    def step(self, batches: list[Batch], step: int) -> StepResult:
        """Does one optimizer step.

        Args:
            batches: this process's micro-batches of the global batch.
            step: counts from 0.

        Raises:
            NotFinite: the loss is NaN or infinite. No weight has changed.
        """
        factor = learning_rate_factor(step, self.config.steps, self.config.optimizer)
        for group, peak in zip(self.deepspeed.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        batches = [self._with_features(batch.to(self.device)) for batch in batches]
        with torch.set_grad_enabled(len(batches) == 1):
            outputs = [self._forward(batch, step, number) for number, batch in enumerate(batches)]
        features: dict[str, Any] = _join(outputs)
        if self.config.loss.conditioned:
            keys = [key for batch in batches for key in batch.keys]
            features["draws"] = _draws(f"{self.seed}/{step}", keys).to(self.device)
        losses = lotlip_loss(**features, **self.config.loss.arguments())
        result = StepResult(losses["loss"].item(), losses["recall"].item())
        if not math.isfinite(result.loss):
            raise self._not_finite(result.loss, batches)
        losses["loss"].backward()
        for number, batch in enumerate(batches):
            output = outputs[0] if len(batches) == 1 else self._forward(batch, step, number)
            self.deepspeed.backward(_surrogate_loss(output, features, number, len(batches)), scale_wrt_gas=False)
            self.deepspeed.step()
        return result

    def _with_features(self, batch: Batch) -> Batch:
        """Replaces the images of a batch by the frozen tower's features, and adds those of patches if needed."""
        if self.frozen_tower is None:
            return batch
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bf16"):
            tower, hidden = self.frozen_tower, self.frozen_tower.hidden_states(batch.images)
            late = self.config.similarity == "late-interaction"
            patches = tower.patches(hidden).float() if self.config.loss.conditioned else None
            features = (tower.patches(hidden) if late else tower.feature(hidden)).float()
            return replace(batch, images=features, patches=patches)

    def _forward(self, batch: Batch, step: int, number: int) -> dict[str, Tensor]:
        # dropout is seeded per step, so that a resumed run and the second pass draw the same masks
        draw = random.Random(f"{self.seed}/{step}/{dist.get_rank()}/{number}")
        torch.manual_seed(draw.getrandbits(32))
        return self.deepspeed(batch.images, **batch.texts, patches=batch.patches)

    def _not_finite(self, loss: float, batches: list[Batch]) -> NotFinite:
        pairs = [pair for batch in batches for pair in zip(batch.keys, batch.images, strict=True)]
        broken: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(broken, [key for key, image in pairs if not image.isfinite().all()])
        return NotFinite(loss, [key for keys in broken for key in keys], [key for key, _ in pairs])


def _join(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins the outputs of all micro-batches to the inputs of the loss: fp32 leaves that collect gradients."""
    joined = {}
    for name, first in outputs[0].items():
        parts = [output[name].detach() for output in outputs]
        value = first.detach() if name in SHARED else torch.cat(_pad_alike(parts))
        joined[name] = value.float().requires_grad_() if value.is_floating_point() else value
    return joined


def _draws(seed: str, keys: list[str]) -> Tensor:
    """Returns two random integers of each sample, [B, 2]. They do not depend on the sample's place in the batch."""
    digests = [hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in keys]
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2).astype(np.int64))


def _pad_alike(parts: list[Tensor]) -> list[Tensor]:
    """Pads tokens [B, N, L, …] of late interaction with zeros, because L differs between micro-batches."""
    if parts[0].ndim < 3 or len({part.shape[2:3] for part in parts}) == 1:
        return parts
    longest = max(part.shape[2] for part in parts)
    return [padded(part, longest) for part in parts]


def _surrogate_loss(output: Mapping[str, Tensor], features: Mapping[str, Tensor], number: int, batches: int) -> Tensor:
    """Returns a scalar with the same gradients as the loss, for the weights, through one micro-batch's features."""
    total = torch.zeros((), device=next(iter(output.values())).device)
    for name, value in output.items():
        gradient = features[name].grad
        if gradient is None:
            continue
        if name in SHARED:
            gradient = gradient / batches
        else:
            gradient = gradient.chunk(batches)[number]
            if value.ndim > 2:
                gradient = gradient[:, :, : value.shape[2]]
        total = total + (value.float() * gradient).sum()
    return total


def import_deepspeed() -> Any:
    """Imports DeepSpeed without MLflow, which its autotuner imports: a fifth of the start-up time.

    DeepSpeed may not compile functions: ZeRO imports its Muon optimizer, for whose functions torch would import its
    compiler, which takes 2 s.
    """
    absent = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    sys.modules["deepspeed.runtime.compiler"].compile = lambda: lambda function: function  # type: ignore[attr-defined]
    return deepspeed


def initialise_processes(compute: TrainingCompute) -> None:
    """Initialises the process group of the processes that train together; a single process has its own group.

    A single process listens on no port. Several processes on one machine listen on the loopback interface only.

    Raises:
        ValueError: the number of processes differs from params.yaml.
    """
    deepspeed = import_deepspeed()
    # On a CPU, DeepSpeed would compile an operation for half a minute that only its inference engine calls.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    timeout = timedelta(seconds=compute.peer_timeout_seconds)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torch's, DeepSpeed's
    if local_size > 1:  # launchers give each process one thread, or as many as there are cores
        torch.set_num_threads(max(1, available_cores() // local_size))
    if int(os.environ.get("WORLD_SIZE", "1")) == local_size and not dist.is_initialized():
        _stay_on_loopback()
    store: dist.Store | None = None  # None: the launcher of a cluster provides it
    if file := os.environ.get("LOTLIP_STORE"):  # set by `flows.runtime.local_launch`
        store = dist.FileStore(file, int(os.environ["WORLD_SIZE"]))
    elif "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store = dist.HashStore()
    if store is not None:
        # DeepSpeed requires an address even if a group exists
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        if not dist.is_initialized():
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            backend = deepspeed.get_accelerator().communication_backend_name()
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    deepspeed.init_distributed(verbose=False, timeout=timeout)
    if dist.get_world_size() != compute.processes:
        raise ValueError(
            f"{dist.get_world_size()} processes were started, but compute.training.processes is {compute.processes}"
        )


def _stay_on_loopback() -> None:
    """Makes gloo and NCCL use the loopback interface, unless the environment names another."""
    loopback = next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(address.address == "127.0.0.1" for address in addresses)
        ),
        None,
    )
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
