"""Where images and their short captions come from."""

from __future__ import annotations

from collections.abc import Iterator
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
}


class Source(Protocol):
    """Images with short captions, cut into units that can be read apart, in any order and by any process."""

    def units(self, partition_size: int) -> list[Unit]:
        """The units, the same list at every call; of at most `partition_size` items, where the source can cut it."""

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """What became of each of the unit's items: one for one, in their order.

        Raises:
            OSError: the unit could not be read to its end and may be, at another try.
        """

    def state(self, unit: Unit) -> str | None:
        """A hash of all that decides what `read` gives besides the settings; file contents are not read for it.

        It changes when an item is added, removed, renamed or replaced. None: the source cannot know whether the unit
        changed, so the unit is read again.

        Raises:
            OSError: as for `read`.
        """

    def split(self, key: str) -> str:
        """Which of `SPLITS` a sample is in; asked where a unit has no split of its own."""


def open_source(settings: SourceConfig, images: ImagesConfig | None = None) -> Source:
    """The source that `ingest.source` of params.yaml describes.

    Args:
        settings: the source's.
        images: what an image must be, and how it is stored: `ingest.images`.

    Raises:
        ValueError: there is nothing to read where it points.
    """
    return implementation("lotlip.sources", settings.kind, _BUILT_IN)(settings, images or ImagesConfig())
