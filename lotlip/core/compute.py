"""The `compute` section: devices, processes, inference batch sizes, intervals. It changes results by rounding only.

DVC does not watch these settings, and no fingerprint, report or sweep compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lotlip.core.section import Count, Name, NonNegative, Port, Positive, Section

Seconds = Annotated[float, Field(gt=0, le=1e9)]  # sockets and locks take no longer times
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


def _with_a_port(endpoint: str) -> str:
    if not 1 <= int(endpoint.rpartition(":")[2]) <= 65535:
        raise ValueError("must have a port in 1 to 65535")
    return endpoint


class LocalLaunch(Section):
    """Runs all processes on this machine. Several meet through a file (flows.runtime.local_launch)."""

    kind: Literal["local"] = "local"


class HostfileLaunch(Section):
    """DeepSpeed's launcher, which reaches each machine of a hostfile by pdsh over ssh; the first is this machine."""

    kind: Literal["hostfile"]
    path: Path = Field(description="hostfile with lines `HOST slots=GPUS`; the slots add up to `processes`")
    port: Port = Field(29500, description="rendezvous port, free on the first machine")


class SlurmLaunch(Section):
    """torch's launcher on each node of the Slurm allocation that the stage runs in."""

    kind: Literal["slurm"]
    nodes: Count = Field(description="number of nodes of the allocation to use")
    port: Port = Field(29500, description="rendezvous port, free on the first node")


class RendezvousLaunch(Section):
    """torch's launcher on this machine; the others, such as Kubernetes pods, run `python -m flows.runtime.agent`."""

    kind: Literal["rendezvous"]
    nodes: Count = Field(description="number of machines")
    endpoint: Annotated[str, Field(pattern=r"^[^:\s]+:\d+$"), AfterValidator(_with_a_port)] = Field(
        description="HOST:PORT at which the other machines reach the one that runs the stage"
    )


class RemoteShards(Section):
    """A copy of the shards on S3 or another store, which training processes read through a cache on the local disk."""

    url: str = Field(
        description="address that fsspec understands, such as s3://bucket/shards; `python -m flows.upload_shards` "
        "writes it"
    )
    cache: Path = Field(
        Path(), description="folder on a local disk; shards are kept in its folder .lotlip/shards, also for later runs"
    )
    max_bytes: Count = Field(
        200_000_000_000, description="size of the cache; it must hold the 128 shards that training keeps open"
    )


Launch = Annotated[LocalLaunch | HostfileLaunch | SlurmLaunch | RendezvousLaunch, Field(discriminator="kind")]


class TrainingCompute(Section):
    """How a model is trained: processes, memory, intervals, early stopping."""

    processes: Count = Field(1, description="number of training processes, each on its GPU or share of the cores")
    parallel_seeds: Count = Field(
        1, description="seeds trained at the same time, each on its share of the cores: small models leave cores idle"
    )
    launch: Launch = Field(LocalLaunch(), description="how the processes are started, and on how many machines")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="DeepSpeed's ZeRO stage, what is partitioned across processes: 0: nothing; 1: optimizer states; "
        "2: also gradients; 3: also weights",
    )
    gradient_accumulation_steps: Count = Field(
        1, description="micro-batches per step and process; memory holds the activations of one, the loss is the same"
    )
    activation_checkpointing: bool = Field(
        False,
        description="recompute the activations of each layer in the backward pass instead of keeping them: a third "
        "more computation for a fraction of the memory",
    )
    remote_shards: RemoteShards | None = Field(
        None, description="read the tars from a copy of the shards instead of from paths.shards"
    )
    loader_workers: NonNegative = Field(
        1, description="processes that read, decode and tokenize ahead, per training process; 0: no extra process"
    )
    prefetch: Count = Field(4, description="steps that each loader worker prepares ahead")
    log_every: Count = Field(10, description="steps between two entries of the training curves")
    checkpoint_every: Count = Field(200, description="steps between two checkpoints")
    stop_at_chance_after: NonNegative = Field(
        200, description="stop training if in-batch retrieval is not above chance after so many steps; 0: never stop"
    )
    max_final_loss_share: Positive = Field(
        0.95, description="highest final loss that passes the gate, as a share of the loss at chance"
    )
    peer_timeout_seconds: Seconds = Field(
        600, description="how long a process waits for the others before it ends the run, because one of them hangs"
    )

    @model_validator(mode="after")
    def _possible(self) -> TrainingCompute:
        nodes = getattr(self.launch, "nodes", 1)
        if self.processes % nodes:
            raise ValueError(
                f"processes {self.processes} is the total over all machines and must be divisible by launch.nodes "
                f"{nodes}; use {(self.processes // nodes + 1) * nodes}"
            )
        if self.parallel_seeds > 1 and self.processes > 1:
            raise ValueError(
                f"parallel_seeds {self.parallel_seeds} needs processes 1, not {self.processes}; set one of the two to 1"
            )
        return self

    def check_batch_size(self, batch_size: int) -> None:
        """Checks that processes and micro-batches divide a batch evenly.

        Raises:
            ValueError: they do not; the message names the nearest batch sizes.
        """
        parts = self.gradient_accumulation_steps * self.processes
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} is not divisible by processes × gradient_accumulation_steps = {parts}; "
                f"use {max(batch_size // parts, 1) * parts} or {(batch_size // parts + 1) * parts}"
            )


