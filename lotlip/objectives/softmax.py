"""Symmetric InfoNCE (paper, section 3.2), in blocks of texts.

An objective has a function for a block of logits, [N, B, T]: those of B texts of each of N kinds with all T images; and
one that combines the blocks of all processes. `lotlip.objectives.contrastive` calls them.
"""

from __future__ import annotations

from torch import Tensor


def positives(logits: Tensor, own: Tensor) -> Tensor:
    """The logits of the positive pairs, [N, B], from [N, B, T] and the index of each text's own image, [B]."""
    return logits.gather(2, own.expand(len(logits), -1)[..., None])[..., 0]


def block(picks_image: Tensor, picks_text: Tensor, own: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cost without the images' normalisers [N], and these texts' part of the log-normalisers [N, T].

    With label smoothing, a target is the positive with probability 1 − smoothing, and else any candidate.

    Args:
        picks_image: logits by which a text picks its image, along T, [N, B, T].
        picks_text: logits by which an image picks its text, along the B of all blocks, [N, B, T].
        own: index of each text's own image, [B].
        smoothing: label smoothing.
    """
    costs = picks_image.logsumexp(2)
    for logits in (picks_image, picks_text):
        target = positives(logits, own)
        if smoothing:
            target = (1 - smoothing) * target + smoothing * logits.sum(2) / picks_image.shape[2]
        costs = costs - target
    return costs.sum(1), picks_text.logsumexp(1)


def combine(costs: Tensor, normalisers: Tensor) -> Tensor:
    """The loss of each kind, [N], from the parts [P, N] and [P, N, T] of P blocks."""
    return (costs.sum(0) + normalisers.logsumexp(0).sum(1)) / (2 * normalisers.shape[2])
