"""Reads files of weights, safetensors and torch's; errors name the file and a remedy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile, is_zipfile

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


def read_any_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a torch checkpoint by name, on the CPU.

    A checkpoint's weights may be under `state_dict`, `model` or `module`, and their names may start with `module.`.

    Raises:
        ValueError: the file is missing, damaged, not safe to read, or has something else than weights.
    """
    named = path.suffix == ".safetensors" or not path.is_file()
    content: Any = read_weights(path) if named else load_checkpoint(path)
    for name in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} has something else than weights by name; save the model's state_dict alone")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_checkpoint(path: Path) -> Any:
    """The content of a torch checkpoint or safetensors file, on the CPU; only tensors and plain types are read.

    Raises:
        ValueError: the file is missing, damaged, or contains objects whose reading would run code.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; check the path")
    if _is_safetensors(path):
        return read_weights(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # problems that torch warns about raise an error below
            # a file in torch's older format is not a zip file and cannot be memory-mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many types on invalid files
        needed = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if isinstance(error, UnpicklingError) and needed:
            raise ValueError(
                f"{path} needs {needed[1]} besides its weights, so reading it would run code from the file; if you "
                "trust it, load it with torch.load(…, weights_only=False) and save only its 'state_dict'"
            ) from error
        if is_zipfile(path) and any("/code/" in name for name in ZipFile(path).namelist()):
            raise ValueError(
                f"{path} is a TorchScript archive, which contains code; save only the model's state_dict, or name "
                "OpenAI's models as open_clip does, such as open_clip:ViT-B-16:openai"
            ) from error
        if kind := _other_format(path):
            raise ValueError(f"{path} is {kind}, not a torch checkpoint; {_OTHER_REMEDY}") from error
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is incomplete or not a torch checkpoint that is safe to read; "
            "download it again if it is truncated"
        ) from error


def check_weights(folder: Path) -> None:
    """Opens every safetensors file of a model's folder, so that the error for a damaged one names it.

    Raises:
        ValueError: a file is damaged, or the folder has an adapter, which would be ignored.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has an adapter (adapter_config.json), which is not read; merge it into its model first "
            "(merge_and_unload of peft), and save the result in another folder"
        )
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


_OTHER_REMEDY = "name a file of weights in torch's or safetensors' format, or download it again if it should be one"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors, whatever its name: with the length of its header, which is JSON."""
    start = _start(path)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _other_format(path: Path) -> str | None:
    """What a file is that has no weights in torch's or safetensors' format; None if its beginning does not show it."""
    start = _start(path)
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    if start[:1] == b"\x08" and start[1:2] < b"\x20" and start[8:9] != b"{":  # the number of ONNX's version comes first
        return "an ONNX model"
    line = start.partition(b"\n")[0].strip()
    if line and line.isascii() and line.decode().isprintable():
        return f"a text file that begins with {line.decode()!r}"
    return None


def _fault(path: Path, error: Exception) -> str:
    start = _start(path)
    if kind := _other_format(path):
        return f"is {kind}, not a safetensors file; {_OTHER_REMEDY}"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "is a torch checkpoint, not a safetensors file; convert it: safetensors.torch.save_file(torch.load(FILE, "
            'weights_only=True), "weights.safetensors")'
        )
    return f"is damaged or not a safetensors file ({error}); restore it, or rerun the stage that writes it"
