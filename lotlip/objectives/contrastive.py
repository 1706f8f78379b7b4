"""The training loss: contrasts an image with each of its texts, with the variants that the paper compares.

It is a sum of terms. A term has image features, a kind of text features, a similarity and an objective (`OBJECTIVES`),
each in a file of its own in this package. For a global batch of T images with N texts each, a process has its own B
texts and gathers the image features of all processes, one per image; the texts, N times as many, are not gathered. The
N × B × T logits are computed in blocks, and again in the backward pass, so that only a few of them exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lotlip.objectives import sigmoid, softmax
from lotlip.objectives.components import components_by_kind, principal_components
from lotlip.objectives.conditioned import batch_loss
from lotlip.objectives.margin import with_margin
from lotlip.objectives.masks import masked_cosine
from lotlip.objectives.processes import first_row, gather
from lotlip.objectives.similarity import cosine, late_interaction

__all__ = ["LOGITS_AT_ONCE", "OBJECTIVES", "feature_shares", "lotlip_loss", "principal_components"]

# Logits per block: 16 MB in fp32, and a few times that in the backward pass. Larger blocks are not faster.
LOGITS_AT_ONCE = 2**22

# Similarities image→text and text→image, [I, T] each, of images and texts; the same tensor twice if they are the same.
Similarity = Callable[..., tuple[Tensor, Tensor]]
# Two functions each: for a block of logits, and to combine the blocks of all processes (`lotlip.objectives.softmax`).
Objective = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]
OBJECTIVES: dict[str, Objective] = {
    "infonce": (softmax.block, softmax.combine),
    "siglip": (sigmoid.block, sigmoid.combine),
}


def feature_shares(features: int, short_loss_fraction: float | None) -> Tensor:
    """The weight of each of the N text features in the loss, the short caption's first: [N], with sum 1."""
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
    channel_masks: Tensor | None = None,
    image_tokens: Tensor | None = None,
    pooling: Tensor | None = None,
    draws: Tensor | None = None,
    objective: str = "infonce",
    short_loss_fraction: float | None = None,
    short_loss_weight: float = 1.0,
    long_loss_weight: float = 1.0,
    image_components: float = 0,
    text_components: float = 0,
    label_smoothing: float = 0.0,
    hard_negative_margin: float = 0.0,
    mask_penalty: float = 0.0,
    conditioned_weight: float = 0.5,
    pooling_heads: int = 8,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> dict[str, Tensor]:
    """Mean over an image's N text features of their objective with the image features (paper, section 3.2), and more.

    Without further terms this is LoTLIP's loss. Options add terms or change the similarity:

    - `image_components`, `text_components` and `hard_negative_margin` exclude `text_mask` (late interaction).
    - `channel_masks` (SmartCLIP) exclude `text_mask`, `image_components` and `text_components`.
    - `image_tokens` with `pooling` and `draws` (FLAIR) exclude `text_mask`, and need the objective siglip.
    - `label_smoothing` needs the objective infonce.

    Negatives come from the whole batch of all processes. Every process returns the loss of that whole batch. The
    engine averages gradients over the processes, which gives the gradients of a single process with the whole batch.

    Args:
        image_features: normalised, [B, D]; with `text_mask` those of patches, [B, P, D].
        text_features: normalised, [B, N, D]; the short caption's [CLS] first, then those of the long texts. With
            `text_mask` those of tokens, [B, N, L, D], in the same order; L may differ between processes.
        logit_scale: inverse temperature, [1].
        logit_bias: added to every logit, [1]; siglip needs it, infonce does not depend on it.
        text_mask: bool, True at a text's tokens, [B, N, L]. With it, image and text are compared by late interaction
            (FILIP, arXiv 2111.07783); without it, by the cosine of one feature each.
        channel_masks: of texts, between 0 and 1, [B, N, D]. With them, a text is compared with the channels of an image
            that it selects (`lotlip.objectives.masks`).
        image_tokens: projected patches of images, [B, P, D]. With them, image features pooled for each text are
            compared too (`lotlip.objectives.conditioned`). Texts with the weight 0 take no part.
        pooling: weights of that pooling, from `ConditionedPooling`, [4 D + 10, D].
        draws: two random integers of each image, which choose the texts of other images that its pooled features are
            compared with, [B, 2].
        objective: "infonce" (symmetric; paper, section 3.2) or "siglip" (sigmoid, arXiv 2303.15343).
        short_loss_fraction: weight of the short caption's feature in the mean, if there are others, which share the
            rest; None: each of the N has 1/N, as in the paper.
        short_loss_weight: factor of the short caption's term (`clip_lossweight` in the released code).
        long_loss_weight: factor of the other terms (`declip_lossweight`).
        image_components: number, or share of variance, of the principal components of the image features that the short
            caption is contrasted with (Long-CLIP, arXiv 2403.15378, section 3.2; 32 in its release); 0: the full
            features. They are computed over the whole batch, so the result does not depend on the number of processes;
            Long-CLIP's release computes them per process.
        text_components: number, or share of variance, of the principal components of each kind of long text feature
            that the images are contrasted with as well (HiMo-CLIP, arXiv 2511.06653, with the share 0.9); 0: only with
            the full features. Computed over the whole batch too.
        label_smoothing: of infonce; 0.1 in Long-CLIP, HiMo-CLIP and ALIGN.
        hard_negative_margin: γ. The similarity of an image and another image's text grows by γ times the cosine of that
            text and the image's own text, without gradient (arXiv 2608.18521).
        mask_penalty: weight of the mean of a text's `channel_masks` beside the text's objective.
        conditioned_weight: weight of the pooled features' term; the others have the rest.
        pooling_heads: attention heads of the pooling; they divide D.
        logits_at_once: logits per block (at least one text of each kind with all images); changes memory, not the
            result.

    Returns:
        `raw` and `long`, the weighted terms of the short caption and the long texts; with `image_tokens` `conditioned`,
        the weighted term of pooled features; `loss`, their sum; and, without gradient, `recall`: the share of the
        batch's texts that are nearer to their own image than to any other, mean over the N kinds.

    Raises:
        ValueError: the objective is unknown or lacks its bias, shapes do not match, or options do not combine.
    """
    _check_options(
        objective,
        biased=logit_bias is not None,
        late=text_mask is not None,
        masked=channel_masks is not None,
        conditioned=image_tokens is not None,
        components=bool(image_components or text_components),
        margin=bool(hard_negative_margin),
        smoothing=bool(label_smoothing),
    )
    _check_shapes(image_features, text_features, text_mask, channel_masks)
    if len({value is None for value in (image_tokens, pooling, draws)}) > 1:
        raise ValueError("image_tokens, pooling and draws belong together; give all three or none")
    images = gather(image_features)  # [T, D] or [T, P, D]
    compare = partial(
        _terms,
        scale=logit_scale,
        bias=logit_bias,
        objective=OBJECTIVES[objective],
        smoothing=label_smoothing,
        margin=hard_negative_margin,
        logits_at_once=logits_at_once,
    )
    if image_components:
        raw_terms, raw_hits = compare(principal_components(images, image_components), text_features[:, :1])
        long_terms, long_hits = compare(images, text_features[:, 1:])
        terms, hits = torch.cat([raw_terms, long_terms]), torch.cat([raw_hits, long_hits])
    elif channel_masks is not None:
        terms, hits = compare(images, text_features, channel_masks, similarity=masked_cosine)
        terms = terms + mask_penalty * gather(channel_masks.mean((0, 2))[None]).mean(0)
    elif text_mask is not None:
        terms, hits = compare(images, text_features, text_mask, similarity=late_interaction)
    else:
        terms, hits = compare(images, text_features)
    if text_components and text_features.shape[1] > 1:
        reduced, _ = compare(images, components_by_kind(text_features[:, 1:], text_components))
        terms = torch.cat([terms[:1], terms[1:] + reduced])
    shares = feature_shares(len(terms), short_loss_fraction)  # [N]
    terms = terms * shares.to(terms)
    raw, long = short_loss_weight * terms[0], long_loss_weight * terms[1:].sum()
    recall = hits.mean() / len(images)
    if image_tokens is None or pooling is None or draws is None or logit_bias is None:
        return {"raw": raw, "long": long, "loss": raw + long, "recall": recall}
    first = 0 if short_loss_weight and shares[0] else 1
    last = None if long_loss_weight and shares[1:].any() else 1
    conditioned = conditioned_weight * batch_loss(
        image_tokens,
        text_features[:, first:last],
        pooling,
        logit_scale,
        logit_bias,
        draws=draws,
        heads=pooling_heads,
        values_at_once=logits_at_once,
    )
    raw, long = (1 - conditioned_weight) * raw, (1 - conditioned_weight) * long
    return {"raw": raw, "long": long, "conditioned": conditioned, "loss": raw + long + conditioned, "recall": recall}


