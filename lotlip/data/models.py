"""Names of models, and the files on this machine that they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lotlip.core.files import sha256_tree

OPEN_CLIP, LOCAL = "open_clip:", "local-dir:"  # prefixes of a model of open_clip, and of its folder


def local_model(name: str) -> Path | None:
    """The file or folder on this machine that a model is loaded from; None if the name is not one.

    Args:
        name: as `lotlip.evaluate.models.open_encoder` or `lotlip.importing.start.open_start` takes it.
    """
    if name.startswith(OPEN_CLIP):
        address = name.removeprefix(OPEN_CLIP)
        name = address.removeprefix(LOCAL) if address.startswith(LOCAL) else address.partition(":")[2]
    return Path(name) if name and Path(name).exists() else None


def local_hashes(names: Iterable[str]) -> dict[str, str]:
    """The hash of the files of each model that is on this machine, by name."""
    return {name: sha256_tree(place) for name in names if (place := local_model(name))}
