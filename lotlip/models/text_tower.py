"""The text tower: a BERT-family encoder whose corner tokens read the text independently (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lotlip.models.corner_mask import corner_attention_mask
from lotlip.models.packing import TextBatch, bert_layer, pack

# Families that use BERT's layers, so that texts can be packed. For other families texts are padded.
PACKED = ("bert", "roberta", "xlm-roberta", "camembert")


class TextTower(nn.Module):
    """Encoder, pooler and projection: one feature for [CLS] and one for each corner token (paper, section 3.2).

    Register tokens (Table 7) need no code here: the tokenizer inserts them after the corner tokens, the mask treats
    them as words, and their features are not used.

    Args:
        config: the BERT-family encoder's; `vocab_size` includes the corner and register tokens.
        corner_tokens: m.
        corner_mask: whether [CLS] and corner tokens are masked from one another.
        embed_dim: D, the width of the shared space.

    Raises:
        ValueError: the encoder's attention does not support a mask for each pair of tokens.
    """

    def __init__(self, config: PretrainedConfig, corner_tokens: int, corner_mask: bool, embed_dim: int) -> None:
        super().__init__()
        self.corner_tokens = corner_tokens
        self.corner_mask = corner_mask
        self.transformer = _encoder(config)
        has_pooler = getattr(self.transformer, "pooler", None) is not None  # DistilBERT and ELECTRA have none
        self.pooler = None if has_pooler else nn.Linear(config.hidden_size, config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=config.hidden_size**-0.5)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns features before normalisation: that of [CLS], then those of the corner tokens in order.

        Args:
            input_ids: [B, L], padded at the end.
            lengths: number of tokens of each text, [B].

        Returns:
            [B, 1 + m, D]
        """
        return self.encode(TextBatch(input_ids, lengths))[0]

    def encode(self, *batches: TextBatch) -> list[Tensor]:
        """Returns features of several batches of texts, before normalisation, in one pass if the encoder supports it.

        Returns:
            for each batch [B, 1 + m, D], or [B, 1, D] if it is `cls_only`.
        """
        if self.transformer.config.model_type in PACKED:
            hidden = self._packed_hidden_states(batches)
        else:
            hidden = [
                self.hidden_states(ids, lengths)[:, : 1 if cls_only else 1 + self.corner_tokens]
                for ids, lengths, cls_only in batches
            ]
        return [self.features(states) for states in hidden]

    def _packed_hidden_states(self, batches: Sequence[TextBatch]) -> list[Tensor]:
        """Returns for each batch the last hidden states [B, 1 + m, H] or [B, 1, H] of the tokens that have features.

        The last layer is computed for those tokens only, because its outputs for words are not used.
        """
        packed = pack(batches, self.corner_tokens, self.corner_mask)
        encoder: Any = self.transformer
        positions = packed.positions + first_position(encoder.embeddings.position_embeddings)
        ids = packed.ids[None]
        hidden = encoder.embeddings(ids, torch.zeros_like(ids), positions[None])[0]  # [N, H]
        *layers, last = encoder.encoder.layer
        for layer in layers:
            hidden = bert_layer(layer, hidden, packed.masks)
        shapes = [indices.shape for indices in packed.outputs]
        hidden = bert_layer(last, hidden, packed.masks, torch.cat([indices.flatten() for indices in packed.outputs]))
        parts = hidden.split([shape.numel() for shape in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the encoder's last hidden states, [B, L, H], of texts [B, L] with `lengths` [B] tokens."""
        mask = corner_attention_mask(lengths, input_ids.shape[1], self.corner_tokens, self.corner_mask)
        mask = mask.expand(-1, -1, input_ids.shape[1], -1)  # [B, 1, L, L]
        return self.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def features(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [..., H] to features [..., D]: the pooler, shared by all tokens, then the projection."""
        pooler: Any = self.pooler or self.transformer.pooler
        dense = pooler if isinstance(pooler, nn.Linear) else pooler.dense
        return self.proj(torch.tanh(dense(hidden)))

    @property
    def positions(self) -> int:
        """Maximum number of tokens in a text."""
        table = position_table(self.transformer)
        if table is None:
            return self.transformer.config.max_position_embeddings
        return table.num_embeddings - first_position(table)


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


def position_table(encoder: PreTrainedModel) -> nn.Embedding | None:
    """Returns the table of learned absolute positions, [P, H]; None for other encodings, such as rotary positions."""
    embeddings: Any = encoder.embeddings
    table = getattr(embeddings, "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None


def first_position(table: nn.Embedding) -> int:
    """Returns the row of a text's first token: RoBERTa-like models do not use the rows up to the padding token's."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
