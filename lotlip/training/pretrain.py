"""Contrastive pretraining through DeepSpeed: the work of one training process.

Started as `python -m lotlip.training.pretrain JOB.json`, once, or by torchrun once per process.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lotlip
from lotlip.config import Optimizer, Pretrain
from lotlip.data.loader import Batch, Rows, batches
from lotlip.data.tokenizer import TextTokenizer
from lotlip.files import read_json, sha256_files, whole, write_json
from lotlip.losses import lotlip_loss
from lotlip.models.initialisation import build_for_pretraining
from lotlip.tracking import Sink, open_sink

if TYPE_CHECKING:
    from lotlip.models.image_tower import ImageTower

CHECKPOINTS_KEPT = 2


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, with which samples, and what is safe."""


@dataclass(frozen=True)
class Job:
    """All that a training process needs to know, as JSON on disk.

    Attributes:
        ablation: name of the configuration.
        config: `Pretrain`, resolved, as JSON.
        shards: folder of the data set.
        image_tower: folder of the frozen tower.
        scratch: where checkpoints go, and how long starting took.
        out: where finished seeds go.
        tracking_uri: of MLflow.
        run_ids: seed → MLflow run; a seed that is not named is not tracked.
        git_commit: of the code, for the model card.
    """

    ablation: str
    config: dict[str, Any]
    shards: str
    image_tower: str
    scratch: str
    out: str
    tracking_uri: str
    run_ids: dict[str, str]
    git_commit: str = "unknown"

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job that a flow wrote."""
        return cls(**read_json(path))

    def model_folder(self, seed: int) -> Path:
        """Where a seed's finished model stands."""
        return Path(self.out) / f"seed-{seed}"


