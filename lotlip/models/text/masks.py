"""Attention masks of texts with corner tokens (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def corner_attention_mask(lengths: Tensor, length: int, corner_tokens: int, separate: bool = True) -> Tensor:
    """Builds the attention mask of a BERT-like tower from the texts' lengths (paper, section 3.2 and Fig. 3).

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
    visible = (query == key) | ~corner_key & ~(corner_query & (key == 0))  # [L, L]
    return visible & real


def _is_corner(position: Tensor, corner_tokens: int) -> Tensor:
    return (position >= 1) & (position <= corner_tokens)


def appended_attention_mask(
    lengths: Tensor, length: int, corner_tokens: int, register_tokens: int, separate: bool, causal: bool
) -> Tensor:
    """Builds the attention mask of a tower whose summary token is the last one of the text.

    The tokens are `words [END] [PAD]… [Cor 1] … [Cor m] [Reg 1] … [Reg r]`. The rule is that of
    `corner_attention_mask`: [END], the summary token, and each corner token attend to the words, but not to one
    another. Registers are masked like words. In a causal tower, words attend to earlier words only, so a register is
    read by [END] and the corner tokens only, and [END] reads no corner token even if `separate` is false.

    Args:
        lengths: number of tokens of each text with [END], without padding, [B].
        length: L, the number of these tokens with padding.
        corner_tokens: m.
        register_tokens: r.
        separate: False lets the summary token and the corner tokens attend to one another, as far as a causal tower
            allows it.
        causal: whether tokens attend to earlier ones only.

    Returns:
        bool, True where the query (row) attends to the key (column), [B, 1, L + m + r, L + m + r].
    """
    total, first_register = length + corner_tokens + register_tokens, length + corner_tokens
    index = torch.arange(total, device=lengths.device)
    end = lengths[:, None] - 1
    # the tokens' roles, [B, T]
    is_end = index == end
    is_word = index < end
    is_corner = ((index >= length) & (index < first_register)).expand_as(is_end)
    is_register = (index >= first_register).expand_as(is_end)
    # the order in which a causal tower reads: words, registers, the end token, corner tokens
    order = torch.where(
        is_end, total, torch.where(is_register, index, torch.where(is_corner, total + 1 + index, index))
    )
    is_reader = is_end | is_corner
    query, key = (..., slice(None), None), (..., None, slice(None))
    itself = index[query] == index[key]
    visible = (is_word | is_register | is_end)[key] & ~(is_reader[query] & is_end[key]) | itself
    visible = visible & (is_word | is_end | is_corner | is_register)[key]
    if not separate:
        visible = visible | is_corner[key] | (is_corner[query] & is_end[key])
    if causal:
        visible = visible & (order[key] <= order[query])
    return visible[:, None]
