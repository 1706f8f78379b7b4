"""Similarity of images and texts: by one feature each, or token by token."""

from __future__ import annotations

import torch
from torch import Tensor

# Patch–token pairs that late interaction compares at a time: 64 MB in fp32, and a few times that in the
# backward pass.
PAIRS_AT_ONCE = 2**24


def cosine(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of one normalised feature each, the same in both directions.

    Args:
        images: [I, D].
        texts: [T, D].

    Returns:
        image→text and text→image, [I, T] each: the same tensor twice.
    """
    similarity = images @ texts.T
    return similarity, similarity


def late_interaction(
    images: Tensor, texts: Tensor, text_mask: Tensor, pairs_at_once: int = PAIRS_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Token-wise similarity (FILIP, arXiv 2111.07783, eq. 3–5): each patch or token is matched with its best partner.

    Image→text is the mean over an image's patches of the largest cosine with any of the text's tokens; text→image is
    the mean over a text's tokens of the largest cosine with any of the image's patches. Padding is ignored in both,
    whatever its values.

    The I·P·T·L pairs never exist all at once: blocks of images and texts are compared one after another. For the
    backward pass each block stores only the positions of its maxima, I·T·(P + L) numbers in all, so that nothing is
    recomputed.

    Args:
        images: normalised patches, [I, P, D].
        texts: normalised tokens, [T, L, D].
        text_mask: bool, True at a text's tokens and False at padding, [T, L].
        pairs_at_once: patch–token pairs per block (at least one image with one text); changes memory, not the result.

    Returns:
        image→text and text→image, [I, T] each.

    Raises:
        ValueError: the mask does not match the texts, or a text has no token.
    """
    if text_mask.shape != texts.shape[:2]:
        raise ValueError(
            f"text_mask has shape {list(text_mask.shape)}; it needs {list(texts.shape[:2])}, one per token"
        )
    ends = (text_mask * torch.arange(1, texts.shape[1] + 1, device=texts.device)).amax(dim=1).cpu()  # [T]
    if not ends.all():
        raise ValueError(f"text_mask: {int((ends == 0).sum())} of {len(ends)} texts have no token; remove them")
    # Padding is replaced by the text's first token, so it never changes the maximum. Masking the padding's cosines with
    # −∞ instead would take another tensor of all pairs, and would keep a NaN of the padding in the gradient.
    first = texts[torch.arange(len(texts), device=texts.device), text_mask.int().argmax(dim=1)]  # [T, D]
    texts = torch.where(text_mask[..., None], texts, first[:, None])
    pairs = images.shape[1] * texts.shape[1]  # of one image and one text
    image_block = min(len(images), max(1, pairs_at_once // pairs))
    text_block = max(1, pairs_at_once // (image_block * pairs))
    blocks = []
    for start in range(0, len(texts), text_block):
        part = slice(start, start + text_block)
        end = int(ends[part].max())  # common padding is cut off: short captions among long texts
        blocks.append((texts[part, :end], text_mask[part, :end]))
    rows = []
    for image_part in images.split(image_block):
        to_text, to_image = zip(*[_block(image_part, *block) for block in blocks], strict=True)
        rows.append((torch.cat(to_text, dim=1), torch.cat(to_image, dim=1)))
    image_to_text, text_to_image = zip(*rows, strict=True)
    return torch.cat(image_to_text), torch.cat(text_to_image)


def _block(images: Tensor, texts: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both directions, [i, t], of [i, P, D] and [t, L, D], where padding repeats a token."""
    similarity = torch.einsum("ipd,tld->iptl", images, texts)
    image_to_text = _largest(similarity, 3).mean(dim=1)
    text_to_image = (_largest(similarity, 1) * text_mask).sum(dim=-1) / text_mask.sum(dim=-1)
    return image_to_text, text_to_image


def _largest(values: Tensor, dim: int) -> Tensor:
    """The maximum. `amax` is faster, but stores all values for its gradient; `max` stores only positions."""
    return values.max(dim=dim).values if values.requires_grad else values.amax(dim=dim)
