"""Images that are evaluated on and must not be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lotlip.data.inspection import held_out_images
from lotlip.data.partitions import unit_names
from lotlip.data.paths import find_images
from lotlip.data.records import ImageRecord
from lotlip.ingest.config import ImagesConfig
from lotlip.ingest.record_validation import Intake


def image_hashes(folders: Iterable[Path], images: ImagesConfig) -> dict[str, str]:
    """The sha256 of each image, as it is and as ingest would store it → where it is.

    Args:
        folders: of images; or of an ingest stage, whose images of other splits than train are meant.
        images: how ingest stores images: what it resizes and encodes anew has other bytes.

    Raises:
        ValueError: a folder is not there, or has no image.
    """
    intake = Intake(images)
    found: dict[str, str] = {}
    for folder in folders:
        if (folder / "index.json").is_file():
            found |= dict.fromkeys(held_out_images(folder, unit_names(folder)), str(folder))
            continue
        for name in find_images(folder, "name folders of images that must not be trained on, or none"):
            data = (folder / name).read_bytes()
            stored = intake(name, name, data, caption="none")
            found[hashlib.sha256(data).hexdigest()] = str(folder / name)
            if isinstance(stored, ImageRecord):
                found[stored.sha256] = str(folder / name)
    return found
