"""Removes the outputs of stages and scratch files: `make clean`. Files that no stage wrote are kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from lotlip.config.outputs import is_scores, is_stage_record, is_summary
from lotlip.config.params import Params, load_params
from lotlip.core.caches import lock
from lotlip.core.console import answer_help, explain
from lotlip.core.files import ASIDE, PARTIAL, RECORD, SCRATCH, recover, remove, remove_listed
from lotlip.core.paths import Paths
from lotlip.evaluate.records import BASELINES


def clean(params: Params) -> Iterator[str]:
    """Removes the outputs of all stages and scratch files.

    Args:
        params: params.yaml of the project; its paths are relative to the current folder.

    Yields:
        A line for each folder or file that was removed or kept.

    Raises:
        Locked: a stage or a trial of a sweep is running.
    """
    paths = params.paths
    paths.check_links(Path())
    locks = Path(SCRATCH, "locks")
    with ExitStack() as held:
        for file in sorted(locks.glob("*.lock")):
            held.enter_context(lock(file, f"stage {file.stem}"))
        for file in sorted(Path(SCRATCH, "sweeps").glob("*/lock")):
            held.enter_context(lock(file, f"trial {file.parent.name} of a sweep"))
        yield from _clean(paths)


def _clean(paths: Paths) -> Iterator[str]:
    for folder in _published(paths):
        kept = remove_listed(folder)
        yield f"removed {folder}"
        yield from (f"kept    {folder / name}: no stage wrote it" for name in kept)
    for folder, is_written_by_stage in (
        (paths.stages, is_stage_record),
        (paths.metrics / "summary", is_summary),
        (paths.metrics, is_scores),
    ):
        for file in sorted(folder.glob("*.json")):
            if file.is_file() and is_written_by_stage(file):
                remove(file, is_written_by_stage)
                yield f"removed {file}"
    scratch = Path(SCRATCH)
    if scratch.is_symlink():
        yield f"kept    {scratch}: it is a link"
    elif scratch.is_dir():
        for path in sorted(scratch.iterdir()):  # the folder itself may be a mount point
            if path.name != "locks":  # otherwise a stage that is starting could lock a removed file
                remove(path)
        yield f"removed {scratch}"
    for name, path in paths:
        if name != "caption_store" and path.is_dir():
            yield from (f"kept    {file}: no stage wrote it" for file in _remaining_files(path))


def _published(paths: Paths) -> Iterator[Path]:
    """Yields published folders, including those of captioners and ablations that are no longer in params.yaml."""
    single = [paths.ingest, paths.image_tower, paths.shards, paths.metrics / BASELINES, paths.report]
    several = [paths.captions, paths.models, paths.metrics / "attention", paths.stages / "data-docs"]
    names = {
        parent / child.name.removesuffix(ASIDE).removesuffix(PARTIAL)
        for parent in several
        if parent.is_dir()
        for child in parent.iterdir()
    }
    for folder in [*single, *sorted(names)]:
        recover(folder)
        if folder.is_symlink():
            continue
        if (folder / RECORD).is_file():
            yield folder


def _remaining_files(path: Path) -> Iterator[Path]:
    for base, _, names in os.walk(path):
        yield from (Path(base) / name for name in sorted(names) if name != ".gitkeep")


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        for line in clean(load_params()):
            print(line)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {explain(error)}")
