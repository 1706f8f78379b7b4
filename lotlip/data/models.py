"""Names of models, and the files on this machine that they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from lotlip.core.files import sha256_tree

# A stage's note with the hash of each starting model on this machine, by name. DVC does not watch them.
STARTING_MODELS = "starting_models"
OPEN_CLIP, LOCAL = "open_clip:", "local-dir:"  # prefixes of a model of open_clip, and of its folder


def local_model(name: str) -> Path | None:
    """The file or folder on this machine that a model is loaded from; None if the name is not one.

    Args:
        name: as `lotlip.evaluate.models.open_encoder` or `lotlip.importing.start.open_start` takes it.
    """
    if name.removeprefix(OPEN_CLIP).startswith(LOCAL):
        name = name.removeprefix(OPEN_CLIP).removeprefix(LOCAL)
    elif name.startswith(OPEN_CLIP):
        name = name.removeprefix(OPEN_CLIP).partition(":")[2]
    return Path(name) if name and Path(name).exists() else None


def check_address(architecture: str, weights: str) -> None:
    """Checks what follows `OPEN_CLIP` in a name: an architecture, and a tag of its weights or a file.

    open_clip's own errors list all models.

    Raises:
        ValueError: open_clip does not have them.
    """
    import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists them"
        raise ValueError(f"open_clip {open_clip.__version__} has no architecture {architecture!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights.lower().replace("-", "_") not in tags and not Path(weights).is_file():
        problem = f"{weights!r} is neither one of its tags nor a file" if weights else "no weights are given"
        raise ValueError(
            f"{OPEN_CLIP}{architecture}: {problem}; use {OPEN_CLIP}{architecture}:FILE or a tag after the colon: "
            f"{', '.join(tags) or 'there are none'}"
        )


def model_hash(path: Path) -> str:
    """The hash of a model's file or folder without its card, which users may edit."""
    return sha256_tree(path, skip="README.md")


def local_hashes(names: Iterable[str]) -> dict[str, str]:
    """The hash of the files of each model that is on this machine, by name."""
    return {name: model_hash(place) for name in names if (place := local_model(name))}
