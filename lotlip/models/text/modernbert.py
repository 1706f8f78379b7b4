"""Text towers of ModernBERT: rotary positions, and local attention in most layers (arXiv 2412.13663)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from lotlip.models.text.bert import BertTower
from lotlip.models.text.masks import corner_attention_mask
from lotlip.models.text.packing import Needed, PackedTexts, attend

_FULL, _LOCAL = "full_attention", "sliding_attention"


class ModernBertTower(BertTower):
    """ModernBERT's encoder, with a new pooler. In local layers, [CLS] and corner tokens see their window only."""

    @property
    def packs(self) -> bool:
        return True

    def _packed_hidden_states(self, packed: PackedTexts) -> Tensor:
        encoder: Any = self.transformer
        hidden = encoder.embeddings(packed.ids)  # [N, H]
        window = encoder.config.sliding_window
        masks: dict[str, list[Tensor]] = {_FULL: packed.masks, _LOCAL: []}
        sizes = [mask.shape[0] * mask.shape[-1] for mask in packed.masks]
        for mask, positions in zip(packed.masks, packed.positions.split(sizes), strict=True):
            masks[_LOCAL].append(_local(mask, positions[: mask.shape[-1]], window))
        rotations = {
            kind: tuple(part[0] for part in encoder.rotary_emb(hidden, packed.positions[None], kind))
            for kind in set(encoder.config.layer_types)
        }
        *layers, last = encoder.layers
        for layer in layers:
            hidden = self.run_layer(_packed_layer, layer, hidden, masks, rotations)
        return encoder.final_norm(self.run_layer(_packed_layer, last, hidden, masks, rotations, packed.needed))

    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        full = corner_attention_mask(lengths, length, self.corner_tokens, self.corner_mask)
        full = full.expand(-1, -1, length, -1)
        positions = torch.arange(length, device=input_ids.device)
        local = _local(full, positions, self.transformer.config.sliding_window)
        # transformers takes a mask for each kind of layer instead of building them from one of two dimensions
        masks: Any = {_FULL: full, _LOCAL: local}
        hidden = self.transformer(input_ids=input_ids, attention_mask=masks).last_hidden_state
        return hidden, hidden[:, : 1 + self.corner_tokens]


def _local(mask: Tensor, positions: Tensor, window: int) -> Tensor:
    """Returns the mask of local attention: positions [L] that are more than `window` apart do not see each other.

    Padding sees itself, because attention to nothing would be NaN.
    """
    distances = (positions[:, None] - positions).abs()
    return (mask & (distances <= window)) | (distances == 0)


def _packed_layer(
    layer: Any,
    hidden: Tensor,
    masks: Mapping[str, Sequence[Tensor]],
    rotations: Mapping[str, Sequence[Tensor]],
    needed: Needed | None = None,
) -> Tensor:
    """Runs a layer of ModernBERT on packed texts.

    Args:
        layer: the module of transformers.
        hidden: [N, H].
        masks: kind of attention → attention mask of each group.
        rotations: kind of attention → cosines and sines of the rotary positions, [N, H / heads] each.
        needed: the tokens to compute; None: all.

    Returns:
        [N, H], or [W, H] with `needed`.
    """
    module, kind = layer.attn, layer.attention_type
    query, key, value = module.Wqkv(layer.attn_norm(hidden)).unflatten(-1, (3, -1, module.head_dim)).unbind(1)
    query, key = apply_rotary_pos_emb(query, key, *rotations[kind], unsqueeze_dim=1)  # [N, heads, H / heads]
    dropout = module.attention_dropout if module.training else 0.0
    if needed is not None:  # Wqkv is one product, so the other queries are computed too
        query, hidden = query[needed.indices], hidden[needed.indices]
    attended = attend(query.flatten(1), key.flatten(1), value.flatten(1), masks[kind], key.shape[1], dropout, needed)
    hidden = hidden + module.out_drop(module.Wo(attended))
    return hidden + layer.mlp(layer.mlp_norm(hidden))
