"""The training loss: an image against each of its texts, with the variants that the paper compares.

A variant is a similarity (`lotlip.objectives.similarity`), an objective (`OBJECTIVES`) and what the short caption is
compared with. Of a global batch of T images with N texts each, a process has its own B texts and everybody's image
features: only those are gathered, one for each image, while texts, N times as many, stay where they are. Its N × B ×
T logits are computed in blocks, and once more in the backward pass, so that few of them exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from lotlip.objectives.similarity import cosine, late_interaction

# Logits of a block: 16 MB in fp32, and a few times that in the backward pass. Larger blocks are no faster.
LOGITS_AT_ONCE = 2**22


class _Gather(torch.autograd.Function):
    """All-gather with gradients. That of torch.distributed.nn (2.15) mixes up the gradient's entries on gloo where they
    do not lie in row order in memory, which is how a matrix product leaves them."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        gathered = features.new_empty(dist.get_world_size() * len(features), *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient)
        return own


def _several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def gather(features: Tensor) -> Tensor:
    """Every process's features in a row, [W·B, …]; gradients flow back to the process that each came from."""
    return _Gather.apply(features.contiguous()) if _several_processes() else features


# --- contrasts ----------------------------------------------------------------------------------------------------
# Each has a part that takes a block of logits, and one that puts together what all blocks of all processes gave. A
# block is [N, B, T], the logits of B texts of each of N kinds with all T images: `picks_image` those by which a text
# picks its image, along T, and `picks_text` those by which an image picks its text, along all blocks' B. `own`, [B],
# says which image is a text's own.


def _own(logits: Tensor, own: Tensor) -> Tensor:
    """The logits of what belongs together, [N, B]."""
    return logits.gather(2, own.expand(len(logits), -1)[..., None])[..., 0]


