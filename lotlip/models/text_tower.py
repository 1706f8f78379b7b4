"""The text tower: a BERT-family encoder whose corner tokens each read the text on their own (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

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
    """Encoder, pooler and projection; one feature from [CLS] and one from each corner token.

    Args:
        config: of the BERT-family encoder; `vocab_size` counts the corner tokens' rows.
        corner_tokens: m.
        corner_mask: whether [CLS] and corner tokens are kept from seeing one another.
        embed_dim: D, the width of the space that both towers share.
    """

    def __init__(self, config: PretrainedConfig, corner_tokens: int, corner_mask: bool, embed_dim: int) -> None:
        super().__init__()
        self.corner_tokens = corner_tokens
        self.corner_mask = corner_mask
        # the only attention that takes the boolean [B, 1, L, L] mask as it is
        self.transformer = AutoModel.from_config(config, attn_implementation="sdpa")
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
        features = [self._encode(input_ids[group, : int(lengths[group[-1]])], lengths[group]) for group in groups]
        return torch.cat(features)[order.argsort()]

    def _encode(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Features of texts that are padded to the longest of them."""
        mask = corner_attention_mask(lengths, input_ids.shape[1], self.corner_tokens, self.corner_mask)
        if mask.shape[2] == 1:
            mask = mask.expand(-1, -1, input_ids.shape[1], -1)
        hidden = self.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state  # [B, L, H]
        heads = hidden[:, : 1 + self.corner_tokens]
        pooled = self.transformer.pooler.activation(self.transformer.pooler.dense(heads))  # the same for each token
        return self.proj(pooled)


def add_corner_rows(encoder: PreTrainedModel, corner_tokens: int) -> None:
    """Appends m rows to a pretrained encoder's vocabulary, each drawn from N(0, initializer_range) (section 3.2)."""
    words = encoder.config.vocab_size
    table = encoder.resize_token_embeddings(words + corner_tokens, mean_resizing=False)
    nn.init.normal_(table.weight.data[words:], std=encoder.config.initializer_range)
