"""Contrastive pretraining with DeepSpeed: the work of one training process.

The program is `python -m lotlip.train JOB.json`. It is started once, or by a launcher once per process.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import lotlip
from lotlip.core.cores import available_cores
from lotlip.core.files import atomic_write, sha256_files, write_json
from lotlip.core.lifetime import end_with_parent
from lotlip.core.temporary import multiprocessing_folder
from lotlip.data.images import Transform, training_transform
from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.data.remote_shards import open_index
from lotlip.pretrain.checkpoint import Checkpoints, broadcast, by_first_process, full_weights, require_finite
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import Engine, NotFinite, StepResult, decay_factor, import_deepspeed, initialise_processes
from lotlip.pretrain.initialisation import build_for_pretraining, tokenizer_name
from lotlip.pretrain.job import Job, Timing
from lotlip.pretrain.loader import Batch, BatchSlice, Loader, WorkerLost
from lotlip.pretrain.records import HISTORY, OBJECTIVE, RUN, History
from lotlip.pretrain.sink import OpenSink, Sink
from lotlip.pretrain.word_rows import keep_used_rows

if TYPE_CHECKING:
    from lotlip.models.vision.image_tower import ImageTower


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message names the step, the samples and the last good checkpoint."""


class ChanceWatch:
    """Detects when in-batch retrieval stays at chance.

    The second half of each period is evaluated. So a start at chance is tolerated, and a later collapse is detected.

    Args:
        period: number of steps; 0: off.
        batch_size: number of images that a text is matched against.

    Attributes:
        recall: mean recall over the last half period that was evaluated.
    """

    def __init__(self, period: int, batch_size: int) -> None:
        self.period, self.batch_size = period, batch_size
        self.recall = math.nan
        self._recalls: list[float] = []

    def stuck(self, step: int, recall: float) -> bool:
        """Adds the recall of a step, from 1; returns True if the mean recall of the last half period is at chance.

        The threshold is five standard deviations above chance.
        """
        if not self.period:
            return False
        position = (step - 1) % self.period + 1
        if 2 * position > self.period:
            self._recalls.append(recall)
        if position < self.period:
            return False
        self.recall = sum(self._recalls) / len(self._recalls)
        chance, texts = 1 / self.batch_size, self.batch_size * len(self._recalls)
        self._recalls = []
        return self.recall <= chance + 5 * math.sqrt(chance * (1 - chance) / texts)

    def state(self) -> list[float]:
        """Returns the state to save in a checkpoint."""
        return self._recalls

    def load_state(self, state: list[float]) -> None:
        """Restores the state from a checkpoint."""
        self._recalls = state


