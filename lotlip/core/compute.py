"""How work is done: devices, processes, batch sizes of inference, intervals. Nothing here changes a result.

DVC watches none of these settings; no fingerprint, report or sweep compares them. Results are equal up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lotlip.core.section import Count, Name, NonNegative, Port, Positive, Section

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class LocalLaunch(Section):
    """All processes on this machine, under torch's launcher where there are several."""

    kind: Literal["local"] = "local"


class HostfileLaunch(Section):
    """DeepSpeed's launcher, which reaches each machine of a hostfile by pdsh over ssh; the first is this one."""

    kind: Literal["hostfile"]
    path: Path = Field(description="lines of `HOST slots=GPUS`; the slots together are `processes`")
    port: Port = Field(29500, description="free on the first machine, where the processes meet")


class SlurmLaunch(Section):
    """torch's launcher on each node of the Slurm allocation that the stage runs in."""

    kind: Literal["slurm"]
    nodes: Count = Field(description="machines of the allocation that take part")
    port: Port = Field(29500, description="free on the first node, where the processes meet")


class RendezvousLaunch(Section):
    """torch's launcher here, and on the other machines (Kubernetes' pods, say) by `python -m flows.runtime.agent`."""

    kind: Literal["rendezvous"]
    nodes: Count = Field(description="machines that take part")
    endpoint: Annotated[str, Field(pattern=r"^[^:\s]+:\d+$")] = Field(
        description="HOST:PORT of the machine that runs the stage, as the others know it"
    )


Launch = Annotated[LocalLaunch | HostfileLaunch | SlurmLaunch | RendezvousLaunch, Field(discriminator="kind")]


class TrainingCompute(Section):
    """How a model is trained: processes, memory, intervals, when to stop."""

    processes: Count = Field(1, description="processes that train together, each on its GPU or share of the cores")
    parallel_seeds: Count = Field(
        1, description="seeds that train side by side, each on its share of the cores: small models leave cores idle"
    )
    launch: Launch = Field(LocalLaunch(), description="how the processes are started, on how many machines")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="DeepSpeed's ZeRO stage, what processes divide among them: 0: nothing; 1: optimizer states; "
        "2: gradients too; 3: weights too",
    )
    gradient_accumulation_steps: Count = Field(
        1, description="micro-batches per step and process, so that memory holds the activations of one; same loss"
    )
    loader_workers: NonNegative = Field(
        1, description="processes that read, decode and tokenize ahead, for each training process; 0: it does so itself"
    )
    prefetch: Count = Field(4, description="steps that each loader worker holds ready")
    log_every: Count = Field(10, description="steps between two entries of the training curves")
    checkpoint_every: Count = Field(200, description="steps between two checkpoints")
    stop_at_chance_after: NonNegative = Field(
        200, description="steps in which retrieval inside the batch must get better than chance; 0: never stop for it"
    )
    max_final_loss_share: Positive = Field(
        0.95, description="of the loss at chance that the last steps may still have; more fails the gate"
    )
    peer_timeout_seconds: Positive = Field(
        600, description="a process that waits longer for the others ends the run: one of them hangs"
    )

    @model_validator(mode="after")
    def _possible(self) -> TrainingCompute:
        nodes = getattr(self.launch, "nodes", 1)
        if self.processes % nodes:
            raise ValueError(
                f"processes {self.processes} is the number on all machines and not divisible by launch.nodes {nodes}; "
                f"use {(self.processes // nodes + 1) * nodes}"
            )
        if self.parallel_seeds > 1 and self.processes > 1:
            raise ValueError(
                f"parallel_seeds {self.parallel_seeds} is for one process for each seed, not {self.processes}; "
                "set one of the two to 1"
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
    """How a captioner works; a kind reads what concerns it."""

    device: Device = Field(
        "auto",
        description="transformers: auto: spread over all GPUs that the process sees, the CPU where there is none",
    )
    batch_size: Count = Field(
        8, description="transformers: images at a time; halved where they do not fit into the GPU's memory"
    )
    concurrency: Count = Field(
        16, description="endpoint: requests in flight from a process, whatever number of units it works on"
    )
    timeout_seconds: Positive = Field(
        120, description="endpoint: a request that brings nothing for so long is tried again"
    )
    retries: NonNegative = Field(
        5, description="endpoint: tries after the first, for a request; half a second, one, two, … apart"
    )


CAPTIONER_DEFAULTS = CaptionerCompute()


class RayConfig(Section):
    """Where Ray's workers are, for `task_runner: ray`."""

    address: str | None = Field(
        None, description="of a Ray cluster that runs; null: one on this machine, for the time of the flow"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="that a captioner is given")


class Compute(Section):
    """How work is done. Nothing in this section changes a result by more than rounding."""

    device: Device = Field(
        "auto", description="of models that are only read (features, evaluation); auto: the first GPU, or else the CPU"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="number format of models that are only read")
    batch_size: Count = Field(250, description="images or texts that a model that is only read encodes at a time")
    workers: Count = Field(2, description="units of work that run at the same time")
    retries: NonNegative = Field(2, description="tries after the first, for a unit")
    retry_delay_seconds: Annotated[float, Field(ge=0)] = Field(1.0, description="pause before a unit is tried again")
    task_runner: Literal["threads", "ray"] = Field("threads", description="where partitions are captioned")
    ray: RayConfig = RayConfig()
    training: TrainingCompute = TrainingCompute()
    ablations: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="name of an ablation → its differences from `training`"
    )
    captioners: dict[Name, CaptionerCompute] = Field(
        default_factory=dict, description="name of a captioner → how it works"
    )

    def captioner(self, name: str) -> CaptionerCompute:
        """How a captioner works: its entry, or the defaults."""
        return self.captioners.get(name, CAPTIONER_DEFAULTS)
