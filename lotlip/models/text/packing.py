"""Packs texts of different lengths into one sequence, so that weights are read once per step and padding is rare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Attention runs on groups of texts, padded to the longest of the group. The longest exceeds the shortest by at most
# this fraction, which bounds the padding.
SLACK = 1 / 8


class TextBatch(NamedTuple):
    """A batch of texts.

    Attributes:
        ids: [B, L], padded at the end.
        lengths: number of tokens of each text, [B].
        cls_only: whether only the features of the summary token, such as [CLS], are needed.
        offsets: number of positions by which each text's words are moved, [B]; None: they are not.
    """

    ids: Tensor
    lengths: Tensor
    cls_only: bool = False
    offsets: Tensor | None = None


class Arranged(NamedTuple):
    """A group of n texts, padded to T tokens, in the order in which a tower reads them.

    Attributes:
        ids: [n, T].
        positions: position of each token in its text, from 0, [n, T].
        mask: attention mask, [n, 1, T, T].
        outputs: for each text, the columns of the tokens whose features are needed, [n, K].
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    outputs: Tensor


# Arranges texts [n, L] with lengths [n]; the last argument is `cls_only`.
Arrange = Callable[[Tensor, Tensor, bool], Arranged]


class Needed(NamedTuple):
    """The W tokens whose features are needed, in the order of the groups.

    Attributes:
        indices: indices in the sequence, [W].
        columns: for each group, the columns in its texts, [n, K]; Σ n·K = W.
    """

    indices: Tensor
    columns: list[Tensor]


@dataclass(frozen=True)
class PackedTexts:
    """Texts concatenated into one sequence of N tokens, in groups of similar length.

    Attributes:
        ids: [N].
        positions: position of each token in its text, from 0, [N].
        masks: attention mask of each group of n texts padded to T tokens, [n, 1, T, T]; Σ n·T = N.
        needed: the tokens that the last layer computes.
        outputs: for each batch, the indices of its texts' tokens in `needed`, [B, K].
    """

    ids: Tensor
    positions: Tensor
    masks: list[Tensor]
    needed: Needed
    outputs: list[Tensor]


def pack(batches: Sequence[TextBatch], arrange: Arrange, fixed: int = 1) -> PackedTexts:
    """Packs batches of texts into one sequence.

    Args:
        batches: texts.
        arrange: adds a tower's own tokens, positions and mask to a group of texts of similar length.
        fixed: number of first positions that the offsets of texts do not move.
    """
    ids, positions, masks, indices, columns, outputs = [], [], [], [], [], []
    end = 0
    count = 0  # of needed tokens
    for texts in batches:
        order = texts.lengths.argsort(stable=True)
        lengths = texts.lengths[order]
        groups = _group_lengths(lengths.tolist())  # the only synchronisation with the device
        sizes = [len(group) for group in groups]
        offsets = (torch.zeros_like(lengths) if texts.offsets is None else texts.offsets[order]).split(sizes)
        parts = zip(texts.ids[order].split(sizes), lengths.split(sizes), offsets, groups, strict=True)
        for rows, real, offset, group in parts:
            arranged = arrange(rows[:, : group[-1]], real, texts.cls_only)
            number, length = arranged.ids.shape
            ids.append(arranged.ids.flatten())
            places = arranged.positions
            if texts.offsets is not None:
                last = places.gather(1, real[:, None] - 1)  # padding stays there, within the table of positions
                places = torch.where(places >= fixed, torch.minimum(places, last) + offset[:, None], places)
            positions.append(places.flatten())
            masks.append(arranged.mask)
            starts = end + length * torch.arange(number, device=real.device)
            indices.append((starts[:, None] + arranged.outputs).flatten())
            columns.append(arranged.outputs)
            end += length * number
        per_text = columns[-1].shape[1]
        outputs.append(count + per_text * order.argsort()[:, None] + torch.arange(per_text, device=order.device))
        count += per_text * len(order)
    return PackedTexts(torch.cat(ids), torch.cat(positions), masks, Needed(torch.cat(indices), columns), outputs)


def groups_by_length(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Groups texts of similar length, so that little of a padded group is padding.

    Args:
        lengths: number of tokens of each text, [B].

    Returns:
        for each group the indices of its texts, [n], and the length of the longest.
    """
    order = lengths.argsort(stable=True)
    groups = _group_lengths(lengths[order].tolist())
    parts = order.split([len(group) for group in groups])
    return [(part, group[-1]) for part, group in zip(parts, groups, strict=True)]


def unpack(hidden: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Sorts hidden states of all needed tokens [W, H] into one [B, K, H] per batch, by `PackedTexts.outputs`."""
    return [hidden[indices] for indices in outputs]


def _group_lengths(lengths: list[int]) -> list[list[int]]:
    """Splits ascending lengths into groups of similar length."""
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or length > groups[-1][0] * (1 + SLACK):
            groups.append([])
        groups[-1].append(length)
    return groups


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[Tensor],
    heads: int,
    dropout: float = 0.0,
    needed: Needed | None = None,
) -> Tensor:
    """Computes scaled dot-product attention within each packed text.

    Args:
        query: [N, H], or [W, H] with `needed`.
        key, value: [N, H].
        masks: attention mask of each group, `PackedTexts.masks`.
        heads: number of attention heads.
        dropout: probability with which attention is dropped.
        needed: the tokens of the queries; None: all.

    Returns:
        [N, H], or [W, H] with `needed`.
    """
    if needed is not None:
        masks = [
            mask.gather(2, columns[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
            for mask, columns in zip(masks, needed.columns, strict=True)
        ]
    query_sizes, key_sizes = ([mask.shape[0] * mask.shape[side] for mask in masks] for side in (2, 3))
    groups = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), strict=True)
    outputs = []
    for mask, group in zip(masks, groups, strict=True):
        q, k, v = (tokens.view(mask.shape[0], -1, heads, tokens.shape[1] // heads).transpose(1, 2) for tokens in group)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)
