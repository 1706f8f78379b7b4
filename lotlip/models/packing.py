"""Texts of all lengths in one row: a step reads each weight once, and little of its work is done on padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lotlip.models.corner_mask import corner_attention_mask

# Texts attend in groups whose longest is at most this share longer than the shortest, which is what padding is left.
SLACK = 1 / 8


class Texts(NamedTuple):
    """A batch of texts.

    Attributes:
        ids: [B, L], padded at the end.
        lengths: tokens of each text, [B].
        cls_only: of its features only [CLS]'s is wanted.
    """

    ids: Tensor
    lengths: Tensor
    cls_only: bool = False


@dataclass(frozen=True)
class Row:
    """Texts one after another, those of like length in groups.

    Attributes:
        ids: [N].
        positions: of each token in its text, from 0, [N].
        masks: of each group of n texts that are padded to l tokens: who sees whom, [n, 1, l, l]; Σ n·l = N.
        wanted: of each batch, where in the row the tokens stand whose features are wanted, [B, 1] or [B, 1 + m].
    """

    ids: Tensor
    positions: Tensor
    masks: list[Tensor]
    wanted: list[Tensor]


def pack(batches: Sequence[Texts], corner_tokens: int, separate: bool) -> Row:
    """Batches of texts as one row.

    Where only [CLS] is wanted and the mask is on, the text goes without corner tokens, which neither [CLS] nor words
    see; the others keep their positions.

    Args:
        batches: texts.
        corner_tokens: m.
        separate: whether [CLS] and corner tokens are kept from seeing one another.
    """
    ids, positions, masks, wanted = [], [], [], []
    end = 0
    for texts in batches:
        device = texts.ids.device
        unseen = corner_tokens if texts.cls_only and separate else 0
        columns = torch.arange(texts.ids.shape[1], device=device)
        columns = torch.cat([columns[:1], columns[1 + unseen :]])
        order = texts.lengths.argsort(stable=True)
        lengths = texts.lengths[order] - unseen
        groups = _like_lengths(lengths.tolist())  # the only wait for the device
        sizes = [len(group) for group in groups]
        starts = []
        for rows, real, group in zip(texts.ids[order].split(sizes), lengths.split(sizes), groups, strict=True):
            number, longest = len(group), group[-1]
            kept = columns[:longest]
            ids.append(rows[:, kept].flatten())
            positions.append(kept.repeat(number))
            mask = corner_attention_mask(real, longest, corner_tokens - unseen, separate)
            masks.append(mask.expand(-1, -1, longest, -1))
            starts.append(end + longest * torch.arange(number, device=device))
            end += longest * number
        features = torch.arange(1 if texts.cls_only else 1 + corner_tokens, device=device)
        wanted.append(torch.cat(starts)[order.argsort()][:, None] + features)
    return Row(torch.cat(ids), torch.cat(positions), masks, wanted)


def _like_lengths(lengths: list[int]) -> list[list[int]]:
    """Ascending lengths cut into groups."""
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or length > groups[-1][0] * (1 + SLACK):
            groups.append([])
        groups[-1].append(length)
    return groups


def bert_layer(layer: Any, hidden: Tensor, masks: Sequence[Tensor], wanted: Tensor | None = None) -> Tensor:
    """A layer of BERT over a row of texts.

    Args:
        layer: transformers' module.
        hidden: [N, H].
        masks: of the row's groups.
        wanted: tokens whose outcome is wanted, [W]; None stands for all.

    Returns:
        [N, H], or [W, H].
    """
    attended = _attention(layer.attention.self, hidden, masks)
    if wanted is not None:
        attended, hidden = attended[wanted], hidden[wanted]
    return layer.feed_forward_chunk(layer.attention.output(attended, hidden))


def _attention(own: Any, hidden: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Each text's attention to itself, [N, H], by the queries, keys and values of one of BERT's self-attentions."""
    heads, dropout = own.num_attention_heads, own.dropout.p if own.training else 0.0
    sizes = [mask.shape[0] * mask.shape[-1] for mask in masks]
    groups = zip(*(project(hidden).split(sizes) for project in (own.query, own.key, own.value)), strict=True)
    found = []
    for mask, group in zip(masks, groups, strict=True):
        number, length = mask.shape[0], mask.shape[-1]
        query, key, value = (tokens.view(number, length, heads, -1).transpose(1, 2) for tokens in group)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        found.append(attended.transpose(1, 2).reshape(number * length, -1))
    return torch.cat(found)
