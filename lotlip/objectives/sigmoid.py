"""SigLIP's pairwise sigmoid loss (arXiv 2303.15343), in blocks of texts; see `lotlip.objectives.softmax`.

Pairs do not depend on one another. So the mean over the N texts of an image is the multi-positive sigmoid loss of
FLAIR (arXiv 2412.03561), in which all N are positive and the sum over pairs is divided by B · N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lotlip.objectives.softmax import positives


def block(picks_image: Tensor, picks_text: Tensor, own: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cost of classifying each pair independently, mean of both directions, [N]; the second part is not needed."""
    directions = [picks_image] if picks_image is picks_text else [picks_image, picks_text]
    # −log σ(−x) = softplus(x) for a negative pair, −log σ(x) = softplus(x) − x for a positive one
    costs = [softplus(logits).sum((1, 2)) - positives(logits, own).sum(1) for logits in directions]
    return torch.stack(costs).mean(0), picks_image.new_zeros(len(picks_image), picks_image.shape[2])


def combine(costs: Tensor, normalisers: Tensor) -> Tensor:
    """The loss of each kind (eq. 1), whose sum is divided by the batch size, [N]."""
    return costs.sum(0) / normalisers.shape[2]
