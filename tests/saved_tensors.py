"""What autograd keeps between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Held:
    """A saved tensor, counted for as long as its graph lives."""

    def __init__(self, owner: SavedTensors, tensor: Tensor) -> None:
        # detached, for an operation that saves its own result would otherwise hold itself
        self.owner, self.tensor = owner, tensor.detach()
        owner.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.owner.add(self.tensor.untyped_storage(), -1)


class SavedTensors:
    """Counts the bytes of what is saved in the block, each storage once, but for a module's own.

    Attributes:
        total: of all that was saved.
        peak: most that was held at the same time.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.total = self.peak = self.now = 0
        self.holders: dict[int, int] = {}
        self.left_out: set[int] = set()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Held(self, tensor), lambda held: held.tensor
        )
        if module is not None:
            self.leave_out(module)

    def leave_out(self, module: nn.Module) -> None:
        """Does not count a module's weights, which are there anyway."""
        own = [*module.parameters(), *module.buffers()]
        self.left_out |= {value.untyped_storage().data_ptr() for value in own}

    def add(self, storage: Any, change: int) -> None:
        key = storage.data_ptr()
        if key in self.left_out:
            return
        before = self.holders.get(key, 0)
        self.holders[key] = before + change
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
