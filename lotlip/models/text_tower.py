"""The text tower: a BERT-family encoder whose corner tokens each read the text on their own (paper, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Texts of a batch are encoded in this many groups of like length, so that few positions are padding: of the demo's long
# texts half were.
LENGTH_GROUPS = 4


def corner_attention_mask(lengths: Tensor, length: int, corner_tokens: int, separate: bool = True) -> Tensor:
    """Which token sees which, from the texts' lengths alone (paper, section 3.2 and Fig. 3).

    The tokens are `[CLS] [Cor 1] … [Cor m] words [PAD]…`. [CLS] and the corner tokens see the words and themselves but
    never one another, so that each gathers the text apart; words never see a corner token; no one sees padding.

    Args:
        lengths: tokens of each text, padding not counted, [B].
        length: tokens of a row, padding counted: L.
        corner_tokens: m.
        separate: False gives the plain padding mask (the "mask off" ablation).

    Returns:
        bool, True where the query (row) sees the key (column): [B, 1, L, L], or [B, 1, 1, L] where all queries see the
        same. In the form that scaled-dot-product attention takes.
    """
    position = torch.arange(length, device=lengths.device)
    real = (position < lengths[:, None])[:, None, None, :]  # [B, 1, 1, L]
    if not (separate and corner_tokens):
        return real
    query, key = position[:, None], position[None, :]
    corner_query, corner_key = _is_corner(query, corner_tokens), _is_corner(key, corner_tokens)
    seen = torch.where(corner_key, query == key, ~(corner_query & (key == 0)))  # [L, L]
    return seen & real


def _is_corner(position: Tensor, corner_tokens: int) -> Tensor:
    return (position >= 1) & (position <= corner_tokens)


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
        order = lengths.argsort(stable=True)
        groups = order.tensor_split(min(LENGTH_GROUPS, len(order)))
        features = [self._heads(input_ids[group, : int(lengths[group[-1]])], lengths[group]) for group in groups]
        return torch.cat(features)[order.argsort()]

    def _heads(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.features(self.hidden_states(input_ids, lengths)[:, : 1 + self.corner_tokens])

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
        return AutoModel.from_config(config, attn_implementation="sdpa")
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
