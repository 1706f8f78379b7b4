"""The device that a model runs on."""

import torch


def choose_device(name: str) -> str:
    """The device with a name: "cpu", "cuda" or "cuda:N"; "auto" is the first GPU, or the CPU if there is none.

    Raises:
        ValueError: the name is not a device's, or the machine does not have that GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise ValueError(f"there is no device {name!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch finds no GPU for the device {name}; choose auto or cpu")
    return name
