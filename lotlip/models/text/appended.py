"""What the text towers of CLIP and SigLIP share: the summary token is the last one, and corner tokens follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.masks import appended_attention_mask
from lotlip.models.text.packing import Arranged, Needed, TextBatch, attend, pack, unpack
from lotlip.models.text.text_tower import TextTower


class AppendedTower(TextTower):
    """A tower that appends corner and register tokens to the text by itself, so that the tokenizer is the model's own.

    They have the position of the summary token, so neither that of a word nor the maximum number of words depends on m.

    Attributes:
        causal: whether tokens attend to earlier ones only.
    """

    causal: ClassVar[bool]

    def __init__(self, transformer: PreTrainedModel, config: LotlipConfig) -> None:
        super().__init__(transformer, config)
        width = config.text_config.hidden_size
        self.proj = nn.Linear(width, config.embed_dim, bias=not self.causal)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def encode(self, *batches: TextBatch) -> list[Tensor]:
        packed = pack([self._completed(texts) for texts in batches], self._arrange)
        encoder: Any = self.transformer
        hidden = self._embed(packed.ids, packed.positions)
        *layers, last = encoder.encoder.layers
        for layer in layers:
            hidden = self.run_layer(_packed_layer, layer, hidden, packed.masks)
        # the last layer's outputs for words are not used
        hidden = self.run_layer(_packed_layer, last, hidden, packed.masks, packed.needed)
        return [self.features(part) for part in unpack(encoder.final_layer_norm(hidden), packed.outputs)]

    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        encoder: Any = self.transformer
        ids, lengths, *_ = self._completed(TextBatch(input_ids, lengths))
        texts = self._arrange(ids, lengths, False)
        # `is_causal` concerns masks of two dimensions
        hidden = encoder.encoder(self._embed(texts.ids, texts.positions), texts.mask, is_causal=False).last_hidden_state
        hidden = encoder.final_layer_norm(hidden)
        index = texts.outputs[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden[:, : input_ids.shape[1]], hidden.gather(1, index)

    def features(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)

    def _completed(self, texts: TextBatch) -> TextBatch:
        """Returns texts as the encoder was trained to read them.

        Raises:
            ValueError: they are too long.
        """
        self.check_length(texts.ids.shape[1], self.positions)
        return texts

    @staticmethod
    def check_length(length: int, limit: int) -> None:
        """Raises ValueError if texts are longer than the limit."""
        if length > limit:
            raise ValueError(f"texts have {length} tokens, but the model's context length is {limit}; truncate them")

    def _arrange(self, ids: Tensor, lengths: Tensor, cls_only: bool) -> Arranged:
        """See `lotlip.models.text.packing.Arrange`. Corner tokens that no needed token reads are left out."""
        number, length = ids.shape
        corners = 0 if cls_only and (self.causal or self.corner_mask) else self.corner_tokens
        rows = self.transformer.config.vocab_size
        extra = torch.arange(rows - self.register_tokens - corners, rows, device=ids.device)  # `corners` is 0 or m
        end = lengths[:, None] - 1
        appended = length + torch.arange(0 if cls_only else corners, device=ids.device)
        return Arranged(
            torch.cat([ids, extra.expand(number, -1)], dim=1),
            torch.cat([torch.arange(length, device=ids.device).expand(number, -1), end.expand(-1, len(extra))], dim=1),
            appended_attention_mask(lengths, length, corners, self.register_tokens, self.corner_mask, self.causal),
            torch.cat([end, appended.expand(number, -1)], dim=1),
        )

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        embeddings: Any = self.transformer.embeddings
        return embeddings.token_embedding(ids) + embeddings.position_embedding(positions)

    @property
    def packs(self) -> bool:
        return True

    @property
    def first_word(self) -> int:
        return 1 if self.causal else 0  # SigLIP has no start token

    @property
    def positions(self) -> int:
        embeddings: Any = self.transformer.embeddings
        return embeddings.position_embedding.num_embeddings


def _packed_layer(layer: Any, hidden: Tensor, masks: Sequence[Tensor], needed: Needed | None = None) -> Tensor:
    """Runs a layer of CLIP or SigLIP on packed texts.

    Args:
        layer: the module of transformers.
        hidden: [N, H].
        masks: attention mask of each group.
        needed: the tokens to compute; None: all.

    Returns:
        [N, H], or [W, H] with `needed`.
    """
    module = layer.self_attn
    dropout = module.dropout if module.training else 0.0
    normalised = layer.layer_norm1(hidden)
    key, value = module.k_proj(normalised), module.v_proj(normalised)
    if needed is not None:
        hidden, normalised = hidden[needed.indices], normalised[needed.indices]
    attended = attend(module.q_proj(normalised), key, value, masks, module.num_heads, dropout, needed)
    hidden = hidden + module.out_proj(attended)
    return hidden + layer.mlp(layer.layer_norm2(hidden))
