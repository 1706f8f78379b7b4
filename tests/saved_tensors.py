"""Measures the tensors that autograd saves for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _SavedTensor:
    """A saved tensor, counted until its graph is freed."""

    def __init__(self, owner: SavedTensors, tensor: Tensor) -> None:
        # detached, because an operation that saves its own result would otherwise reference itself
        self.owner, self.tensor = owner, tensor.detach()
        owner.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.owner.add(self.tensor.untyped_storage(), -1)


class SavedTensors:
    """Counts the bytes of tensors saved inside the context, each storage once, without a module's weights.

    Attributes:
        total: bytes of all saved tensors.
        peak: maximum of bytes saved at the same time.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.total = self.peak = self.now = 0
        self.references: dict[int, int] = {}
        self.excluded: set[int] = set()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _SavedTensor(self, tensor), lambda saved: saved.tensor
        )
        if module is not None:
            self.exclude(module)

    def exclude(self, module: nn.Module) -> None:
        """Excludes the weights of a module."""
        values = [*module.parameters(), *module.buffers()]
        self.excluded |= {value.untyped_storage().data_ptr() for value in values}

    def add(self, storage: Any, change: int) -> None:
        key = storage.data_ptr()
        if key in self.excluded:
            return
        before = self.references.get(key, 0)
        self.references[key] = before + change
        if before == 0:
            self.total += storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        elif before + change == 0:
            self.now -= storage.nbytes()

    def __enter__(self) -> SavedTensors:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
