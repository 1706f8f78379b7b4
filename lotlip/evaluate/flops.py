"""What a text costs: floating-point operations of the text tower against its context length (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text_tower import TextTower

CONTEXT_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # params.yaml takes no longer one


def flops_by_context(config: LotlipConfig, lengths: Iterable[int] = CONTEXT_LENGTHS) -> dict[int, int]:
    """Context length → `text_tower_flops`, shortest first.

    Args:
        config: of the model, whose own context length is always among them.
        lengths: others to count; those that the encoder has no positions for are left out.
    """
    tower = _weightless_tower(config)
    wanted = {length for length in lengths if length <= tower.positions} | {config.context_length}
    return {length: _count(tower, config, length) for length in sorted(wanted)}


def text_tower_flops(config: LotlipConfig, context_length: int) -> int:
    """Floating-point operations of one forward pass with one text that fills the context.

    Every token's hidden state is computed, as in the released code; a training step saves most of the last layer.
    Matrix products are counted, 2 operations for a multiply-add: attention's among them, in full, for what is masked is
    computed all the same. Element-wise work (norms, softmax, activations) is not.

    Args:
        config: of the model; its own context length plays no part.
        context_length: tokens of the text, [CLS], corner and register tokens included.

    Raises:
        ValueError: the encoder has fewer positions.
    """
    return _count(_weightless_tower(config), config, context_length)


def _weightless_tower(config: LotlipConfig) -> TextTower:
    """The text tower on the meta device, where tensors have shapes and no values: no memory, no arithmetic."""
    with torch.device("meta"):
        return TextTower(
            config.text_config,
            corner_tokens=config.corner_tokens,
            corner_mask=config.corner_mask,
            embed_dim=config.embed_dim,
        )


def _count(tower: TextTower, config: LotlipConfig, context_length: int) -> int:
    if context_length > tower.positions:  # shapes alone would not show it
        raise ValueError(
            f"context length {context_length} exceeds the text encoder's {tower.positions} positions; "
            "count a shorter one, or give the encoder more (max_position_embeddings)"
        )
    input_ids = torch.zeros(1, context_length, dtype=torch.int64, device="meta")
    lengths = torch.full((1,), context_length, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # not `tower(...)`, which needs the lengths' values
        hidden = tower.hidden_states(input_ids, lengths)  # [1, L, H]
        tower.features(hidden if config.similarity == "late-interaction" else hidden[:, : 1 + tower.corner_tokens])
    return counter.get_total_flops()