class Trainer:
    """Trains one seed of one configuration, from the last checkpoint if there is one.

    Args:
        job: the job.
        seed: seed of weights, sample order and sampled texts.
        sink: receives the curves; only the first process has a sink that logs.
    """

    def __init__(self, job: Job, seed: int, sink: Sink) -> None:
        self.job, self.seed, self.sink = job, seed, sink
        self.config, self.compute = config, compute = job.config, job.compute
        self.index = open_index(job.shards, compute.remote_shards)
        text = config.text
        ends = self.index.sentence_ends
        tokenizer = tokenizer_name(config, job.image_tower)
        self.tokenizer = open_tokenizer(tokenizer, text.context_length, text.corner_tokens, text.register_tokens, ends)
        tower, transform = None, None
        if config.from_pixels or not self.index.features:
            tower, transform = self._open_image_tower()
        part = BatchSlice(
            config.batch_size, dist.get_rank(), dist.get_world_size(), compute.gradient_accumulation_steps
        )
        seed_everything(seed)
        model = build_for_pretraining(resolve_pretrained(config, seed), job.image_tower, ends)
        # DeepSpeed rounds them to bf16, and ZeRO 3 partitions them
        self.frozen = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }
        # The index lists the ids of all word pieces in sub-captions. Those of CLIP's texts differ by punctuation. LAMB
        # needs the norm of the whole table.
        cut = config.optimizer.name == "adamw" and not text.frozen
        if cut and self.index.tokenizer == tokenizer and self.tokenizer.family == "bert":
            used = {*self.index.vocabulary, *self.tokenizer.special_ids}
            keep_used_rows(model, used, partial(decay_factor, config=config))
        self.loader = Loader(
            job.shards,
            config,
            self.tokenizer,
            seed,
            part,
            transform,
            workers=compute.loader_workers,
            prefetch=compute.prefetch,
            row_of=None if model.word_rows is None else model.word_rows.row_of.numpy(),
            remote=compute.remote_shards,
        )
        self.engine = Engine(model, config, compute, seed, tower if config.image_tower.frozen else None)
        self.checkpoints = Checkpoints(job.scratch / f"checkpoints-{seed}")
        self.history: History = []
        self.watch = ChanceWatch(compute.stop_at_chance_after, config.batch_size)

    def _open_image_tower(self) -> tuple[ImageTower, Transform]:
        """Loads the image tower that runs in each step, and the transform from images to pixels."""
        from lotlip.models.vision.image_tower import load_image_tower

        tower = load_image_tower(self.job.image_tower)
        spec = tower.spec
        augmentation = self.config.image_tower.augmentation
        return tower, training_transform(augmentation=augmentation, **spec.preprocessing)

    def train(self) -> None:
        """Runs the remaining steps, then saves the model and its curves.

        Raises:
            TrainingStopped: the loss or a weight is not finite, or retrieval stays at chance.
        """
        first = self._resume()
        start = last_log = time.monotonic()
        waited = 0.0
        with closing(self.loader.steps(first, self.config.steps)) as steps:
            for step in range(first, self.config.steps):
                fetch_start = time.monotonic()
                batches = next(steps)
                waited += time.monotonic() - fetch_start
                result = self._step(batches, step)
                done = step + 1
                if done % self.compute.log_every == 0 or done == self.config.steps:
                    now = time.monotonic()
                    interval = done - max(first, self.history[-1]["step"] if self.history else 0)
                    rate = interval * self.config.batch_size / (now - last_log)
                    self._log(step, result, rate, waited / (now - last_log))
                    remaining = (now - start) / (done - first) * (self.config.steps - done)
                    self._print_progress(done, result, remaining)
                    last_log, waited = now, 0.0
                if done % self.compute.checkpoint_every == 0 and done < self.config.steps:
                    self._checkpoint(done)
        self._save()

    def _step(self, batches: list[Batch], step: int) -> StepResult:
        try:
            result = self.engine.step(batches, step)
        except NotFinite as error:
            samples = "the broken image features of " if error.broken else "the samples "
            keys = ", ".join((error.broken or error.keys)[:8])
            remedy = "remove these images" if error.broken else "try a lower pretrain.optimizer.learning_rate"
            raise self._stop_error(f"{error} at step {step + 1} with {samples}{keys}, …", remedy) from error
        if self.watch.stuck(step + 1, result.recall):
            raise self._stop_error(
                f"after {step + 1} steps a text finds its image among the batch's {self.config.batch_size} no more "
                f"often than by chance ({self.watch.recall:.2%} of texts)",
                "check that captions match their images and that pretrain.optimizer.learning_rate is right, or raise "
                "compute.training.stop_at_chance_after (0: never)",
            )
        return result

    def _stop_error(self, problem: str, remedy: str) -> TrainingStopped:
        newest = self.checkpoints.newest()
        saved = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written before"
        return TrainingStopped(f"{self.job.ablation}, seed {self.seed}: {problem}; {saved}; {remedy}")

    def _log(self, step: int, result: StepResult, rate: float, wait: float) -> None:
        values = {
            "step": step + 1,
            "loss": result.loss,
            "in_batch_recall": result.recall,
            "temperature": math.exp(-self.engine.model.logit_scale.item()),
            "learning_rate": self.engine.learning_rate(step),
            "samples_per_second": rate,
            "data_wait_share": wait,
        }
        self.history.append(values)
        self.sink.log({name: value for name, value in values.items() if name != "step"}, step + 1)

    def _print_progress(self, step: int, result: StepResult, remaining: float) -> None:
        if dist.get_rank() == 0:
            print(
                f"{self.job.ablation} seed {self.seed}: step {step}/{self.config.steps}, loss {result.loss:.3f}, "
                f"{self.history[-1]['samples_per_second']:.0f} samples/s, {remaining:.0f} s left",
                flush=True,
            )

    def _checkpoint(self, step: int) -> None:
        with self._stop_if_not_finite():
            self.checkpoints.save(self.engine.deepspeed, step, {"history": self.history, "watch": self.watch.state()})

    @contextmanager
    def _stop_if_not_finite(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            raise self._stop_error(str(error), "try a lower pretrain.optimizer.learning_rate") from error

    def _resume(self) -> int:
        """Loads the newest checkpoint; returns its number of steps."""
        state = self.checkpoints.load(self.engine.deepspeed)
        if state is None:
            return 0
        self.history = state["history"]
        self.watch.load_state(state["watch"])
        if dist.get_rank() == 0:
            print(f"{self.job.ablation} seed {self.seed}: resumes after step {state['step']}", flush=True)
        return state["step"]

    def _provenance(self) -> dict[str, Any]:
        """Returns the origin of the model for its card."""
        return {
            "name": f"{self.job.ablation}, seed {self.seed}",
            "ablation": self.job.ablation,
            "seed": self.seed,
            "pretraining": self.config.model_dump(mode="json"),
            "data": {
                "sha256": self.job.data_hash,
                "samples": {split: entry.samples for split, entry in self.index.splits.items()},
                "statistics": self.index.statistics,
            },
            "image_tower_sha256": sha256_files([self.job.image_tower / "model.safetensors"]),
            "git_commit": self.job.git_commit,
            "lotlip_version": lotlip.__version__,
        }

    def _save(self) -> None:
        trained = full_weights(self.engine.deepspeed)  # called in every process, because ZeRO partitions the weights
        with self._stop_if_not_finite():
            by_first_process(lambda: self._write_model(trained))

    def _write_model(self, trained: dict[str, Tensor]) -> None:
        from lotlip.models.saving import save_model  # imports timm, which is not needed before

        require_finite([trained], self.config.steps)
        model = self.engine.model
        # an image tower in training also has buffers, in bf16 if the model is
        buffers = {
            name: (value.float() if value.is_floating_point() else value).cpu()
            for name, value in model.state_dict().items()
            if name not in trained and name not in self.frozen
        }
        model_config = model.config
        model_config.provenance = self._provenance()
        frozen = self.job.image_tower if self.config.image_tower.frozen else None
        with atomic_write(self.job.model_folder(self.seed)) as folder:
            folder.mkdir()
            weights = buffers | self.frozen | trained
            objective = {name: weights.pop(name) for name in list(weights) if name.startswith("objective.")}
            if objective:
                save_file(objective, folder / OBJECTIVE)
            save_model(model_config, weights, self.tokenizer, folder, frozen)
            write_json(folder / HISTORY, self.history)
        self.checkpoints.remove()


def resolve_pretrained(config: PretrainConfig, seed: int) -> PretrainConfig:
    """The configuration of one seed: where `text.pretrained` is a trained ablation's folder, its model of that seed.

    Raises:
        ValueError: the ablation was not trained with this seed.
    """
    ablation = Path(config.text.pretrained or "")
    if not (ablation / RUN).is_file():
        return config
    model = ablation / f"seed-{seed}"
    if not model.is_dir():
        raise ValueError(f"text.pretrained {ablation} has no seed-{seed} to start from; train it with the same seeds")
    return config.model_copy(update={"text": config.text.model_copy(update={"pretrained": str(model)})})


def seed_everything(seed: int) -> None:
    """Seeds all random number generators that training uses."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def main(job: Job, open_sink: OpenSink) -> None:
    """Trains the unfinished seeds of a job, one after another."""
    initialise_processes(job.compute)
    if dist.get_rank() == 0 and job.compute.parallel_seeds == 1:
        _write_start(job)
    # on a shared file system, one process may not see yet what another one has published
    unfinished = broadcast([seed for seed in job.seeds if not job.model_folder(seed).is_dir()])
    for seed in unfinished:
        run = job.run_ids.get(str(seed)) if dist.get_rank() == 0 else None
        with closing(open_sink(job.tracking_uri, run)) as sink:
            Trainer(job, seed, sink).train()
    dist.destroy_process_group()


def _write_start(job: Job) -> None:
    """Writes how long this process took to start."""
    Timing(imports=time.time() - psutil.Process().create_time()).write(job.timing)


def train_in_parallel(job: Job, parallel: int, open_sink: OpenSink) -> str | None:
    """Trains each seed of a job in its own process, `parallel` at a time; the first that fails ends the others.

    The processes are forks, so they import nothing. They end with this process, and stay in its process group.

    Returns:
        As `run`.
    """
    import_deepspeed()
    _write_start(job)
    threads = max(1, available_cores() // min(parallel, len(job.seeds)))
    waiting, running, parent = list(job.seeds), set[int](), os.getpid()
    failure = None
    while waiting or running:
        while waiting and len(running) < parallel:
            seed_job = job.model_copy(update={"seeds": [waiting.pop(0)]})
            child = os.fork()
            if not child:
                end_with_parent(parent)
                _run_child(seed_job, threads, open_sink)
            running.add(child)
        child, status = os.wait()
        running.discard(child)
        if status and failure is None:
            failure = f"a seed's process ended with status {os.waitstatus_to_exitcode(status)}"
            waiting.clear()
            for other in running:
                os.kill(other, signal.SIGTERM)
    return failure


def _run_child(job: Job, threads: int, open_sink: OpenSink) -> NoReturn:
    """Runs the job of one seed in a forked process, and exits."""
    status = 1
    try:
        torch.set_num_threads(threads)
        reason = run_job(job, open_sink)
        if reason:
            print(reason, file=sys.stderr)
        status = int(bool(reason))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# Parts of the errors of gloo and NCCL when another process does not answer or has ended.
PEER_ERRORS = ("timed out", "timeout", "closed by peer", "reset by peer", "remote process exited")


def run(job_file: str, open_sink: OpenSink) -> str | None:
    """Runs a job file.

    Args:
        job_file: JSON of a `Job`.
        open_sink: opens the sink for a seed's curves.

    Returns:
        The reason for stopping, in one line; None if the job has finished.
    """
    job = Job.load(Path(job_file))
    parallel = job.compute.parallel_seeds
    return train_in_parallel(job, parallel, open_sink) if parallel > 1 else run_job(job, open_sink)


def run_job(job: Job, open_sink: OpenSink) -> str | None:
    """Runs a job in this process; returns as `run`."""
    try:
        with multiprocessing_folder():
            main(job, open_sink)
    except (TrainingStopped, ValueError, OSError, WorkerLost) as error:
        return f"error: {error}"
    except RuntimeError as error:  # not all backends of torch.distributed have a specific type
        if not any(words in str(error).lower() for words in PEER_ERRORS):
            raise
        compute = job.compute
        return (
            f"error: {job.ablation}: process {os.environ.get('RANK')} of {compute.processes} lost another one, which "
            f"ended or did not answer for {compute.peer_timeout_seconds:g} s (compute.training.peer_timeout_seconds): "
            f"{str(error).splitlines()[0]}; rerun to resume from the last checkpoint"
        )
    return None
