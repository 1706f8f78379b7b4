"""The files of a trained ablation that other stages read: `run.json` and each seed's `history.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lotlip.core.record import Record, read_record

RUN = "run.json"
HISTORY = "history.json"  # of a seed
OBJECTIVE = "objective.safetensors"  # of a seed: weights that the model itself does not need, if there are any

# Logged steps, each with "step", "loss", "in_batch_recall", …
History = list[dict[str, int | float]]


class Run(Record):
    """The inputs of an ablation's training, stored in `run.json`.

    Attributes:
        ablation: name of the ablation in params.yaml.
        config: `PretrainConfig` as JSON. It stays JSON because models outlive the settings of a version of lotlip.
        data_hash: hash of the shards' index.json.
        git_commit: commit of the code; "unknown" outside git.
        fingerprints: seed → fingerprint of its inputs; two runs with equal fingerprints are the same.
    """

    ablation: str
    config: dict[str, Any]
    data_hash: str
    git_commit: str
    fingerprints: dict[str, str]


def read_history(ablation: Path, seed: int | str) -> History:
    """Reads the curves of one seed from a trained ablation's folder; raises what `read_record` raises."""
    return read_record(ablation / f"seed-{seed}" / HISTORY, History)
