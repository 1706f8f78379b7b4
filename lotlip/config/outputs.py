"""What each stage writes and how that is recognised; `dvc.yaml` lists the same, which a test compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lotlip.core.files import NotOurs, check_replaceable, recover
from lotlip.core.paths import Paths
from lotlip.data.records import DATA_DOCS


class Outputs(NamedTuple):
    """What one instance of a stage writes.

    Attributes:
        folders: each with a record of its files (`lotlip.core.files`).
        files: file → whether its contents are such an output.
    """

    folders: list[Path]
    files: dict[Path, Callable[[Path], bool]]


def outputs(paths: Paths, stage: str, item: str | None = None) -> Outputs:
    """The outputs of a stage.

    Args:
        paths: of params.yaml.
        stage: "ingest", "pretrain", …
        item: the captioner or ablation of a stage that has one.
    """
    label = f"{stage}-{item}" if item else stage
    folders = [paths.stages / DATA_DOCS / label]
    files: dict[Path, Callable[[Path], bool]] = {paths.stages / f"{label}.json": is_stage_record}
    if stage in ("ingest", "shard", "report"):
        folders.append({"ingest": paths.ingest, "shard": paths.shards, "report": paths.report}[stage])
    elif stage == "image-tower":
        folders.append(paths.image_tower)
    elif stage in ("caption", "pretrain") and item:
        folders.append((paths.captions if stage == "caption" else paths.models) / item)
    elif stage == "evaluate" and item:
        folders.append(paths.metrics / "attention" / item)
        files[paths.metrics / f"{item}.json"] = is_scores
        files[paths.metrics / "summary" / f"{item}.json"] = is_summary
    return Outputs(folders, files)


def prepare(own: Outputs) -> None:
    """Completes what a killed run left half-way, and checks that nothing of others is in the way.

    Raises:
        NotOurs: something is; it was not touched.
    """
    for folder in own.folders:
        recover(folder)
        check_replaceable(folder)
    for file, ours in own.files.items():
        if file.is_symlink() and not file.exists():
            raise NotOurs(f"{file} is a link to nothing; remove it")
        if file.exists() and not (file.is_file() and ours(file)):
            raise NotOurs(f"{file} would be replaced, but it is not what this stage writes; move it away")


def is_stage_record(path: Path) -> bool:
    """Whether a file is a stage's record of its time, counts and gate."""
    found = _json(path)
    return isinstance(found, dict) and {"stage", "seconds", "gate"} <= found.keys()


def is_scores(path: Path) -> bool:
    """Whether a file has the scores of an ablation."""
    found = _json(path)
    return isinstance(found, dict) and {"ablation", "benchmarks", "fingerprints"} <= found.keys()


def is_summary(path: Path) -> bool:
    """Whether a file has an ablation's main scores: benchmark → metric → share."""
    found = _json(path)
    return (
        isinstance(found, dict)
        and bool(found)
        and all(
            isinstance(scores, dict) and all(isinstance(value, (int, float)) for value in scores.values())
            for scores in found.values()
        )
    )


def is_comparison(path: Path) -> bool:
    """Whether a file is what `lotlip evaluate --out` writes."""
    found = _json(path)
    return isinstance(found, dict) and {"results", "published"} <= found.keys()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