def deepspeed_config(config: Pretrain) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it derived from params.yaml."""
    rounded = config.precision == "bf16"
    # without ZeRO, DeepSpeed's optimizer for bf16 does not hand out its fp32 weights; stage 1 computes the same
    stage = max(config.zero_stage, int(rounded))
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (config.processes * config.accumulation),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": rounded},
        "steps_per_print": sys.maxsize,  # the loop below reports
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


def learning_rate_share(step: int, steps: int, optimizer: Optimizer) -> float:
    """Share of the peak learning rate at a step that counts from 0: linear warm-up, then half a cosine down to 0."""
    warmup = optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class Trainer:
    """Trains one seed of one configuration, from the last checkpoint if there is one.

    Args:
        job: what to do.
        config: the job's configuration.
        seed: of weights, order and draws.
        sink: where curves go; only the first process has a real one.
    """

    def __init__(self, job: Job, config: Pretrain, seed: int, sink: Sink) -> None:
        import deepspeed

        self.job, self.config, self.seed, self.sink = job, config, seed, sink
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.index = read_json(Path(job.shards) / "index.json")
        self.shards = [Path(job.shards) / f"{shard['name']}.tar" for shard in self.index["splits"]["train"]["shards"]]
        text = config.text
        self.tokenizer = TextTokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)
        self.frozen_tower: ImageTower | None = None
        self.transform: Callable[[bytes], np.ndarray] | None = None
        if config.from_pixels or not self.index["features"]:
            tower = self._open_image_tower()
            self.frozen_tower = tower if config.image_tower.frozen else None
        seed_everything(seed)
        model = build_for_pretraining(config, Path(job.image_tower))
        settings = config.optimizer
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(learning_rate_share, steps=config.steps, optimizer=settings)
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(config)
        )
        self.checkpoints = Path(job.scratch) / f"checkpoints-{seed}"
        self.history: list[dict[str, float]] = []

    def _open_image_tower(self) -> ImageTower:
        """The image tower in the loop, and with it what makes pixels of pictures."""
        from lotlip.data.images import decode_rgb, image_transform
        from lotlip.models.image_tower import load_image_tower

        tower = load_image_tower(Path(self.job.image_tower)).eval().requires_grad_(False)
        to_pixels = image_transform(tower.spec.image_size, tower.spec.mean, tower.spec.std)
        self.transform = lambda data: to_pixels(decode_rgb(data))
        return tower

    def train(self) -> None:
        """Runs all steps that are left, then saves the model and its curves.

        Raises:
            TrainingStopped: the loss is not a number, or there are fewer samples than a batch.
        """
        first = self._resume()
        started = mark = time.monotonic()
        waited = 0.0
        steps = self._steps(first)
        for step in range(first, self.config.steps):
            fetching = time.monotonic()
            micro_batches = next(steps)
            waited += time.monotonic() - fetching
            loss = self._step(micro_batches, step)
            done = step + 1
            if done % self.config.log_every == 0 or done == self.config.steps:
                now = time.monotonic()
                interval = done - max(first, self.history[-1]["step"] if self.history else 0)
                self._log(done, loss, interval * self.config.batch_size / (now - mark), waited / (now - mark))
                left = (now - started) / (done - first) * (self.config.steps - done)
                self._say(done, loss, left)
                mark, waited = now, 0.0
            if done % self.config.checkpoint_every == 0 and done < self.config.steps:
                self._checkpoint(done)
        self._save()

    def _steps(self, first: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `first` on, epoch after epoch."""
        samples = self.index["splits"]["train"]["samples"]
        per_epoch = samples // self.config.batch_size
        if not per_epoch:
            raise TrainingStopped(
                f"{self.job.shards} has {samples} training samples, fewer than a batch of {self.config.batch_size}; "
                "set pretrain.batch_size lower"
            )
        rows = Rows(self.config.batch_size, self.rank, self.processes, self.config.accumulation)
        epoch, skip = divmod(first, per_epoch)
        while True:
            stream = batches(
                self.shards, rows, self.tokenizer, self.config.long_texts, self.seed, epoch, self.transform, skip
            )
            yield from zip(*[stream] * self.config.accumulation, strict=True)
            epoch, skip = epoch + 1, 0

    def _step(self, micro_batches: list[Batch], step: int) -> float:
        """One optimizer step; the loss is the mean over micro-batches, whose negatives are their own."""
        # dropout is drawn from the step's own seed, so that a run that resumes here draws what it would have drawn
        torch.manual_seed(random.Random(f"{self.seed}/{step}/{self.rank}").getrandbits(32))
        total = 0.0
        for batch in micro_batches:
            batch = batch.to(self.engine.device)
            features = self.engine(self._images(batch), **batch.texts)
            losses = lotlip_loss(
                **{name: value.float() if value.is_floating_point() else value for name, value in features.items()},
                **self.config.loss.model_dump(),
            )
            value = losses["loss"].item()
            if not math.isfinite(value):
                raise self._not_a_number(value, step + 1, batch)
            self.engine.backward(losses["loss"])
            self.engine.step()
            total += value / len(micro_batches)
        return total

    def _not_a_number(self, loss: float, step: int, batch: Batch) -> TrainingStopped:
        broken = [key for key, image in zip(batch.keys, batch.images, strict=True) if not image.isfinite().all()]
        written = (self.checkpoints / "latest").is_file()
        safe = f"the last good checkpoint is in {self.checkpoints}" if written else "no checkpoint was written before"
        remedy = "take their images out" if broken else "try a lower pretrain.optimizer.learning_rate"
        keys = ", ".join((broken or batch.keys)[:8])
        return TrainingStopped(
            f"{self.job.ablation}, seed {self.seed}: the loss is {loss} at step {step} with "
            f"{'the broken image features of ' if broken else 'the samples '}{keys}, …; {safe}; {remedy}"
        )

    def _images(self, batch: Batch) -> Tensor:
        """What the model takes: a frozen tower's features, stored or computed here, or pixels for a tower it trains."""
        tower = self.frozen_tower
        if tower is None:
            return batch.images
        with torch.no_grad():
            hidden = tower.to(batch.images.device).hidden_states(batch.images)
            return tower.patches(hidden) if self.config.similarity == "late-interaction" else tower.feature(hidden)

    def _log(self, step: int, loss: float, rate: float, wait: float) -> None:
        point = {
            "step": step,
            "loss": loss,
            "temperature": math.exp(-self.engine.module.logit_scale.item()),
            "learning_rate": self.engine.get_lr()[0],
            "samples_per_second": rate,
            "data_wait_share": wait,
        }
        self.history.append(point)
        self.sink.log({name: value for name, value in point.items() if name != "step"}, step)

    def _say(self, step: int, loss: float, left: float) -> None:
        if self.rank == 0:
            print(
                f"{self.job.ablation} seed {self.seed}: step {step}/{self.config.steps}, loss {loss:.3f}, "
                f"{self.history[-1]['samples_per_second']:.0f} samples/s, {left:.0f} s left",
                flush=True,
            )

    def _checkpoint(self, step: int) -> None:
        """DeepSpeed names the newest checkpoint in a file it writes last, so a half-written one is never read."""
        self.engine.save_checkpoint(str(self.checkpoints), tag=f"step-{step}", client_state={"history": self.history})
        if self.rank == 0:
            kept = sorted(self.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
            for old in kept[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old)

    def _resume(self) -> int:
        """Loads the newest checkpoint; returns the number of steps it has."""
        if not (self.checkpoints / "latest").is_file():
            return 0
        path, state = self.engine.load_checkpoint(str(self.checkpoints))
        if path is None:
            raise TrainingStopped(f"no checkpoint in {self.checkpoints} can be read; remove the folder to start anew")
        self.history = state["history"]
        step = int(self.engine.global_steps)
        if self.rank == 0:
            print(f"{self.job.ablation} seed {self.seed}: goes on after step {step}", flush=True)
        return step

    def _weights(self) -> dict[str, Tensor]:
        """The whole model in fp32: the optimizer's master copy where the model itself is rounded or split."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = self.engine.module.state_dict()
        for name, parameter in self.engine.module.named_parameters():
            whole_parameter = safe_get_full_fp32_param(parameter)
            if whole_parameter is not None:
                weights[name] = whole_parameter
        return {name: value.float().cpu() if value.is_floating_point() else value for name, value in weights.items()}

    def _provenance(self) -> dict[str, Any]:
        """What the model card tells of training."""
        return {
            "name": f"{self.job.ablation}, seed {self.seed}",
            "ablation": self.job.ablation,
            "seed": self.seed,
            "pretraining": self.job.config,
            "data": {
                "sha256": sha256_files([Path(self.job.shards) / "index.json"]),
                "samples": {split: found["samples"] for split, found in self.index["splits"].items()},
                "statistics": self.index.get("statistics", {}),
            },
            "image_tower_sha256": sha256_files([Path(self.job.image_tower) / "model.safetensors"]),
            "git_commit": self.job.git_commit,
            "lotlip_version": lotlip.__version__,
        }

    def _save(self) -> None:
        from lotlip.models.saving import save_model  # brings timm along, which is not needed before

        weights = self._weights()  # every process takes part: under ZeRO each has a piece
        if self.rank == 0:
            model_config = self.engine.module.config
            model_config.provenance = self._provenance()
            frozen = Path(self.job.image_tower) if self.config.image_tower.frozen else None
            with whole(self.job.model_folder(self.seed)) as folder:
                folder.mkdir()
                save_model(model_config, weights, self.tokenizer, folder, frozen)
                write_json(folder / "history.json", self.history)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        dist.barrier()


def seed_everything(seed: int) -> None:
    """Seeds every generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def initialise_processes(config: Pretrain) -> None:
    """Joins the processes that train together; one process makes a group of its own.

    Raises:
        TrainingStopped: the launcher started another number of processes than params.yaml says.
    """
    import deepspeed

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = "0"  # any free one
    # DeepSpeed builds its op with the first ninja it finds; another version than last time would build it anew
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if together > 1:  # torch's launcher gives each of several a single thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // together))
    deepspeed.init_distributed(verbose=False)
    if dist.get_world_size() != config.processes:
        raise TrainingStopped(
            f"{dist.get_world_size()} processes were started, but pretrain.processes is {config.processes}"
        )


def main(job_file: str) -> None:
    """Trains every seed of a job that is not finished yet."""
    job = Job.read(Path(job_file))
    config = Pretrain.model_validate(job.config)
    initialise_processes(config)
    if dist.get_rank() == 0:
        started = time.time() - psutil.Process().create_time()
        write_json(Path(job.scratch) / "timing.json", {"imports": started})
    for seed in config.seeds:
        if job.model_folder(seed).is_dir():
            continue
        run = job.run_ids.get(str(seed)) if dist.get_rank() == 0 else None
        with closing(open_sink(job.tracking_uri, run)) as sink:
            Trainer(job, config, seed, sink).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except TrainingStopped as stopped:
        sys.exit(f"error: {stopped}")
