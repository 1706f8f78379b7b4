"""Reads safetensors files; errors name the file and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Opens a safetensors file, from which single tensors can be read.

    Raises:
        ValueError: the file is missing, damaged or in another format.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; name a safetensors file, or run the stage that writes it")
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path} {_fault(path, error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU.

    Raises:
        ValueError: the file is missing, damaged or in another format.
    """
    with open_weights(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)


def check_weights(folder: Path) -> None:
    """Opens every safetensors file of a folder, so that the error for a damaged one names it.

    Raises:
        ValueError: a file is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with open_weights(path):
            pass


def check_finite(weights: Iterable[tuple[str, Tensor]], place: object) -> None:
    """Checks that weights have no NaN or infinity.

    Raises:
        ValueError: some have; the message gives the place, the number of tensors and the first one's name.
    """
    broken = [name for name, value in weights if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"the model {place} is broken: {len(broken)} of its weights have NaN or infinity, first {broken[0]}; "
            "restore its files, or retrain it"
        )


def _fault(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "is a torch checkpoint, not a safetensors file; convert it: safetensors.torch.save_file(torch.load(FILE, "
            'weights_only=True), "weights.safetensors")'
        )
    return f"is damaged or not a safetensors file ({error}); restore it, or rerun the stage that writes it"
