"""The optimizer step: DeepSpeed around a contrastive loss whose negatives are the whole global batch.

A loss over the whole batch needs every feature of it before the first gradient, but not every activation. So a batch of
several micro-batches goes through the towers twice (GradCache, arXiv 2101.06983): once without gradients, for the
features; the loss then says what gradient each feature has; and once more, micro-batch by micro-batch, to carry that
gradient back. Memory holds the activations of one micro-batch, and loss and gradients are those of the batch at once.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lotlip.core.compute import TrainingCompute
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.pretrain.config import OptimizerConfig, PretrainConfig
from lotlip.pretrain.loader import Batch
from lotlip.pretrain.model import LotlipForPreTraining, padded

if TYPE_CHECKING:
    from lotlip.models.vision.image_tower import ImageTower

# What there is one of, not one for each sample.
SHARED = ("logit_scale", "logit_bias")


# Gradients that are exchanged at a time. ZeRO makes room for so many, however few there are: by default half a billion.
BUCKET = 50_000_000


class NotFinite(FloatingPointError):
    """The loss of a step is not a number, or infinite.

    Attributes:
        loss: what it is.
        broken: keys of samples whose image features are no numbers, of all processes.
        keys: of this process's samples.
    """

    def __init__(self, loss: float, broken: list[str], keys: list[str]) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss, self.broken, self.keys = loss, broken, keys


@dataclass(frozen=True)
class StepResult:
    """What a step tells, the same in every process.

    Attributes:
        loss: of the global batch.
        recall: share of its texts that are nearer to their own image than to any other of the batch.
    """

    loss: float
    recall: float


def deepspeed_config(config: PretrainConfig, compute: TrainingCompute) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it derived from params.yaml."""
    rounded = config.precision == "bf16"
    # without ZeRO, DeepSpeed's optimizer for bf16 does not hand out its fp32 weights; stage 1 computes the same
    stage = max(compute.zero_stage, int(rounded))
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size
        // (compute.processes * compute.gradient_accumulation_steps),
        "gradient_accumulation_steps": compute.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": rounded},
        "steps_per_print": sys.maxsize,  # the training loop reports
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: norms, biases and the temperature do not decay, as in the released code."""
    parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad]

    def decays(name: str, value: Tensor) -> bool:
        return value.ndim >= 2 and "norm" not in name.lower()

    return [
        {"params": [value for name, value in parameters if decays(name, value)], "weight_decay": weight_decay},
        {"params": [value for name, value in parameters if not decays(name, value)], "weight_decay": 0.0},
    ]


def learning_rate_share(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Share of the peak learning rate at a step that counts from 0: linear warm-up, then half a cosine down to 0."""
    warmup = optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def decay(steps: int, config: PretrainConfig) -> float:
    """What weight decay leaves, after some steps, of a weight that has no gradient: a factor."""
    adamw = config.optimizer
    rates = (adamw.learning_rate * learning_rate_share(step, config.steps, adamw) for step in range(steps))
    return math.prod(1 - rate * adamw.weight_decay for rate in rates)


