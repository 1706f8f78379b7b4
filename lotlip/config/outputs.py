"""What each stage writes, and how its outputs are recognised; a test compares this with `dvc.yaml`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lotlip.core.files import ForeignFileError, check_replaceable, recover
from lotlip.core.paths import Paths
from lotlip.data.records import DATA_DOCS
from lotlip.evaluate.records import BASELINES


class Outputs(NamedTuple):
    """The outputs of one instance of a stage.

    Attributes:
        folders: each with a record of its files (`lotlip.core.files`).
        files: file → a function that recognises an output by its contents.
    """

    folders: list[Path]
    files: dict[Path, Callable[[Path], bool]]


def outputs(paths: Paths, stage: str, item: str | None = None) -> Outputs:
    """The outputs of a stage.

    Args:
        paths: of params.yaml.
        stage: "ingest", "pretrain", …
        item: the captioner or ablation, for a stage that has one.
    """
    label = f"{stage}-{item}" if item else stage
    if stage == "baselines":  # has no gate, so no pages of one
        return Outputs([paths.metrics / BASELINES], {paths.stages / f"{label}.json": is_stage_record})
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


def prepare(expected: Outputs) -> None:
    """Completes replacements that a killed run left unfinished, and checks that only the stage's outputs are replaced.

    Raises:
        ForeignFileError: another file or folder is in the way; it was not touched.
    """
    for folder in expected.folders:
        recover(folder)
        check_replaceable(folder)
    for file, ours in expected.files.items():
        if file.is_symlink() and not file.exists():
            raise ForeignFileError(f"{file} is a broken link; remove it")
        if file.exists() and not (file.is_file() and ours(file)):
            raise ForeignFileError(f"{file} would be replaced, but this stage did not write it; move it away")


def is_stage_record(path: Path) -> bool:
    """Whether a file is a stage's record of its time, counts and gate."""
    data = _json(path)
    return isinstance(data, dict) and {"stage", "seconds", "gate"} <= data.keys()


def is_scores(path: Path) -> bool:
    """Whether a file has the scores of an ablation."""
    data = _json(path)
    return isinstance(data, dict) and {"ablation", "benchmarks", "fingerprints"} <= data.keys()


def is_summary(path: Path) -> bool:
    """Whether a file has an ablation's main scores: benchmark → metric → share."""
    data = _json(path)
    return (
        isinstance(data, dict)
        and bool(data)
        and all(
            isinstance(scores, dict) and all(isinstance(value, (int, float)) for value in scores.values())
            for scores in data.values()
        )
    )


def is_comparison(path: Path) -> bool:
    """Whether a file is what `lotlip evaluate --out` writes."""
    data = _json(path)
    return isinstance(data, dict) and {"results", "published"} <= data.keys()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
