"""Attention of a model (paper, Figs. 1 and 6): over an image's patches for a text, and over a text's sub-captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor
from transformers import PreTrainedModel

from lotlip.data.batches import in_batches
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.models.lotlip import LotlipModel
from lotlip.models.text.bert import BertTower
from lotlip.models.text.masks import corner_attention_mask
from lotlip.models.text.text_tower import TextTower

if TYPE_CHECKING:
    from PIL.Image import Image

    from lotlip.models.vision.image_tower import ImageTower

_IMAGE_BATCH = 16  # the attention of all blocks of the image tower is in memory for each image

# --- images -------------------------------------------------------------------------------------------------------


def image_relevance_maps(
    encoder: LotlipEncoder, images: Iterable[Image | bytes], texts: Iterable[Sequence[str]]
) -> list[Tensor]:
    """Computes, for each image, the relevance of its patches for each of its texts, [N, G, G'] on the CPU.

    Args:
        encoder: the model.
        images: decoded or encoded images; one batch is in memory at a time.
        texts: the texts of each image, at least one.

    Raises:
        ValueError: see `relevance_maps`, or an image cannot be decoded.
    """
    model, by_image = encoder.model, []
    for batch in in_batches(zip(images, texts, strict=True), _IMAGE_BATCH):
        counts = [len(image_texts) for _, image_texts in batch]
        pixels = torch.from_numpy(np.stack([encoder.prepare(image) for image, _ in batch]))
        ids, lengths = map(torch.from_numpy, encoder.tokenizer([t for _, image_texts in batch for t in image_texts]))
        image = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
        maps = relevance_maps(model, *(tensor.to(model.device) for tensor in (pixels, ids, lengths, image)))
        by_image += maps.cpu().split(counts)
    return by_image


def relevance_maps(
    model: LotlipModel, pixels: Tensor, input_ids: Tensor, lengths: Tensor, image: Tensor | None = None
) -> Tensor:
    """Computes the relevance of each patch for the similarity of image and text, by gradient-weighted rollout.

    Follows Chefer et al. (arXiv 2103.15679, eq. 5 and 6). Relevance is propagated through the blocks of the image
    tower by R ← R + Ā R. Ā is the mean over heads of the positive part of a block's attention times its gradient with
    respect to the cosine of image and text. The row of [CLS] in R is the map, or the mean of the patches' rows where
    these are the feature.

    The model and its gradients are left unchanged. It may be frozen, and the caller may be in `inference_mode`. The
    attention of all blocks is in memory, 45 MB per image for ViT-B/16, so choose the batch accordingly. Attention is
    computed once per image for all of its texts.

    Args:
        model: the model, in evaluation mode, on the same device as the inputs.
        pixels: [B, 3, S, S], as `encode_image` takes them.
        input_ids: texts, padded at the end, [N, L].
        lengths: tokens of each text, [N].
        image: index of each text's image, 0 … B−1, [N]; by default, text i belongs to image i.

    Returns:
        fp32 [N, G, G'], a map for each text over the grid of patches from the top left. Maps are nonnegative and sum to
        1. A map is uniform if no patch supports the text.

    Raises:
        ValueError: the model uses late interaction or is in training mode, or its attention is not accessible.
    """
    _check(model)
    tower = model.image_tower
    check_maps(tower)
    # Tensors made in inference mode cannot be differentiated, so the pixels are cloned outside of it.
    with torch.inference_mode(False):
        with torch.no_grad():
            texts = model.encode_text(input_ids, lengths, cls_only=True)[:, 0]
        with torch.enable_grad(), _attention_of(tower.trunk) as attention:
            # With a frozen tower, only the pixels can require gradients.
            images = model.encode_image(pixels.detach().clone().requires_grad_())
        image = torch.arange(len(texts), device=texts.device) if image is None else image
        rows = texts.new_empty(len(texts), attention[0].shape[-1], dtype=torch.float32)
        first = 1 if _pooling(tower) == "token" else rows.shape[1]
        for group in _groups_of_distinct_images(image):
            cosines = (images[image[group]] * texts[group]).sum()
            gradients = torch.autograd.grad(cosines, attention, retain_graph=True)
            pairs = zip(attention, gradients, strict=True)
            blocks = [(a.detach() * g)[image[group]].float().relu().mean(dim=1) for a, g in pairs]
            rows[group] = _pooled_rows(tower, rollout(blocks, first))
    patches = rows[:, tower.prefix_tokens :]
    total = patches.sum(dim=1, keepdim=True)
    maps = torch.where(total > 0, patches / total, 1 / patches.shape[1])
    side = math.isqrt(maps.shape[1])
    return maps.unflatten(1, getattr(getattr(tower.trunk, "patch_embed", None), "grid_size", (side, side)))


def check_maps(tower: ImageTower) -> None:
    """Checks that relevance maps exist for an image tower.

    Raises:
        ValueError: its attention is not accessible, or its feature is not a mean of tokens.
    """
    name = f"the image tower {tower.spec.model} ({tower.spec.library})"
    if isinstance(tower.trunk, PreTrainedModel):
        is_plain = hasattr(tower.trunk.config, "num_attention_heads")
    else:
        is_plain = isinstance(tower.trunk, VisionTransformer) and _attention_layers(tower.trunk) is not None
    if not is_plain:
        raise ValueError(f"attention maps are not available for {name}: it is not a plain ViT of timm or transformers")
    if _pooling(tower) is None:
        raise ValueError(
            f"attention maps are not available for {name}: its feature is not [CLS], the mean of the patches, or both"
        )


def _pooling(tower: ImageTower) -> str | None:
    """Which tokens the feature is made of: "token", "mean" or "token+mean"; None where it is none of these."""
    if tower.spec.pooling != "model":
        return None if tower.spec.pooling == "map" else tower.spec.pooling
    if isinstance(tower.trunk, VisionTransformer):
        if hasattr(tower.trunk, "dist_token"):  # [CLS] and the distillation token
            return None
        return {"token": "token", "avg": "mean"}.get(tower.trunk.global_pool)
    return "token" if tower.has_cls else None


def _pooled_rows(tower: ImageTower, rows: Tensor) -> Tensor:
    """Relevance of each token [B, T] for the feature, from that for each token, [B, T, T] or [B, 1, T]."""
    pooling = _pooling(tower) or ""
    parts = [rows[:, 0]] if "token" in pooling else []
    if "mean" in pooling:
        parts.append(rows[:, tower.prefix_tokens :].mean(dim=1))
    return torch.stack(parts).mean(dim=0)


def _groups_of_distinct_images(image: Tensor) -> Iterator[Tensor]:
    """Yields indices of texts in groups without duplicate images: the first text of each image, the second, …"""
    number_in_image = (image == image[:, None]).tril(-1).sum(dim=1)
    for number in range(int(number_in_image.max()) + 1):
        yield (number_in_image == number).nonzero()[:, 0]


def rollout(blocks: list[Tensor], first: int = 1) -> Tensor:
    """Computes the first rows of (1 + Ā_n) … (1 + Ā_1). The other rows are not used, so they are never computed.

    Args:
        blocks: Ā of each block in order, [B, T, T]: the contribution of each token (column) to each token (row).
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
    """Collects the attention [B, h, T, T] of each block of a ViT in order, during the forward pass."""
    attention: list[Tensor] = []
    if isinstance(trunk, PreTrainedModel):
        with _eager_attention(trunk, attention):
            yield attention
        return
    layers = _attention_layers(trunk)
    if layers is None:
        raise ValueError(f"{type(trunk).__name__} is not a plain timm ViT, so its attention is not accessible")
    was_fused = [layer.fused_attn for layer in layers]
    hooks = [layer.attn_drop.register_forward_hook(lambda *call: attention.append(call[-1])) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False  # fused kernels do not return attention
        yield attention
    finally:
        for layer, fused, hook in zip(layers, was_fused, hooks, strict=True):
            layer.fused_attn = fused
            hook.remove()


def _attention_layers(trunk: Any) -> list[Any] | None:
    """The attention of each block of a plain timm ViT; None for other models."""
    layers: list[Any] = [getattr(block, "attn", None) for block in getattr(trunk, "blocks", ())]
    plain = layers and all(hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop") for layer in layers)
    return layers if plain else None


@contextmanager
def _eager_attention(model: Any, attention: list[Tensor]) -> Iterator[None]:
    """Has a model of transformers compute its attention so that it can be collected."""
    implementation = model.config._attn_implementation
    forward = model.forward

    def with_attentions(*inputs: Any, **options: Any) -> Any:
        output = forward(*inputs, **options, output_attentions=True)
        attention.extend(output.attentions)
        return output

    try:
        model.set_attn_implementation("eager")
        model.forward = with_attentions
        yield
    finally:
        del model.forward
        model.set_attn_implementation(implementation)


# --- texts --------------------------------------------------------------------------------------------------------


def text_attention(model: LotlipModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Computes the attention of [CLS] and each corner token over a text's words, by attention rollout.

    Attention rollout (arXiv 2005.00928, section 3) multiplies the attention of all layers, averaged over heads; the
    residual connections count for half of each layer. The last layer alone would be misleading: its inputs are already
    mixtures of tokens, and [CLS] also reads words through other special tokens, such as unmasked corner tokens.
    Attention that ends on special tokens and padding is left out.

    Args:
        model: the model, in evaluation mode.
        input_ids: [B, L], padded at the end.
        lengths: tokens of each text, [B].

    Returns:
        fp32 [B, 1 + m, L]; rows of [CLS], Cor 1, …, Cor m, each sums to 1; all 0 for a text without words.

    Raises:
        ValueError: the model uses late interaction or is in training mode, or its encoder does not return attention.
    """
    _check(model)
    if type(model.text) is not BertTower:
        raise ValueError(
            "attention over the tokens of a text is not available for a text tower of type "
            f"{model.config.text_config.model_type}: only for those of the BERT family"
        )
    with torch.no_grad():
        layers = text_layers(model.text, input_ids, lengths)[1]
    # Rows of Π (1 + A) / 2. The factor 1/2 cancels in the normalisation.
    rows = rollout([layer.float().mean(dim=1) for layer in layers], 1 + model.config.corner_tokens)
    rows = rows * (sub_captions(model, input_ids, lengths) >= 0)[:, None]
    return rows / rows.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def text_layers(tower: TextTower, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the encoder's last hidden states [B, L, H] and each layer's attention [B, h, L, L].

    Only the eager implementation of transformers returns attention, so the encoder is switched to it temporarily.

    Raises:
        ValueError: the encoder does not return the attention of all layers.
    """
    visible = corner_attention_mask(lengths, input_ids.shape[1], tower.corner_tokens, tower.corner_mask)
    visible = visible.expand(-1, -1, input_ids.shape[1], -1)
    encoder: Any = tower.transformer
    dtype = encoder.dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
    implementation = encoder.config._attn_implementation
    try:
        encoder.set_attn_implementation("eager")
        output = encoder(input_ids=input_ids, attention_mask=mask, output_attentions=True)
    finally:
        encoder.set_attn_implementation(implementation)
    attention = tuple(getattr(output, "attentions", None) or ())
    layers = encoder.config.num_hidden_layers
    if len(attention) != layers or any(layer.shape[-2:] != visible.shape[-2:] for layer in attention):
        raise ValueError(
            f"a {encoder.config.model_type} encoder does not return the attention of each of its {layers} layers; "
            "use bert, roberta, electra, distilbert or albert"
        )
    return output.last_hidden_state, attention


def sub_captions(model: LotlipModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Returns the index of each token's sub-caption, [B, L]; −1 for special tokens and padding."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    ends = input_ids.gather(1, lengths[:, None] - 1)  # the last token is [SEP], also in a truncated text
    words = (position >= model.text.first_word) & (position < lengths[:, None]) & (input_ids != ends)
    starts = words & ~words.roll(1, dims=1)  # `roll` wraps around to position 0, which is [CLS] and never a word
    return torch.where(words, starts.cumsum(dim=1) - 1, -1)


def sub_caption_shares(attention: Tensor, sub_caption: Tensor) -> tuple[Tensor, Tensor]:
    """Computes each sub-caption's share of attention and of tokens.

    Args:
        attention: attention over the tokens from `text_attention`, [B, R, L].
        sub_caption: index of each token's sub-caption from `sub_captions`, [B, L].

    Returns:
        Shares of attention [B, R, N] and of tokens [B, N], where N is the largest number of sub-captions; shorter texts
        are padded with 0.
    """
    number = int(sub_caption.max()) + 1
    member = sub_caption[..., None] == torch.arange(number, device=sub_caption.device)  # [B, L, N]
    tokens = member.sum(dim=1).float()
    return attention @ member.float(), tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)


def normalised_entropy(shares: Tensor, number: Tensor) -> Tensor:
    """Computes the entropy of shares, divided by that of equal shares, 0 … 1.

    Args:
        shares: shares of each text's sub-captions, [B, N] or [B, R, N].
        number: number of sub-captions of each text, [B].

    Returns:
        [B] or [B, R]; NaN for a text with fewer than two sub-captions.
    """
    entropy = torch.special.entr(shares).sum(dim=-1)
    maximum = torch.where(number > 1, number, math.nan).log()
    return entropy / (maximum if entropy.ndim == 1 else maximum[:, None])


def phrase_mask(phrase: Tensor, input_ids: Tensor) -> Tensor:
    """Marks all occurrences of a phrase in a text, bool [L].

    Args:
        phrase: token ids of the phrase, [n].
        input_ids: token ids of the text, [L].
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    if len(phrase) <= len(input_ids):
        for start in (input_ids.unfold(0, len(phrase), 1) == phrase).all(dim=1).nonzero().flatten().tolist():
            mask[start : start + len(phrase)] = True
    return mask


def _check(model: LotlipModel) -> None:
    if model.config.similarity == "late-interaction":
        raise ValueError("attention is traced back from the features of [CLS], which late interaction does not use")
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes attention; call model.eval() first")
