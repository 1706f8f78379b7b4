"""The job that the flow gives to the training processes, as JSON on disk."""

from __future__ import annotations

from pathlib import Path

from lotlip.core.compute import TrainingCompute
from lotlip.core.record import Record
from lotlip.pretrain.config import PretrainConfig


class Job(Record):
    """Input of a training process.

    Attributes:
        ablation: name of the configuration.
        config: what to train, resolved.
        compute: how to train it, resolved.
        seeds: seeds to train.
        shards: folder of the data set.
        image_tower: folder of the image tower.
        scratch: folder for checkpoints and start-up times.
        out: folder for finished seeds.
        tracking_uri: address of MLflow.
        run_ids: seed → ID of its MLflow run. A seed without a run is not tracked.
        git_commit: commit of the code, for the model card.
        data_hash: sha256 of the shards' `index.json`, for the model card.
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
    data_hash: str = "unknown"

    def model_folder(self, seed: int) -> Path:
        """Returns the folder of a seed's finished model."""
        return self.out / f"seed-{seed}"

    @property
    def timing(self) -> Path:
        """File to which the training process writes its `Timing`."""
        return self.scratch / "timing.json"


class Timing(Record):
    """Start-up time of a training process.

    Attributes:
        imports: seconds from the start of the process until it was ready.
    """

    imports: float