class Engine:
    """DeepSpeed's engine with AdamW, and the step of the contrastive loss. One for each process.

    Args:
        model: to train.
        config: what is learned, and how.
        compute: processes, accumulation and ZeRO.
        seed: of the run: dropout is drawn from it.
        frozen_tower: gives the features of pictures; None where they are stored, or the model has the image tower.

    Attributes:
        deepspeed: DeepSpeed's engine.
        device: that this process computes on.
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
        adamw = config.optimizer
        optimizer = torch.optim.AdamW(
            parameter_groups(model, adamw.weight_decay),
            lr=adamw.learning_rate,
            betas=adamw.betas,
            eps=adamw.eps,
            fused=True,
        )
        self.config, self.seed = config, seed
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, compute)
        )
        if dist.get_world_size() == 1 and not self.deepspeed.zero_optimization_stage():
            # DeepSpeed would copy all gradients to exchange them with nobody: an eighth of the demo's step
            self.deepspeed.enable_backward_allreduce = False
        self.device: torch.device = self.deepspeed.device
        self.frozen_tower = None if frozen_tower is None else frozen_tower.to(self.device).eval().requires_grad_(False)

    @property
    def model(self) -> LotlipForPreTraining:
        """The model that is trained."""
        return self.deepspeed.module

    def learning_rate(self, step: int) -> float:
        """Of a step that counts from 0."""
        settings = self.config.optimizer
        return settings.learning_rate * learning_rate_share(step, self.config.steps, settings)

    def step(self, batches: list[Batch], step: int) -> StepResult:
        """One optimizer step.

        Args:
            batches: this process's micro-batches of the global batch.
            step: counts from 0.

        Raises:
            NotFinite: the loss is no number, or infinite. No weight has changed.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        batches = [self._with_features(batch.to(self.device)) for batch in batches]
        with torch.set_grad_enabled(len(batches) == 1):
            outputs = [self._forward(batch, step, number) for number, batch in enumerate(batches)]
        features: dict[str, Any] = _joined(outputs)
        losses = lotlip_loss(**features, **self.config.loss.model_dump())
        result = StepResult(losses["loss"].item(), losses["recall"].item())
        if not math.isfinite(result.loss):
            raise self._not_finite(result.loss, batches)
        losses["loss"].backward()
        for number, batch in enumerate(batches):
            output = outputs[0] if len(batches) == 1 else self._forward(batch, step, number)
            self.deepspeed.backward(_carried(output, features, number, len(batches)), scale_wrt_gas=False)
            self.deepspeed.step()
        return result

    def _with_features(self, batch: Batch) -> Batch:
        """The frozen tower's features in the pictures' place."""
        if self.frozen_tower is None:
            return batch
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bf16"):
            tower, hidden = self.frozen_tower, self.frozen_tower.hidden_states(batch.images)
            late = self.config.similarity == "late-interaction"
            return replace(batch, images=(tower.patches(hidden) if late else tower.feature(hidden)).float())

    def _forward(self, batch: Batch, step: int, number: int) -> dict[str, Tensor]:
        # dropout is drawn from the step's own seed: who resumes, or goes through the towers again, draws the same
        draw = random.Random(f"{self.seed}/{step}/{dist.get_rank()}/{number}")
        torch.manual_seed(draw.getrandbits(32))
        return self.deepspeed(batch.images, **batch.texts)

    def _not_finite(self, loss: float, batches: list[Batch]) -> NotFinite:
        pairs = [pair for batch in batches for pair in zip(batch.keys, batch.images, strict=True)]
        broken: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(broken, [key for key, image in pairs if not image.isfinite().all()])
        return NotFinite(loss, [key for keys in broken for key in keys], [key for key, _ in pairs])


def _joined(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the loss takes, of all micro-batches: fp32 leaves that collect a gradient each."""
    joined = {}
    for name, first in outputs[0].items():
        parts = [output[name].detach() for output in outputs]
        value = first.detach() if name in SHARED else torch.cat(_alike(parts))
        joined[name] = value.float().requires_grad_() if value.is_floating_point() else value
    return joined


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Late interaction has tokens [B, N, L, …], and L is each micro-batch's own: zeros up to the longest."""
    if parts[0].ndim < 3 or len({part.shape[2:3] for part in parts}) == 1:
        return parts
    longest = max(part.shape[2] for part in parts)
    return [padded(part, longest) for part in parts]


def _carried(output: Mapping[str, Tensor], features: Mapping[str, Tensor], number: int, batches: int) -> Tensor:
    """A number whose gradient, by the weights, is that of the loss through the features of one micro-batch."""
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
    """DeepSpeed, but not MLflow with it, which its autotuner imports whole: a fifth of what starting takes."""
    absent = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    return deepspeed


def initialise_processes(compute: TrainingCompute) -> None:
    """Joins the processes that train together; one process makes a group of its own.

    Nothing listens on the network for one process, and on loopback only for several on one machine.

    Raises:
        ValueError: the launcher started another number of processes than params.yaml says.
    """
    deepspeed = import_deepspeed()
    # On a CPU, DeepSpeed would compile an operation here, half a minute long, that only its inference engine calls.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    timeout = timedelta(seconds=compute.peer_timeout_seconds)
    together = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torch's, DeepSpeed's
    if together > 1:  # a launcher gives each of several a single thread, or all of them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // together))
    if int(os.environ.get("WORLD_SIZE", "1")) == together and not dist.is_initialized():
        _stay_on_loopback()
    store: dist.Store | None = None  # a cluster's launcher has one
    if file := os.environ.get("LOTLIP_STORE"):  # of `flows.runtime.local_launch`
        store = dist.FileStore(file, int(os.environ["WORLD_SIZE"]))
    elif "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store = dist.HashStore()
    if store is not None:
        # DeepSpeed wants an address even where it finds a group
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
