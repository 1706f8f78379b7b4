"""Who sees whom in a text with corner tokens (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def corner_attention_mask(lengths: Tensor, length: int, corner_tokens: int, separate: bool = True) -> Tensor:
    """Which token sees which, from the texts' lengths alone (paper, section 3.2 and Fig. 3).

    The tokens are `[CLS] [Cor 1] … [Cor m] words [PAD]…`. [CLS] and the corner tokens see the words and themselves but
    never one another, so that each gathers the text apart; words never see a corner token; no one sees padding.

    Args:
        lengths: tokens of each text, padding not counted, [B].
        length: tokens of a row, padding counted: L.
        corner_tokens: m.
        separate: False gives the plain padding mask (the "mask off" ablation).

    Returns:
        bool, True where the query (row) sees the key (column): [B, 1, L, L], or [B, 1, 1, L] where all queries see the
        same. In the form that scaled-dot-product attention takes.
    """
    position = torch.arange(length, device=lengths.device)
    real = (position < lengths[:, None])[:, None, None, :]  # [B, 1, 1, L]
    if not (separate and corner_tokens):
        return real
    query, key = position[:, None], position[None, :]
    corner_query, corner_key = _is_corner(query, corner_tokens), _is_corner(key, corner_tokens)
    seen = torch.where(corner_key, query == key, ~(corner_query & (key == 0)))  # [L, L]
    return seen & real


def _is_corner(position: Tensor, corner_tokens: int) -> Tensor:
    return (position >= 1) & (position <= corner_tokens)
