"""Principal components: Long-CLIP's of image features (arXiv 2403.15378), HiMo-CLIP's of texts (arXiv 2511.06653)."""

from __future__ import annotations

import torch
from torch import Tensor

from lotlip.objectives.processes import first_row, gather


def principal_components(features: Tensor, number: float) -> Tensor:
    """Reconstructs features from the batch's first principal components (Long-CLIP, arXiv 2403.15378, section 3.2).

    This keeps what varies most between features and drops details. As in the releases of Long-CLIP and HiMo-CLIP (arXiv
    2511.06653), the result is not normalised again. The directions are treated as constants: the gradient flows through
    the projection and the mean, not through the eigenvectors, whose gradient is unbounded where eigenvalues are close.

    Args:
        features: [B, D].
        number: of components, at least 1; D or more return the features unchanged. A number below 1 is a share of the
            variance: the fewest components that reach it are used.

    Returns:
        [B, D], of that rank about their mean.

    Raises:
        ValueError: `number` is not above 0, or is neither whole nor below 1.
    """
    if number <= 0 or (number > 1 and number % 1):
        raise ValueError(
            f"the number of principal components is {number}; it must be a whole number from 1, or a share of the "
            "variance between 0 and 1"
        )
    if number >= features.shape[1]:
        return features
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = exact.mean(dim=0)
    centred = exact - mean
    # eigh rejects NaN; replaced here, the NaN of the features still reaches the loss, where training reports the step
    covariance = (centred.T @ centred).detach().nan_to_num()
    values, vectors = torch.linalg.eigh(covariance)  # eigenvalues ascend
    if number >= 1:
        directions = vectors[:, -int(number) :]  # [D, number]
        return (mean + centred @ directions @ directions.T).to(features.dtype)
    # A component is used if those before it have not reached the share. Multiplying by 0 or 1 instead of selecting
    # needs no synchronisation with the device.
    largest_first = values.flip(0).clamp(min=0)
    before = largest_first.cumsum(0) - largest_first
    used = (before < number * largest_first.sum()).flip(0).to(vectors)
    return (mean + centred @ (vectors * used) @ vectors.T).to(features.dtype)


def components_by_kind(texts: Tensor, number: float) -> Tensor:
    """Reduces each kind of text feature, [B, N, D], to the principal components of its global batch."""
    everything = gather(texts)
    reduced = torch.stack([principal_components(kind, number) for kind in everything.unbind(1)], dim=1)
    first = first_row(len(texts))
    return reduced[first : first + len(texts)]
