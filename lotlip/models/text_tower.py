"""The text tower: a BERT-family encoder whose corner tokens each read the text on their own (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lotlip.models.corner_mask import corner_attention_mask
from lotlip.models.packing import Texts, bert_layer, pack

# Families whose layers are BERT's, so that texts can be packed; others take them padded.
PACKED = ("bert", "roberta", "xlm-roberta", "camembert")


class TextTower(nn.Module):
    """Encoder, pooler and projection; one feature from [CLS] and one from each corner token (paper, section 3.2).

    Register tokens (Table 7) need nothing here: they are vocabulary rows that the tokenizer puts after the corner
    tokens, the mask treats them as words, and their features are not read.

    Args:
        config: of the BERT-family encoder; `vocab_size` counts the rows of corner and register tokens.
        corner_tokens: m.
        corner_mask: whether [CLS] and corner tokens are kept from seeing one another.
        embed_dim: D, the width of the space that both towers share.

    Raises:
        ValueError: the encoder's attention does not take a mask for each pair of tokens.
    """

    def __init__(self, config: PretrainedConfig, corner_tokens: int, corner_mask: bool, embed_dim: int) -> None:
        super().__init__()
        self.corner_tokens = corner_tokens
        self.corner_mask = corner_mask
        self.transformer = _encoder(config)
        own = getattr(self.transformer, "pooler", None) is None  # DistilBERT and ELECTRA come without one
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if own else None
        self.proj = nn.Linear(config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=config.hidden_size**-0.5)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Features before normalisation: [CLS]'s first, then each corner token's in order.

        Args:
            input_ids: [B, L], padded at the end.
            lengths: tokens of each text, [B].

        Returns:
            [B, 1 + m, D]
        """
        return self.encode(Texts(input_ids, lengths))[0]

    def encode(self, *batches: Texts) -> list[Tensor]:
        """Features before normalisation of several batches of texts, in one pass where the encoder can.

        Returns:
            of each batch [B, 1 + m, D], or [B, 1, D] where only [CLS]'s are wanted.
        """
        if self.transformer.config.model_type in PACKED:
            hidden = self._packed_hidden_states(batches)
        else:
            hidden = [
                self.hidden_states(ids, lengths)[:, : 1 if cls_only else 1 + self.corner_tokens]
                for ids, lengths, cls_only in batches
            ]
        return [self.features(wanted) for wanted in hidden]

    def _packed_hidden_states(self, batches: Sequence[Texts]) -> list[Tensor]:
        """Of each batch the hidden states [B, 1 + m, H] or [B, 1, H] that features are made from.

        The last layer is computed at those tokens alone: what it makes of words is read by nothing.
        """
        row = pack(batches, self.corner_tokens, self.corner_mask)
        encoder: Any = self.transformer
        positions = row.positions + first_position(encoder.embeddings.position_embeddings)
        ids = row.ids[None]
        hidden = encoder.embeddings(ids, torch.zeros_like(ids), positions[None])[0]  # [N, H]
        *layers, last = encoder.encoder.layer
        for layer in layers:
            hidden = bert_layer(layer, hidden, row.masks)
        shapes = [wanted.shape for wanted in row.wanted]
        hidden = bert_layer(last, hidden, row.masks, torch.cat([wanted.flatten() for wanted in row.wanted]))
        parts = hidden.split([shape.numel() for shape in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """The encoder's last hidden states, [B, L, H], of texts [B, L] that have `lengths` [B] tokens."""
        mask = corner_attention_mask(lengths, input_ids.shape[1], self.corner_tokens, self.corner_mask)
        mask = mask.expand(-1, -1, input_ids.shape[1], -1)  # [B, 1, L, L]
        return self.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def features(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] → features [..., D]: BERT's pooler, the same for each token, then the projection."""
        pooler: Any = self.pooler or self.transformer.pooler
        dense = pooler if isinstance(pooler, nn.Linear) else pooler.dense
        return self.proj(torch.tanh(dense(hidden)))

    @property
    def positions(self) -> int:
        """Tokens that the longest text may have."""
        table = position_table(self.transformer)
        if table is None:
            return self.transformer.config.max_position_embeddings
        return table.num_embeddings - first_position(table)


def _encoder(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel  # which knows LotlipModel, and so imports this module

    try:
        # the only attention that takes the boolean [B, 1, L, L] mask as it is
        return AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"a {config.model_type} model cannot be the text tower: {error}; take one whose attention takes a mask for "
            "each pair of tokens, such as bert, roberta, xlm-roberta, electra, distilbert or albert"
        ) from error


def position_table(encoder: PreTrainedModel) -> nn.Embedding | None:
    """The encoder's learned absolute positions, [P, H]; None where positions are something else, such as rotations."""
    embeddings: Any = encoder.embeddings
    table = getattr(embeddings, "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None


def first_position(table: nn.Embedding) -> int:
    """The row of a text's first token: RoBERTa and its kin leave the rows up to the padding's unused."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
