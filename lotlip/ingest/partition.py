"""Ingests one unit of a source: reads its items, and writes them as partitions with the hashes of their images."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter

from lotlip.data.partitions import MARKER, finished_unit, reuse_or_write, write_partitions
from lotlip.data.records import SPLITS, NonRetryableError, Unit, UnitReport
from lotlip.data.work import UnitFiles, Write, write_here
from lotlip.ingest.config import ImagesConfig, SourceConfig
from lotlip.ingest.perceptual import write_hashes
from lotlip.ingest.sources import Source, open_source

_opening = threading.Lock()


@dataclass(frozen=True)
class Ingesting:
    """Everything that is needed to ingest a unit; small enough to be sent to another process.

    Attributes:
        source: section `ingest.source` of params.yaml.
        images: section `ingest.images`.
        folder: folder for the partitions.
        hashes: folder for the perceptual hashes of the training split's images; None: they are not needed.
        run: distinguishes runs, because a cluster's process may outlive one and its source may have changed.
        opened: the source, if it is sent with a unit: a worker that has only the unit's files cannot open it.
    """

    source: SourceConfig
    images: ImagesConfig
    folder: Path
    hashes: Path | None = None
    run: str = field(default_factory=lambda: uuid4().hex)
    opened: Source | None = None

    def open(self) -> Source:
        """The source, opened once per process and run for all threads."""
        if self.opened is not None:
            return self.opened
        described = TypeAdapter(SourceConfig).dump_json(self.source)
        with _opening:
            return _opened(described, self.images, self.run)

    def __call__(self, unit: Unit, write: Write = write_here) -> list[UnitReport]:
        """Writes the unit's partitions, unless they exist and were made from the same items."""
        return reuse_or_write(
            unit.name,
            self.open().state(unit),
            self.folder,
            lambda: finished_unit(unit, self.folder),
            lambda: write(replace(self, opened=self.open()), unit),
        )

    def write(self, unit: Unit) -> list[UnitReport]:
        """Writes the unit's partitions."""
        source = self.open()
        reports = write_partitions(unit, source.read(unit), self.folder, source.split)
        if self.hashes:
            for report in reports:
                if report.name.startswith("train/"):
                    write_hashes(self.folder, report.name, self.hashes)
        return reports

    def files(self, unit: Unit) -> UnitFiles:
        """The unit's items in the source, and its partitions.

        Raises:
            NonRetryableError: the source does not tell which files a unit reads.
        """
        files_of = getattr(self.open(), "files", None)
        if files_of is None:
            raise NonRetryableError(
                f"a source of kind {self.source.kind} cannot tell which files a unit reads, so the workers need a "
                "shared folder (compute.shared_folder: true); or set compute.task_runner to processes"
            )
        splits = SPLITS if unit.split is None else (unit.split,)
        partitions = [unit.partition(split) for split in reversed(splits)]
        writes = [self.folder / f"{name}{ending}" for name in partitions for ending in (".tar", ".parquet")]
        if self.hashes:
            writes += [self.hashes / f"{name}.npy" for name in partitions]
        return UnitFiles(dict.fromkeys(files_of(unit)), [*writes, *(self.folder / f"{n}{MARKER}" for n in partitions)])


@lru_cache(maxsize=1)
def _opened(settings: bytes, images: ImagesConfig, _run: str) -> Source:
    return open_source(TypeAdapter(SourceConfig).validate_json(settings), images)
