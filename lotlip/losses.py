"""The training loss: symmetric InfoNCE between an image and each of its text features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy


class _Gather(torch.autograd.Function):
    """All-gather with gradients. That of torch.distributed.nn (2.15) mixes up the gradient's entries on gloo where they
    do not lie in row order in memory, which is how a matrix product leaves them."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        pieces = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, features)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(features: Tensor) -> Tensor:
    """Every process's features in a row, [W·B, …]; gradients flow back to the process that each came from."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return features
    return _Gather.apply(features.contiguous())


def lotlip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    raw_weight: float = 1.0,
    long_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Mean over the N text features of the symmetric InfoNCE against the image features (paper, section 3.2).

    Negatives come from the whole batch of all processes. Every process returns the loss of that whole batch, whose
    gradients its engine averages over the processes: together they are the gradients of one process with the batch.

    Args:
        image_features: normalised, [B, D].
        text_features: normalised, [B, N, D]; the raw caption's [CLS] first, then those of the long texts.
        logit_scale: the temperature's inverse, [1].
        raw_weight: of the raw caption's term (the released code's `clip_lossweight`).
        long_weight: of the others' (its `declip_lossweight`).

    Returns:
        `raw` and `long`, the weighted terms, and `loss`, their sum.
    """
    images = gather(image_features)  # [W·B, D]
    texts = gather(text_features)  # [W·B, N, D]
    logits = logit_scale * torch.einsum("id,tnd->nit", images, texts)  # [N, image, text]
    number, batch = logits.shape[:2]
    target = torch.arange(batch, device=logits.device).expand(number, batch)
    image_to_text = cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(dim=1)
    text_to_image = cross_entropy(logits, target, reduction="none").mean(dim=1)
    terms = (image_to_text + text_to_image) / 2 / number  # [N]
    raw, long = raw_weight * terms[0], long_weight * terms[1:].sum()
    return {"raw": raw, "long": long, "loss": raw + long}
