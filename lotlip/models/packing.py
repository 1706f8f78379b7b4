"""Packs texts of different lengths into one sequence, so that weights are read once per step and padding is rare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lotlip.models.corner_mask import corner_attention_mask

# Attention runs on groups of texts, padded to the longest of the group. The longest exceeds the shortest by at most
# this fraction, which bounds the padding.
SLACK = 1 / 8


class TextBatch(NamedTuple):
    """A batch of texts.

    Attributes:
        ids: [B, L], padded at the end.
        lengths: number of tokens of each text, [B].
        cls_only: whether only the features of [CLS] are needed.
    """

    ids: Tensor
    lengths: Tensor
    cls_only: bool = False


@dataclass(frozen=True)
class PackedTexts:
    """Texts concatenated into one sequence of N tokens, in groups of similar length.

    Attributes:
        ids: [N].
        positions: position of each token in its text, from 0, [N].
        masks: attention mask of each group of n texts padded to l tokens, [n, 1, l, l]; Σ n·l = N.
        outputs: for each batch, the indices in the sequence of the tokens whose features are needed, [B, 1] or
            [B, 1 + m].
    """

    ids: Tensor
    positions: Tensor
    masks: list[Tensor]
    outputs: list[Tensor]


def pack(batches: Sequence[TextBatch], corner_tokens: int, separate: bool) -> PackedTexts:
    """Packs batches of texts into one sequence.

    If a batch needs [CLS] only and the mask is on, its corner tokens are left out, because neither [CLS] nor words
    attend to them. The other tokens keep their positions.

    Args:
        batches: texts.
        corner_tokens: m.
        separate: whether [CLS] and corner tokens are masked from one another.
    """
    ids, positions, masks, outputs = [], [], [], []
    end = 0
    for texts in batches:
        device = texts.ids.device
        dropped = corner_tokens if texts.cls_only and separate else 0
        columns = torch.arange(texts.ids.shape[1], device=device)
        columns = torch.cat([columns[:1], columns[1 + dropped :]])
        order = texts.lengths.argsort(stable=True)
        lengths = texts.lengths[order] - dropped
        groups = _group_lengths(lengths.tolist())  # the only synchronisation with the device
        sizes = [len(group) for group in groups]
        starts = []
        for rows, real, group in zip(texts.ids[order].split(sizes), lengths.split(sizes), groups, strict=True):
            number, longest = len(group), group[-1]
            kept = columns[:longest]
            ids.append(rows[:, kept].flatten())
            positions.append(kept.repeat(number))
            mask = corner_attention_mask(real, longest, corner_tokens - dropped, separate)
            masks.append(mask.expand(-1, -1, longest, -1))
            starts.append(end + longest * torch.arange(number, device=device))
            end += longest * number
        features = torch.arange(1 if texts.cls_only else 1 + corner_tokens, device=device)
        outputs.append(torch.cat(starts)[order.argsort()][:, None] + features)
    return PackedTexts(torch.cat(ids), torch.cat(positions), masks, outputs)


def _group_lengths(lengths: list[int]) -> list[list[int]]:
    """Splits ascending lengths into groups of similar length."""
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or length > groups[-1][0] * (1 + SLACK):
            groups.append([])
        groups[-1].append(length)
    return groups


def bert_layer(layer: Any, hidden: Tensor, masks: Sequence[Tensor], outputs: Tensor | None = None) -> Tensor:
    """Runs a BERT layer on packed texts.

    Args:
        layer: the module of transformers.
        hidden: [N, H].
        masks: attention mask of each group.
        outputs: indices of the tokens to compute, [W]; None: all.

    Returns:
        [N, H], or [W, H] with `outputs`.
    """
    attended = _attention(layer.attention.self, hidden, masks)
    if outputs is not None:
        attended, hidden = attended[outputs], hidden[outputs]
    return layer.feed_forward_chunk(layer.attention.output(attended, hidden))


def _attention(module: Any, hidden: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Applies a BERT self-attention module within each text; returns [N, H]."""
    heads, dropout = module.num_attention_heads, module.dropout.p if module.training else 0.0
    sizes = [mask.shape[0] * mask.shape[-1] for mask in masks]
    groups = zip(*(project(hidden).split(sizes) for project in (module.query, module.key, module.value)), strict=True)
    outputs = []
    for mask, group in zip(masks, groups, strict=True):
        number, length = mask.shape[0], mask.shape[-1]
        query, key, value = (tokens.view(number, length, heads, -1).transpose(1, 2) for tokens in group)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        outputs.append(attended.transpose(1, 2).reshape(number * length, -1))
    return torch.cat(outputs)
