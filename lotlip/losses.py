"""The training loss: an image against each of its texts, with the variants that the paper compares.

A variant is a similarity (`lotlip.models.similarity`), a contrast (`CONTRASTS`) and what the raw caption is held
against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pad

from lotlip.models.similarity import cosine, late_interaction


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


def _several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def gather(features: Tensor) -> Tensor:
    """Every process's features in a row, [W·B, …]; gradients flow back to the process that each came from."""
    return _Gather.apply(features.contiguous()) if _several_processes() else features


def softmax(image_to_text: Tensor, text_to_image: Tensor) -> Tensor:
    """Symmetric InfoNCE (paper, section 3.2): each image picks its text among all, each text its image.

    Args:
        image_to_text: logits by which an image picks its text, [N, I, T]; what belongs together is on the diagonal.
        text_to_image: logits by which a text picks its image, [N, I, T].

    Returns:
        The loss of each of the N kinds of text, [N].
    """
    number, batch = image_to_text.shape[:2]
    target = torch.arange(batch, device=image_to_text.device).expand(number, batch)
    texts_picked = cross_entropy(image_to_text.transpose(1, 2), target, reduction="none").mean(dim=1)
    images_picked = cross_entropy(text_to_image, target, reduction="none").mean(dim=1)
    return (texts_picked + images_picked) / 2


def sigmoid(image_to_text: Tensor, text_to_image: Tensor) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, eq. 1): each pair is judged by itself, and the sum is over the batch size.

    Args:
        image_to_text: logits, [N, I, T]; what belongs together is on the diagonal.
        text_to_image: logits of the other direction, [N, I, T]; where they differ, the mean of both losses counts.

    Returns:
        The loss of each of the N kinds of text, [N].
    """
    batch = image_to_text.shape[1]
    sign = 2 * torch.eye(batch, dtype=image_to_text.dtype, device=image_to_text.device) - 1  # z: 1 own, −1 others
    directions = [image_to_text] if image_to_text is text_to_image else [image_to_text, text_to_image]
    return torch.stack([-logsigmoid(sign * logits).sum(dim=(1, 2)) / batch for logits in directions]).mean(dim=0)


CONTRASTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}


def principal_components(features: Tensor, number: int) -> Tensor:
    """Features rebuilt from the batch's first principal components (Long-CLIP, arXiv 2403.15378, section 3.2).

    What makes a feature differ most from others is kept, its detail is not. As in Long-CLIP's release the result is not
    normalised again. The directions count as constants: the gradient flows through the projection and the mean, not
    through the eigenvectors, whose gradient has no bound where eigenvalues are close.

    Args:
        features: [B, D].
        number: of components, at least 1; D or more give the features back.

    Returns:
        [B, D], of rank `number` about their mean.

    Raises:
        ValueError: there is no component to keep.
    """
    if number < 1:
        raise ValueError(f"number of principal components is {number}; it needs to be 1 at least")
    if number >= features.shape[1]:
        return features
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = exact.mean(dim=0)
    centred = exact - mean
    # eigh refuses NaN; as it is, the NaN reaches the loss, where training names the step and the samples
    covariance = (centred.T @ centred).detach().nan_to_num()
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -number:]  # [D, number], eigenvalues ascend
    return (mean + centred @ directions @ directions.T).to(features.dtype)


def lotlip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    text_mask: Tensor | None = None,
    contrast: str = "softmax",
    raw_weight: float = 1.0,
    long_weight: float = 1.0,
    raw_components: int = 0,
) -> dict[str, Tensor]:
    """Mean over an image's N text features of their contrast with the image features (paper, section 3.2).

    Negatives come from the whole batch of all processes. Every process returns the loss of that whole batch, whose
    gradients its engine averages over the processes: together they are the gradients of one process with the batch.

    Args:
        image_features: normalised, [B, D]; with `text_mask` the patches', [B, P, D].
        text_features: normalised, [B, N, D]; the raw caption's [CLS] first, then those of the long texts. With
            `text_mask` the tokens' of the raw caption, then of the long texts, [B, N, L, D]; L may differ between
            processes.
        logit_scale: the temperature's inverse, [1].
        logit_bias: added to every logit, [1]; sigmoid needs it, softmax does not change by it.
        text_mask: bool, True at a text's tokens, [B, N, L]. With it image and text are compared by late interaction
            (FILIP, arXiv 2111.07783), without it by the cosine of one feature each.
        contrast: "softmax" (paper, section 3.2) or "sigmoid" (SigLIP, arXiv 2303.15343).
        raw_weight: of the raw caption's term (the released code's `clip_lossweight`).
        long_weight: of the others' (its `declip_lossweight`).
        raw_components: the raw caption is contrasted with so many principal components of the image features
            (Long-CLIP, arXiv 2403.15378, section 3.2; 32 in its release); 0 means with all of them. They are those of
            the whole batch, while Long-CLIP's release takes each process's own: so N processes compute what one does.

    Returns:
        `raw` and `long`, the weighted terms, and `loss`, their sum.

    Raises:
        ValueError: the contrast is unknown or lacks its bias, shapes do not fit, or principal components are asked of
            patches.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast {contrast!r} is unknown; the known ones are {', '.join(CONTRASTS)}")
    if contrast == "sigmoid" and logit_bias is None:
        raise ValueError("contrast sigmoid needs logit_bias; a model has it where its config says logit_bias: true")
    _check_shapes(image_features, text_features, text_mask)
    if text_mask is None:
        directions = _cosines(gather(image_features), gather(text_features), raw_components)
    elif raw_components:
        raise ValueError(
            "raw_components are of one feature for each image, which late interaction has not; set it to 0"
        )
    else:
        directions = _late_interactions(image_features, text_features, text_mask)

    def logits(similarity: Tensor) -> Tensor:
        scaled = logit_scale * similarity
        return scaled if logit_bias is None else scaled + logit_bias

    image_to_text = logits(directions[0])
    text_to_image = image_to_text if directions[1] is directions[0] else logits(directions[1])
    terms = CONTRASTS[contrast](image_to_text, text_to_image) / text_features.shape[1]  # [N]
    raw, long = raw_weight * terms[0], long_weight * terms[1:].sum()
    return {"raw": raw, "long": long, "loss": raw + long}


