"""Features and results of all processes that train together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All-gather with gradients. On gloo, torch.distributed.nn's (2.15) permutes the entries of a gradient that is not
    contiguous, which is what a matrix product returns."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        gathered = features.new_empty(dist.get_world_size() * len(features), *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        local = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(local, gradient)
        return local


def several_processes() -> bool:
    """Whether the global batch is split over processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def first_row(rows: int) -> int:
    """Number of this process's first row in the global batch, of which each process has `rows`."""
    return dist.get_rank() * rows if several_processes() else 0


def gather(features: Tensor) -> Tensor:
    """Concatenates the features of all processes, [W·B, …]; gradients flow back to the process of origin."""
    return _Gather.apply(features.contiguous()) if several_processes() else features
