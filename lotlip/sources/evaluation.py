"""Images that are evaluated on and must not be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lotlip.inspection import held_out_images
from lotlip.partitions import unit_names
from lotlip.sources.folder import _find_images


def image_hashes(folders: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each image → where it is.

    Args:
        folders: of images; or of an ingest stage, whose images of other splits than train are meant.

    Raises:
        ValueError: a folder is not there, or has no image.
    """
    found: dict[str, str] = {}
    for folder in folders:
        if (folder / "index.json").is_file():
            found |= dict.fromkeys(held_out_images(folder, unit_names(folder)), str(folder))
            continue
        for name in _find_images(folder):
            with (folder / name).open("rb") as file:
                found[hashlib.file_digest(file, "sha256").hexdigest()] = str(folder / name)
    return found
