"""The attention mask of a text with corner tokens (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def corner_attention_mask(lengths: Tensor, length: int, corner_tokens: int, separate: bool = True) -> Tensor:
    """Builds the attention mask from the texts' lengths (paper, section 3.2 and Fig. 3).

    The tokens are `[CLS] [Cor 1] … [Cor m] words [PAD]…`. [CLS] and each corner token attend to the words and to
    themselves, but not to one another, so each summarises the text independently. Words never attend to a corner token.
    No token attends to padding.

    Args:
        lengths: number of tokens of each text, without padding, [B].
        length: L, the number of tokens with padding.
        corner_tokens: m.
        separate: False returns the plain padding mask (the "mask off" ablation).

    Returns:
        bool, True where the query (row) attends to the key (column), as scaled-dot-product attention expects:
        [B, 1, L, L], or [B, 1, 1, L] if the mask is the same for all queries.
    """
    position = torch.arange(length, device=lengths.device)
    real = (position < lengths[:, None])[:, None, None, :]  # [B, 1, 1, L]
    if not (separate and corner_tokens):
        return real
    query, key = position[:, None], position[None, :]
    corner_query, corner_key = _is_corner(query, corner_tokens), _is_corner(key, corner_tokens)
    visible = torch.where(corner_key, query == key, ~(corner_query & (key == 0)))  # [L, L]
    return visible & real


def _is_corner(position: Tensor, corner_tokens: int) -> Tensor:
    return (position >= 1) & (position <= corner_tokens)