def _check_options(
    objective: str,
    *,
    biased: bool,
    late: bool,
    masked: bool,
    conditioned: bool,
    components: bool,
    margin: bool,
    smoothing: bool,
) -> None:
    """Raises ValueError if options do not combine."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; use one of {', '.join(OBJECTIVES)}")
    if objective == "siglip" and not biased:
        raise ValueError("objective siglip needs logit_bias; a model has one if its config says logit_bias: true")
    if late and (components or margin):
        raise ValueError(
            "image_components, text_components and hard_negative_margin need one feature per image and text, which "
            "late interaction does not have; set them to 0"
        )
    if late and (masked or conditioned):
        raise ValueError(
            "channel_masks and image_tokens need one feature per image and text, which late interaction does not have; "
            "leave out text_mask or these"
        )
    if masked and components:
        raise ValueError(
            "channel_masks select from the full features; set image_components and text_components to 0, or leave "
            "out channel_masks"
        )
    if conditioned and objective != "siglip":
        raise ValueError("image_tokens, for FLAIR's pooled features, need the objective siglip")
    if smoothing and objective != "infonce":
        raise ValueError("label_smoothing needs the objective infonce; set it to 0")


def _check_shapes(
    image_features: Tensor, text_features: Tensor, text_mask: Tensor | None, channel_masks: Tensor | None
) -> None:
    if channel_masks is not None and channel_masks.shape != text_features.shape:
        raise ValueError(
            f"channel_masks {list(channel_masks.shape)} and text_features {list(text_features.shape)} do not match; "
            "expected [B, N, D] each"
        )
    images, texts = image_features.shape, text_features.shape
    if text_mask is None:
        fits, needed = len(images) == 2 and len(texts) == 3, "[B, D] and [B, N, D]"
    else:
        fits, needed = len(images) == 3 and len(texts) == 4, "[B, P, D] and [B, N, L, D] with text_mask [B, N, L]"
        fits = fits and text_mask.shape == texts[:3]
    if not fits or (images[0], images[-1]) != (texts[0], texts[-1]):
        mask = "none" if text_mask is None else f"{list(text_mask.shape)}"
        raise ValueError(
            f"image_features {list(images)} and text_features {list(texts)} with text_mask {mask} do not match; "
            f"expected {needed}"
        )


def _terms(
    images: Tensor,
    texts: Tensor,
    masks: Tensor | None = None,
    *,
    similarity: Similarity = cosine,
    scale: Tensor,
    bias: Tensor | None,
    objective: Objective,
    smoothing: float,
    margin: float,
    logits_at_once: int,
) -> tuple[Tensor, Tensor]:
    """The objective over all T images and the texts of all processes; those of this process are [B, N, …].

    `similarity` gets `masks`, [B, N, …], of the texts, if it needs them.

    Returns:
        The loss of each kind of text and the number of texts that pick their own image, [N] each.
    """
    rows, kinds = texts.shape[:2]
    if not kinds:
        return texts.new_zeros(0), texts.new_zeros(0)
    first = first_row(rows)
    own = torch.arange(first, first + rows, device=texts.device)
    own_texts = gather(texts.detach()) if margin else None
    block = partial(
        _block,
        similarity=similarity,
        scale=scale,
        bias=bias,
        objective=partial(objective[0], smoothing=smoothing),
        margin=margin,
        own_texts=own_texts,
    )
    size = max(1, logits_at_once // (kinds * len(images)))
    blocks = []
    parts = [None] * -(-rows // size) if masks is None else masks.split(size)
    for arguments in zip([images] * len(parts), texts.split(size), parts, own.split(size), strict=True):
        if size < rows:
            blocks.append(checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(block(*arguments))
    costs, normalisers, hits = (torch.stack(part) for part in zip(*blocks, strict=True))
    return objective[1](gather(costs), gather(normalisers)), gather(hits).sum(0)


def _block(
    images: Tensor,
    texts: Tensor,
    masks: Tensor | None,
    own: Tensor,
    *,
    similarity: Similarity,
    scale: Tensor,
    bias: Tensor | None,
    objective: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    margin: float,
    own_texts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective for the texts of a block, [b, N, …], and how many of them pick their own image, [N].

    `own_texts`, [T, N, D], has each image's own texts; None without a margin.
    """

    def logits(similarities: Tensor) -> Tensor:
        """[T, N·b] as [N, b, T]."""
        scaled = scale * similarities.T.unflatten(0, (texts.shape[1], -1))
        return scaled if bias is None else scaled + bias

    of_texts = [values.transpose(0, 1).flatten(0, 1) for values in (texts, masks) if values is not None]  # [N·b, …]
    image_to_text, text_to_image = similarity(images, *of_texts)
    picks_image = logits(text_to_image)
    picks_text = picks_image if image_to_text is text_to_image else logits(image_to_text)
    with torch.no_grad():
        # Strictly nearer than all others, so that identical features do not count as hits. Before the margin: with it,
        # texts of a new model pick their own image less often than by chance.
        hits = (picks_image >= softmax.positives(picks_image, own)[..., None]).sum(2).eq(1).sum(1).to(scale.dtype)
    if own_texts is not None:  # only without late interaction, so both directions are the same
        picks_image = picks_text = with_margin(picks_image, texts, own_texts, own, margin * scale)
    return *objective(picks_image, picks_text, own), hits
