"""FLOPs of the text tower by context length (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.text_tower import TextTower, build_text_tower

CONTEXT_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # up to the maximum of params.yaml


def flops_by_context(config: LotlipConfig, lengths: Iterable[int] = CONTEXT_LENGTHS) -> dict[int, int]:
    """Returns context length → `text_tower_flops`, in ascending order.

    Args:
        config: configuration of the model; its context length is always included.
        lengths: further lengths; those beyond the encoder's positions are left out.
    """
    positions = _meta_tower(config).positions
    counted = {length for length in lengths if length <= positions} | {config.context_length}
    return {length: text_tower_flops(config, length) for length in sorted(counted)}


def text_tower_flops(config: LotlipConfig, context_length: int) -> int:
    """Counts the FLOPs of one forward pass with one text that fills the context.

    Every token's hidden state is computed, as in the released code; a training step skips most of the last layer.
    Matrix products are counted, with 2 operations per multiply-add. Masked attention counts in full, because it is
    computed. Element-wise operations (norms, softmax, activations) are not counted.

    Args:
        config: configuration of the model; its context length is ignored.
        context_length: number of tokens, including [CLS], corner and register tokens.

    Raises:
        ValueError: the encoder has fewer positions.
    """
    config = copy(config)
    config.context_length = context_length
    tower = _meta_tower(config)
    if context_length > tower.positions:  # no operation on the meta device would fail
        raise ValueError(
            f"context length {context_length} exceeds the text encoder's {tower.positions} positions; "
            "use a shorter context or raise max_position_embeddings"
        )
    input_ids = torch.zeros(1, context_length, dtype=torch.int64, device="meta")
    lengths = torch.full((1,), context_length, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # `tower(...)` would need the values of the lengths
        tokens, outputs = tower.hidden_states(input_ids, lengths)
        tower.features(tokens if config.similarity == "late-interaction" else outputs)
    return counter.get_total_flops()


def _meta_tower(config: LotlipConfig) -> TextTower:
    """Builds the text tower on the meta device, where tensors have shapes but no data."""
    with torch.device("meta"):
        return build_text_tower(config)
