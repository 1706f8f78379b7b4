"""The demo's source: pictures of its world with short captions."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import replace

from lotlip.core.files import sha256_json
from lotlip.data.records import Failure, ImageRecord, Unit
from lotlip.demo.world import generate_scene, render, short_caption
from lotlip.ingest.config import ImagesConfig, SceneSourceConfig
from lotlip.ingest.record_validation import RecordValidator


class SceneSource:
    """Yields the pictures of the demo's world; a seed always gives the same ones.

    Items are scene numbers; train, validation and test scenes come from separate random streams.
    """

    def __init__(self, config: SceneSourceConfig, images: ImagesConfig) -> None:
        self.config = config
        self._validator = RecordValidator(images)

    def units(self, partition_size: int) -> list[Unit]:
        """The splits, divided into partitions of at most `partition_size` scenes."""
        counts = {"train": self.config.train, "val": self.config.val, "test": self.config.test}
        return [
            Unit(split, index, tuple(str(number) for number in range(start, min(start + partition_size, count))))
            for split, count in counts.items()
            for index, start in enumerate(range(0, count, partition_size))
        ]

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """Draws the scenes of a unit, in order."""
        assert unit.split is not None  # `units` sets it
        for item in unit.items:
            yield self._record(unit.split, int(item))

    def state(self, unit: Unit) -> str:
        """A hash of the scene numbers: together with the settings, they decide the pictures."""
        return sha256_json([unit.split, *unit.items])

    def files(self, unit: Unit) -> tuple[()]:
        """None: scenes are drawn."""
        return ()

    def split(self, key: str) -> str:
        """The key's prefix."""
        return key.partition("-")[0]

    def _record(self, split: str, number: int) -> ImageRecord | Failure:
        scene = generate_scene(self.config.seed, split, number, self.config.small_objects)
        file = io.BytesIO()
        render(scene, self.config.image_size).save(file, format="PNG")
        caption = short_caption(scene, random.Random(f"{self.config.seed}/{split}/{number}/caption"))
        key = f"{split}-{number:06d}"
        record = self._validator(key, key, file.getvalue(), caption, "png")
        return replace(record, scene=scene.to_json()) if isinstance(record, ImageRecord) else record
