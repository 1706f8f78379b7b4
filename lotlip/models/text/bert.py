"""Text towers of the BERT family: `[CLS] [Cor 1] … [Cor m] words` (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.masks import corner_attention_mask
from lotlip.models.text.packing import Arranged, Needed, PackedTexts, TextBatch, attend, pack, unpack
from lotlip.models.text.text_tower import TextTower, position_table

# Families that use BERT's layers, so that texts can be packed. For other families texts are padded.
PACKED = ("bert", "roberta", "xlm-roberta", "camembert")


class BertTower(TextTower):
    """Encoder, pooler and projection. The pooler is shared by [CLS] and the corner tokens, as in the released code.

    The tokenizer inserts register tokens after the corner tokens.

    Raises:
        ValueError: the encoder's attention does not support a mask for each pair of tokens.
    """

    def __init__(self, config: LotlipConfig) -> None:
        super().__init__(_encoder(config.text_config), config)
        width = config.text_config.hidden_size
        has_pooler = getattr(self.transformer, "pooler", None) is not None  # DistilBERT and ELECTRA have none
        self.pooler = None if has_pooler else nn.Linear(width, width)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def encode(self, *batches: TextBatch) -> list[Tensor]:
        if not self.packs:
            return super().encode(*batches)
        packed = pack([self._trimmed(texts) for texts in batches], self._arrange, 1 + self.corner_tokens)
        return [self.features(hidden) for hidden in unpack(self._packed_hidden_states(packed), packed.outputs)]

    @property
    def packs(self) -> bool:
        return self.transformer.config.model_type in PACKED

    def _dropped(self, cls_only: bool) -> int:
        """Returns how many corner tokens are left out: if the mask is on, neither [CLS] nor words attend to them."""
        return self.corner_tokens if cls_only and self.corner_mask else 0

    def _trimmed(self, texts: TextBatch) -> TextBatch:
        dropped = self._dropped(texts.cls_only)
        if not dropped:
            return texts
        ids = torch.cat([texts.ids[:, :1], texts.ids[:, 1 + dropped :]], dim=1)
        return TextBatch(ids, texts.lengths - dropped, True, texts.offsets)

    def _arrange(self, ids: Tensor, lengths: Tensor, cls_only: bool) -> Arranged:
        """See `Arrange`. Tokens after corner tokens that were left out keep their positions."""
        (number, length), dropped = ids.shape, self._dropped(cls_only)
        positions = torch.arange(length, device=ids.device)
        positions = torch.where(positions > 0, positions + dropped, positions)
        mask = corner_attention_mask(lengths, length, self.corner_tokens - dropped, self.corner_mask)
        outputs = torch.arange(1 if cls_only else 1 + self.corner_tokens, device=ids.device)
        return Arranged(
            ids,
            positions.expand(number, -1),
            mask.expand(-1, -1, length, -1),
            outputs.expand(number, -1),
        )

    def _packed_hidden_states(self, packed: PackedTexts) -> Tensor:
        """Returns the last hidden states of the tokens that have features, [W, H].

        The last layer is computed for those tokens only, because its outputs for words are not used.
        """
        encoder: Any = self.transformer
        positions = packed.positions + first_position(encoder.embeddings.position_embeddings)
        ids = packed.ids[None]
        hidden = encoder.embeddings(ids, torch.zeros_like(ids), positions[None])[0]  # [N, H]
        *layers, last = encoder.encoder.layer
        for layer in layers:
            hidden = self.run_layer(_packed_layer, layer, hidden, packed.masks)
        return self.run_layer(_packed_layer, last, hidden, packed.masks, packed.needed)

    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = corner_attention_mask(lengths, input_ids.shape[1], self.corner_tokens, self.corner_mask)
        mask = mask.expand(-1, -1, input_ids.shape[1], -1)  # [B, 1, L, L]
        hidden = self.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden, hidden[:, : 1 + self.corner_tokens]

    def features(self, hidden: Tensor) -> Tensor:
        pooler: Any = self.pooler or self.transformer.pooler
        dense = pooler if isinstance(pooler, nn.Linear) else pooler.dense
        return self.proj(torch.tanh(dense(hidden)))

    @property
    def first_word(self) -> int:
        return 1 + self.corner_tokens + self.register_tokens

    @property
    def positions(self) -> int:
        found = position_table(self.transformer)
        if found is None:
            return self.transformer.config.max_position_embeddings
        return found[1].num_embeddings - first_position(found[1])


def _packed_layer(layer: Any, hidden: Tensor, masks: Sequence[Tensor], needed: Needed | None = None) -> Tensor:
    """Runs a BERT layer on packed texts.

    Args:
        layer: the module of transformers.
        hidden: [N, H].
        masks: attention mask of each group.
        needed: the tokens to compute; None: all.

    Returns:
        [N, H], or [W, H] with `needed`.
    """
    module = layer.attention.self
    dropout = module.dropout.p if module.training else 0.0
    key, value = module.key(hidden), module.value(hidden)
    if needed is not None:
        hidden = hidden[needed.indices]
    attended = attend(module.query(hidden), key, value, masks, module.num_attention_heads, dropout, needed)
    return layer.feed_forward_chunk(layer.attention.output(attended, hidden))


def _encoder(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel  # it imports LotlipModel, and so this module

    try:
        # the only implementation that accepts a boolean [B, 1, L, L] mask
        return AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"a {config.model_type} model cannot be the text tower: {error}; choose one whose attention supports a "
            "mask for each pair of tokens, such as bert, roberta, xlm-roberta, electra, distilbert or albert"
        ) from error


def first_position(table: nn.Embedding) -> int:
    """Returns the row of a text's first token: RoBERTa-like models do not use the rows up to the padding token's."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
