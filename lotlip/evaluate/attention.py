"""Where attention goes (paper, Figs. 1 and 6): over an image's patches for a text, and over a text's sub-captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lotlip.data.batches import in_batches
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.models.corner_mask import corner_attention_mask
from lotlip.models.lotlip import LotlipModel
from lotlip.models.text_tower import TextTower

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES_AT_ONCE = 16  # attention of all of an image tower's blocks is held for each

# --- images -------------------------------------------------------------------------------------------------------


def maps_of(encoder: LotlipEncoder, images: Iterable[Image | bytes], texts: Iterable[Sequence[str]]) -> list[Tensor]:
    """The relevance of the patches of each image for each of its own texts, [N, G, G'] on the CPU.

    Args:
        encoder: the model.
        images: decoded or not; some are in memory at a time.
        texts: of each image, one at least.

    Raises:
        ValueError: as of `relevance_maps`, or an image cannot be decoded.
    """
    model, found = encoder.model, []
    for batch in in_batches(zip(images, texts, strict=True), _IMAGES_AT_ONCE):
        numbers = [len(own) for _, own in batch]
        pixels = torch.from_numpy(np.stack([encoder.prepare(image) for image, _ in batch]))
        ids, lengths = map(torch.from_numpy, encoder.tokenizer([text for _, own in batch for text in own]))
        image = torch.arange(len(batch)).repeat_interleave(torch.tensor(numbers))
        maps = relevance_maps(model, *(given.to(model.device) for given in (pixels, ids, lengths, image)))
        found += maps.cpu().split(numbers)
    return found


def relevance_maps(
    model: LotlipModel, pixels: Tensor, input_ids: Tensor, lengths: Tensor, image: Tensor | None = None
) -> Tensor:
    """How much each patch matters for how well a text and its image fit: gradient-weighted attention roll-out.

    As Chefer et al. compute it (arXiv 2103.15679, eq. 5 and 6): through the image tower's blocks relevance grows by
    R ← R + Ā R, where Ā is a block's attention times its gradient by the cosine of image and text, what is negative
    left out, the mean over heads; [CLS]'s row of R is the map. The model stays as it was, gradients included, and may
    be frozen; a caller's `inference_mode` does not matter. Attention of all blocks is kept at the same time, for
    ViT-B/16 45 MB an image: mind the batch. An image's attention is computed once for all of its texts.

    Args:
        model: to ask, in evaluation mode; where it is, the inputs are.
        pixels: [B, 3, S, S], as `encode_image` takes them.
        input_ids: texts, padded at the end, [N, L].
        lengths: tokens of each text, [N].
        image: each text's image, 0 … B−1, [N]; without it text i is image i's.

    Returns:
        fp32, of each text [N, G, G'], the grid of patches from the top left; nowhere negative, each sums to 1. A map is
        even where no patch speaks for the text.

    Raises:
        ValueError: the model compares token by token, is in training mode, or its attention cannot be seen.
    """
    _check(model)
    trunk: Any = model.image_tower.trunk
    # what was made in inference mode cannot be differentiated through, so the pixels are copied out of it
    with torch.inference_mode(False):
        with torch.no_grad():
            texts = model.encode_text(input_ids, lengths, cls_only=True)[:, 0]
        with torch.enable_grad(), _attention_of(trunk) as attention:
            # a start for gradients, where the tower is frozen
            images = model.encode_image(pixels.detach().clone().requires_grad_())
        image = torch.arange(len(texts), device=texts.device) if image is None else image
        rows = texts.new_empty(len(texts), attention[0].shape[-1], dtype=torch.float32)
        for own in _one_of_each(image):
            cosines = (images[image[own]] * texts[own]).sum()
            gradients = torch.autograd.grad(cosines, attention, retain_graph=True)
            seen = zip(attention, gradients, strict=True)
            blocks = [(a.detach() * g)[image[own]].float().relu().mean(dim=1) for a, g in seen]
            rows[own] = roll_out(blocks)[:, 0]
    patches = rows[:, trunk.num_prefix_tokens :]
    total = patches.sum(dim=1, keepdim=True)
    maps = torch.where(total > 0, patches / total, 1 / patches.shape[1])
    return maps.unflatten(1, trunk.patch_embed.grid_size)


def _one_of_each(image: Tensor) -> Iterator[Tensor]:
    """Places of the texts, [N] in all, in groups in which no image comes twice: the first of each, the second, …"""
    turn = (image == image[:, None]).tril(-1).sum(dim=1)
    for number in range(int(turn.max()) + 1):
        yield (turn == number).nonzero()[:, 0]


def roll_out(blocks: list[Tensor], first: int = 1) -> Tensor:
    """The first rows of (1 + Ā_n) … (1 + Ā_1), which alone are read, so that no product of two matrices is made.

    Args:
        blocks: Ā of each block in order, [B, T, T]: how much of each token (column) goes into each (row).
        first: number of rows.

    Returns:
        [B, first, T]
    """
    rows = torch.eye(first, blocks[0].shape[-1], device=blocks[0].device).expand(len(blocks[0]), -1, -1)
    for block in reversed(blocks):
        rows = rows + rows @ block
    return rows


@contextmanager
def _attention_of(trunk: Any) -> Iterator[list[Tensor]]:
    """Lists the attention [B, h, T, T] of each of a ViT's blocks in the order in which it is computed."""
    layers: list[Any] = [getattr(block, "attn", None) for block in getattr(trunk, "blocks", ())]
    if not layers or not all(hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop") for layer in layers):
        raise ValueError(f"{type(trunk).__name__} is no plain ViT of timm's, so its attention cannot be seen")
    attention: list[Tensor] = []
    before = [layer.fused_attn for layer in layers]
    hooks = [layer.attn_drop.register_forward_hook(lambda *call: attention.append(call[-1])) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False  # fused kernels never write attention down
        yield attention
    finally:
        for layer, fused, hook in zip(layers, before, hooks, strict=True):
            layer.fused_attn = fused
            hook.remove()


# --- texts --------------------------------------------------------------------------------------------------------


def text_attention(model: LotlipModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """How [CLS] and each corner token spread over a text's words: attention roll-out (arXiv 2005.00928, section 3).

    The last layer alone would not tell: what it reads are mixtures, and [CLS] has read in every layer before, in part
    through tokens that are no words, such as corner tokens where no mask parts them. So attention, the mean over heads,
    is followed through all layers; half of each layer's outcome is what came in, by its residual connections. What ends
    up on special tokens and padding is left out.

    Args:
        model: in evaluation mode.
        input_ids: [B, L], padded at the end.
        lengths: tokens of each text, [B].

    Returns:
        fp32, [B, 1 + m, L]; rows of [CLS], Cor 1, …, Cor m, each sums to 1; all 0 for a text without words.

    Raises:
        ValueError: the model compares token by token, is in training mode, or its encoder does not give its attention.
    """
    _check(model)
    with torch.no_grad():
        layers = text_layers(model.text, input_ids, lengths)[1]
    # rows of Π (1 + A) / 2; the halves make no difference to what is normalised
    rows = roll_out([layer.float().mean(dim=1) for layer in layers], 1 + model.config.corner_tokens)
    rows = rows * (sub_captions(model, input_ids, lengths) >= 0)[:, None]
    return rows / rows.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def text_layers(tower: TextTower, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The encoder's last hidden states [B, L, H], and each layer's attention [B, h, L, L].

    transformers writes attention down in its plain implementation alone, to which the encoder is switched meanwhile.

    Raises:
        ValueError: it does not write it down even then.
    """
    seen = corner_attention_mask(lengths, input_ids.shape[1], tower.corner_tokens, tower.corner_mask)
    seen = seen.expand(-1, -1, input_ids.shape[1], -1)
    encoder: Any = tower.transformer
    dtype = encoder.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    before = encoder.config._attn_implementation
    try:
        encoder.set_attn_implementation("eager")
        found = encoder(input_ids=input_ids, attention_mask=mask, output_attentions=True)
    finally:
        encoder.set_attn_implementation(before)
    attention = tuple(getattr(found, "attentions", None) or ())
    wanted = encoder.config.num_hidden_layers
    if len(attention) != wanted or any(layer.shape[-2:] != seen.shape[-2:] for layer in attention):
        raise ValueError(
            f"a {encoder.config.model_type} encoder does not give the attention of each of its {wanted} layers; "
            "those of bert, roberta, electra, distilbert and albert do"
        )
    return found.last_hidden_state, attention


def sub_captions(model: LotlipModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Which sub-caption each token belongs to, from 0: [B, L]; −1 for special tokens and padding."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    extra = 1 + model.config.corner_tokens + model.config.register_tokens
    ends = input_ids.gather(1, lengths[:, None] - 1)  # a text's last token is [SEP], cut or not
    words = (position >= extra) & (position < lengths[:, None]) & (input_ids != ends)
    starts = words & ~words.roll(1, dims=1)  # position 0 is [CLS], so what `roll` brings round does not matter
    return torch.where(words, starts.cumsum(dim=1) - 1, -1)


def sub_caption_shares(attention: Tensor, sub_caption: Tensor) -> tuple[Tensor, Tensor]:
    """What share of attention, and of the tokens, each sub-caption has.

    Args:
        attention: over the tokens, [B, R, L], as `text_attention` gives it.
        sub_caption: of each token, [B, L], as `sub_captions` gives it.

    Returns:
        Of attention [B, R, N] and of tokens [B, N], where N is the largest number of sub-captions; shorter texts have 0
        in the end.
    """
    number = int(sub_caption.max()) + 1
    member = sub_caption[..., None] == torch.arange(number, device=sub_caption.device)  # [B, L, N]
    tokens = member.sum(dim=1).float()
    return attention @ member.float(), tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)


def spread(shares: Tensor, number: Tensor) -> Tensor:
    """How evenly shares are spread: their entropy over that of as many even ones, 0 … 1.

    Args:
        shares: of each text's sub-captions, [B, N] or [B, R, N].
        number: of each text's sub-captions, [B].

    Returns:
        [B] or [B, R]; NaN where a text has less than two, over which nothing can be spread.
    """
    entropy = torch.special.entr(shares).sum(dim=-1)
    even = torch.where(number > 1, number, math.nan).log()
    return entropy / (even if entropy.ndim == 1 else even[:, None])


def where_words(words: Tensor, input_ids: Tensor) -> Tensor:
    """Where a phrase stands in a text: bool [L], True at the tokens of each place.

    Args:
        words: ids of the phrase, [n].
        input_ids: of the text, [L].
    """
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    if len(words) <= len(input_ids):
        for start in (input_ids.unfold(0, len(words), 1) == words).all(dim=1).nonzero().flatten().tolist():
            found[start : start + len(words)] = True
    return found


def _check(model: LotlipModel) -> None:
    if model.config.similarity == "late-interaction":
        raise ValueError("attention is followed back from [CLS]'s features, which late interaction does not compare")
    if model.training:
        raise ValueError("the model is in training mode, where dropout moves attention; call model.eval() first")