class CaptionerCompute(Section):
    """How a captioner runs; each kind reads only the keys that apply to it."""

    device: Device = Field(
        "auto",
        description="transformers: auto: all visible GPUs, or the CPU if there is none",
    )
    batch_size: Count = Field(8, description="transformers: images per batch; halved when the GPU runs out of memory")
    concurrency: Count = Field(16, description="endpoint: requests in flight per process, across all its units")
    timeout_seconds: Seconds = Field(120, description="endpoint: a request without a response for so long is retried")
    retries: NonNegative = Field(
        5, description="endpoint: retries of a request after the first attempt, after 0.5 s, 1 s, 2 s, …"
    )


CAPTIONER_DEFAULTS = CaptionerCompute()


class RayConfig(Section):
    """The Ray cluster, for `task_runner: ray`."""

    address: str | None = Field(
        None, description="address of a running Ray cluster; null: start one on this machine while the flow runs"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(
        0, description="GPUs reserved for each unit that runs models, in caption, shard and evaluate"
    )


class DaskConfig(Section):
    """The Dask cluster, for `task_runner: dask`."""

    address: str | None = Field(
        None, description="address of a running Dask scheduler; null: start one on this machine while the flow runs"
    )


class Compute(Section):
    """How work is done. No setting in this section changes a result by more than rounding."""

    device: Device = Field(
        "auto", description="device for inference (features, evaluation); auto: the first GPU, or the CPU if none"
    )
    batch_size: Count = Field(250, description="images or texts per batch for inference")
    workers: Count = Field(2, description="units of work that run at the same time")
    parallel_stages: Count = Field(
        1,
        description="stages that `make reproduce` runs at the same time; the stages of small models leave cores idle",
    )
    retries: NonNegative = Field(2, description="retries of a unit after the first attempt")
    retry_delay_seconds: Annotated[float, Field(ge=0, le=1e9)] = Field(
        1.0, description="pause before a unit is retried"
    )
    task_runner: Literal["threads", "processes", "ray", "dask"] = Field(
        "threads", description="where the units of ingest, caption, shard and evaluate run: docs/scaling.md"
    )
    shared_folder: bool = Field(
        True,
        description="whether the workers of the cluster at `ray.address` or `dask.address` have the project's folder, "
        "under the same path; false: they are sent the files of each unit, and its outputs are brought back",
    )
    ray: RayConfig = RayConfig()
    dask: DaskConfig = DaskConfig()
    training: TrainingCompute = TrainingCompute()
    ablations: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="name of an ablation → its differences from `training`"
    )
    captioners: dict[Name, CaptionerCompute] = Field(
        default_factory=dict, description="name of a captioner → its compute settings"
    )

    def captioner(self, name: str) -> CaptionerCompute:
        """The compute settings of a captioner: its entry, or the defaults."""
        return self.captioners.get(name, CAPTIONER_DEFAULTS)
