"""A training process in which a weight becomes infinite after the second step."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from lotlip.pretrain import trainer as pretrain
from lotlip.pretrain.engine import Engine
from lotlip.train import sink


class BreakingEngine(Engine):
    """Breaks a weight after the second step. The loss of that step is still finite."""

    def step(self, batches: Any, step: int) -> Any:
        result = super().step(batches, step)
        if step == 1:
            with torch.no_grad():
                self.model.text.proj.weight[0, 0] = math.inf
        return result


if __name__ == "__main__":
    pretrain.Engine = BreakingEngine  # type: ignore[misc]
    sys.exit(pretrain.run(sys.argv[1], sink))
