"""Ingests one unit of a source: reads its items, and writes them as partitions with the hashes of their images."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter

from lotlip.data.partitions import finished_unit, reuse_or_write, write_partitions
from lotlip.data.records import Unit, UnitReport
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
    """

    source: SourceConfig
    images: ImagesConfig
    folder: Path
    hashes: Path | None = None
    run: str = field(default_factory=lambda: uuid4().hex)

    def open(self) -> Source:
        """The source, opened once per process and run for all threads."""
        described = TypeAdapter(SourceConfig).dump_json(self.source)
        with _opening:
            return _opened(described, self.images, self.run)

    def __call__(self, unit: Unit) -> list[UnitReport]:
        """Writes the unit's partitions, unless they exist and were made from the same items."""
        return reuse_or_write(
            unit.name,
            self.open().state(unit),
            self.folder,
            lambda: finished_unit(unit, self.folder),
            lambda: self._write(unit),
        )

    def _write(self, unit: Unit) -> list[UnitReport]:
        source = self.open()
        reports = write_partitions(unit, source.read(unit), self.folder, source.split)
        if self.hashes:
            for report in reports:
                if report.name.startswith("train/"):
                    write_hashes(self.folder, report.name, self.hashes)
        return reports


@lru_cache(maxsize=1)
def _opened(settings: bytes, images: ImagesConfig, _run: str) -> Source:
    return open_source(TypeAdapter(SourceConfig).validate_json(settings), images)
