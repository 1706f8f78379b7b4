"""Sources of images and their short captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from lotlip.core.variants import implementation
from lotlip.data.records import Failure, ImageRecord, Unit
from lotlip.ingest.config import ImagesConfig, SourceConfig

_BUILT_IN = {
    "scenes": "lotlip.demo.source:SceneSource",
    "folder": "lotlip.ingest.sources.folder:FolderSource",
    "webdataset": "lotlip.ingest.sources.webdataset:WebDatasetSource",
    "parquet": "lotlip.ingest.sources.table:TableSource",
    "csv": "lotlip.ingest.sources.table:TableSource",
    "jsonl": "lotlip.ingest.sources.table:TableSource",
    "json": "lotlip.ingest.sources.table:TableSource",
}


class Source(Protocol):
    """Images with short captions, divided into units that can be read independently, in any order, by any process.

    A source that is pickled need only be able to `read` and `split`, on a machine that has no other files of it than
    those of a unit. `files` may be missing; then all workers need the source's files.
    """

    def units(self, partition_size: int) -> list[Unit]:
        """The units, in the same order at every call; at most `partition_size` items each, if the source can divide."""

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """One record or failure for each of the unit's items, in order.

        Raises:
            OSError: the unit could not be read to its end; a retry may succeed.
        """

    def state(self, unit: Unit) -> str | None:
        """A hash of everything besides the settings that decides what `read` yields, without reading file contents.

        It changes when an item is added, removed, renamed or replaced. None: the source cannot tell whether the unit
        changed, so the unit is read again.

        Raises:
            OSError: as for `read`.
        """

    def files(self, unit: Unit) -> Iterable[Path]:
        """The local files that `read` opens for a unit; those that do not exist may be among them."""

    def split(self, key: str) -> str:
        """The split of a sample, one of `SPLITS`; called only if the unit has no split of its own."""


def open_source(settings: SourceConfig, images: ImagesConfig | None = None) -> Source:
    """Opens the source that `ingest.source` of params.yaml describes.

    Args:
        settings: of the source.
        images: section `ingest.images`: requirements for images, and how they are stored.

    Raises:
        ValueError: the configured path has nothing to read.
    """
    return implementation("lotlip.sources", settings.kind, _BUILT_IN)(settings, images or ImagesConfig())
