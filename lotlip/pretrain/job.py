"""What the flow asks the training processes to do, as JSON on disk."""

from __future__ import annotations

from pathlib import Path

from lotlip.core.compute import TrainingCompute
from lotlip.core.record import Record
from lotlip.pretrain.config import PretrainConfig


class Job(Record):
    """All that a training process needs to know.

    Attributes:
        ablation: name of the configuration.
        config: what is trained, resolved.
        compute: how it is trained, resolved.
        seeds: that are trained.
        shards: folder of the data set.
        image_tower: folder of the frozen tower.
        scratch: where checkpoints go, and how long starting took.
        out: where finished seeds go.
        tracking_uri: of MLflow.
        run_ids: seed → MLflow run; a seed that is not named is not tracked.
        git_commit: of the code, for the model card.
    """

    ablation: str
    config: PretrainConfig
    compute: TrainingCompute
    seeds: list[int]
    shards: Path
    image_tower: Path
    scratch: Path
    out: Path
    tracking_uri: str
    run_ids: dict[str, str]
    git_commit: str = "unknown"

    def model_folder(self, seed: int) -> Path:
        """Where a seed's finished model stands."""
        return self.out / f"seed-{seed}"

    @property
    def timing(self) -> Path:
        """Where the training process writes its `Timing`."""
        return self.scratch / "timing.json"


class Timing(Record):
    """How long starting a training process took.

    Attributes:
        imports: seconds from the process's start until it was ready.
    """

    imports: float