def _softmax_block(picks_image: Tensor, picks_text: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Cost but for the images' normalisers [N], and these texts' part of the normalisers' logarithms [N, T]."""
    costs = picks_image.logsumexp(2) - _own(picks_image, own) - _own(picks_text, own)
    return costs.sum(1), picks_text.logsumexp(1)


def _softmax(costs: Tensor, normalisers: Tensor) -> Tensor:
    """Symmetric InfoNCE (paper, section 3.2) of [P, N] and [P, N, T], from P blocks: [N]."""
    return (costs.sum(0) + normalisers.logsumexp(0).sum(1)) / (2 * normalisers.shape[2])


def _sigmoid_block(picks_image: Tensor, picks_text: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Cost of judging each pair by itself, mean of both directions, [N]; nothing depends on the other blocks."""
    directions = [picks_image] if picks_image is picks_text else [picks_image, picks_text]
    # −log σ(−x) = softplus(x) for a pair that does not belong together, −log σ(x) = softplus(x) − x for one that does
    costs = [softplus(logits).sum((1, 2)) - _own(logits, own).sum(1) for logits in directions]
    return torch.stack(costs).mean(0), picks_image.new_zeros(len(picks_image), picks_image.shape[2])


def _sigmoid(costs: Tensor, normalisers: Tensor) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, eq. 1), whose sum is over the batch size, of [P, N]: [N]."""
    return costs.sum(0) / normalisers.shape[2]


Objective = tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]
OBJECTIVES: dict[str, Objective] = {"infonce": (_softmax_block, _softmax), "siglip": (_sigmoid_block, _sigmoid)}


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


def feature_shares(features: int, short_loss_fraction: float | None) -> Tensor:
    """What each of the N text features counts in the loss, the short caption's first: [N], together 1."""
    if short_loss_fraction is None or features == 1:
        return torch.full((features,), 1 / features)
    return torch.cat(
        [torch.tensor([short_loss_fraction]), torch.full((features - 1,), (1 - short_loss_fraction) / (features - 1))]
    )


def lotlip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    text_mask: Tensor | None = None,
    objective: str = "infonce",
    short_loss_fraction: float | None = None,
    short_loss_weight: float = 1.0,
    long_loss_weight: float = 1.0,
    image_components: int = 0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> dict[str, Tensor]:
    """Mean over an image's N text features of their objective with the image features (paper, section 3.2).

    Negatives come from the whole batch of all processes. Every process returns the loss of that whole batch, whose
    gradients its engine averages over the processes: together they are the gradients of one process with the batch.

    Args:
        image_features: normalised, [B, D]; with `text_mask` the patches', [B, P, D].
        text_features: normalised, [B, N, D]; the short caption's [CLS] first, then those of the long texts. With
            `text_mask` the tokens' of the short caption, then of the long texts, [B, N, L, D]; L may differ between
            processes.
        logit_scale: the temperature's inverse, [1].
        logit_bias: added to every logit, [1]; sigmoid needs it, softmax does not change by it.
        text_mask: bool, True at a text's tokens, [B, N, L]. With it image and text are compared by late interaction
            (FILIP, arXiv 2111.07783), without it by the cosine of one feature each.
        objective: "infonce" (symmetric; paper, section 3.2) or "siglip" (sigmoid, arXiv 2303.15343).
        short_loss_fraction: share of the loss of the short caption's feature, where there are others, which share the
            rest; None: each of the N has 1/N, as in the paper.
        short_loss_weight: of the short caption's term (the released code's `clip_lossweight`).
        long_loss_weight: of the others' (its `declip_lossweight`).
        image_components: the short caption is contrasted with so many principal components of the image features
            (Long-CLIP, arXiv 2403.15378, section 3.2; 32 in its release); 0 means with all of them. They are those of
            the whole batch, while Long-CLIP's release takes each process's own: so N processes compute what one does.
        logits_at_once: in a block (one text of each kind with all images at least); changes memory, not the result.

    Returns:
        `raw` and `long`, the weighted terms; `loss`, their sum; and, without gradient, `recall`: the share of the
        batch's texts that are nearer to their own image than to any other, mean over the N kinds.

    Raises:
        ValueError: the objective is unknown or lacks its bias, shapes do not fit, or principal components are asked of
            patches.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; the known ones are {', '.join(OBJECTIVES)}")
    if objective == "siglip" and logit_bias is None:
        raise ValueError("objective siglip needs logit_bias; a model has it where its config says logit_bias: true")
    _check_shapes(image_features, text_features, text_mask)
    if text_mask is not None and image_components:
        raise ValueError(
            "image_components are of one feature for each image, which late interaction has not; set it to 0"
        )
    images = gather(image_features)  # [T, D] or [T, P, D]
    compare = partial(
        _terms, scale=logit_scale, bias=logit_bias, objective=OBJECTIVES[objective], logits_at_once=logits_at_once
    )
    if image_components:
        raw_terms, raw_hits = compare(principal_components(images, image_components), text_features[:, :1])
        long_terms, long_hits = compare(images, text_features[:, 1:])
        terms, hits = torch.cat([raw_terms, long_terms]), torch.cat([raw_hits, long_hits])
    else:
        terms, hits = compare(images, text_features, text_mask)
    terms = terms * feature_shares(len(terms), short_loss_fraction).to(terms)  # [N]
    raw, long = short_loss_weight * terms[0], long_loss_weight * terms[1:].sum()
    return {"raw": raw, "long": long, "loss": raw + long, "recall": hits.mean() / len(images)}


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


def _terms(
    images: Tensor,
    texts: Tensor,
    text_mask: Tensor | None = None,
    *,
    scale: Tensor,
    bias: Tensor | None,
    objective: Objective,
    logits_at_once: int,
) -> tuple[Tensor, Tensor]:
    """The objective over all T images and all processes' texts, of which [B, N, …] are here.

    Returns:
        The loss for each kind of text and the number of texts that pick their own image, [N] each.
    """
    rows, kinds = texts.shape[:2]
    if not kinds:
        return texts.new_zeros(0), texts.new_zeros(0)
    first = dist.get_rank() * rows if _several_processes() else 0
    own = torch.arange(first, first + rows, device=texts.device)
    block = partial(_block, scale=scale, bias=bias, objective=objective[0])
    size = max(1, logits_at_once // (kinds * len(images)))
    blocks = []
    masks = [None] * -(-rows // size) if text_mask is None else text_mask.split(size)
    for arguments in zip([images] * len(masks), texts.split(size), masks, own.split(size), strict=True):
        if size < rows:
            blocks.append(checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(block(*arguments))
    costs, normalisers, hits = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    return objective[1](gather(costs), gather(normalisers)), gather(hits).sum(0)


def _block(
    images: Tensor,
    texts: Tensor,
    text_mask: Tensor | None,
    own: Tensor,
    *,
    scale: Tensor,
    bias: Tensor | None,
    objective: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the objective gives for the texts of a block, [b, N, …], and how many of them pick their own image, [N]."""

    def logits(similarity: Tensor) -> Tensor:
        """[T, N·b] as [N, b, T]."""
        scaled = scale * similarity.T.unflatten(0, (texts.shape[1], -1))
        return scaled if bias is None else scaled + bias

    flat = texts.transpose(0, 1).flatten(0, 1)  # [N·b, …]
    if text_mask is None:
        image_to_text, text_to_image = cosine(images, flat)
    else:
        image_to_text, text_to_image = late_interaction(images, flat, text_mask.transpose(0, 1).flatten(0, 1))
    picks_image = logits(text_to_image)
    picks_text = picks_image if image_to_text is text_to_image else logits(image_to_text)
    with torch.no_grad():
        # strictly nearer than all others, so that features that are all the same are no hit
        hits = (picks_image >= _own(picks_image, own)[..., None]).sum(2).eq(1).sum(1).to(scale.dtype)
    return *objective(picks_image, picks_text, own), hits