def _check_shapes(image_features: Tensor, text_features: Tensor, text_mask: Tensor | None) -> None:
    images, texts = image_features.shape, text_features.shape
    if text_mask is None:
        fits, needed = len(images) == 2 and len(texts) == 3, "[B, D] and [B, N, D]"
    else:
        fits, needed = len(images) == 3 and len(texts) == 4, "[B, P, D] and [B, N, L, D] with text_mask [B, N, L]"
        fits = fits and text_mask.shape == texts[:3]
    if not fits or (images[0], images[-1]) != (texts[0], texts[-1]):
        mask = "none" if text_mask is None else f"{list(text_mask.shape)}"
        raise ValueError(
            f"image_features {list(images)} and text_features {list(texts)} with text_mask {mask} do not fit; "
            f"needed are {needed}"
        )


def _cosines(images: Tensor, texts: Tensor, raw_components: int) -> tuple[Tensor, Tensor]:
    """Both directions, [N, I, T], of features [I, D] and [T, N, D]: the same tensor twice."""
    similarity = _by_kind(cosine(images, texts.transpose(0, 1).flatten(0, 1))[0], texts.shape[1])
    if raw_components:
        raw = cosine(principal_components(images, raw_components), texts[:, 0])[0]
        similarity = torch.cat([raw[None], similarity[1:]])
    return similarity, similarity


def _late_interactions(images: Tensor, texts: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both directions, [N, I, T], of this process's features [B, P, D] and [B, N, L, D] and all others'.

    Each process compares its own images with all texts, and only the result is gathered: the work is shared.
    """
    if _several_processes():  # a gather takes equal shapes
        longest = torch.tensor(texts.shape[2], device=texts.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        missing = int(longest) - texts.shape[2]
        texts, text_mask = gather(pad(texts, (0, 0, 0, missing))), gather(pad(text_mask, (0, missing)))
    number = texts.shape[1]
    flat, mask = texts.transpose(0, 1).flatten(0, 1), text_mask.transpose(0, 1).flatten(0, 1)  # [N·T, L, D], [N·T, L]
    image_to_text, text_to_image = late_interaction(images, flat, mask)  # [B, N·T]
    return _by_kind(gather(image_to_text), number), _by_kind(gather(text_to_image), number)


def _by_kind(similarity: Tensor, number: int) -> Tensor:
    """[I, N·T] as [N, I, T]."""
    return similarity.unflatten(1, (number, -1)).transpose(0, 1)
