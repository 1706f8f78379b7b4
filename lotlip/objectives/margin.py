"""Margin of hard negatives (arXiv 2608.18521)."""

from __future__ import annotations

import torch
from torch import Tensor


def with_margin(logits: Tensor, texts: Tensor, own_texts: Tensor, own: Tensor, factor: Tensor) -> Tensor:
    """Raises the logit of an image and another image's text by how similar that text and the image's own text are.

    Args:
        logits: of B texts of each of N kinds with all T images, [N, B, T].
        texts: normalised, [B, N, D].
        own_texts: each image's own texts, normalised, without gradient, [T, N, D].
        own: index of each text's own image, [B].
        factor: γ times the inverse temperature, [1].
    """
    similar = torch.einsum("bnd,tnd->nbt", texts.detach(), own_texts)
    similar = similar.scatter(2, own.expand(len(similar), -1)[..., None], 0.0)  # not for the positive pairs
    return logits + factor * similar
