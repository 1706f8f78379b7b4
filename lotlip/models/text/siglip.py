"""Text towers of SigLIP and SigLIP 2: `words [END] [PAD] … [PAD] [Cor 1] … [Cor m]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import SiglipTextModel

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.appended import AppendedTower
from lotlip.models.text.packing import TextBatch


class SiglipTower(AppendedTower):
    """SigLIP's bidirectional encoder (arXiv 2303.15343). The summary token is the last position of the context.

    SigLIP was trained without an attention mask on texts padded to the context length. This module pads them, so the
    tokenizer need not do so. If the mask is on, nothing reads a corner token but itself, so the text's own feature does
    not depend on m. For the same reason corner tokens come after the padding: among it, they would replace padding that
    the summary token reads.
    """

    causal = False
    moves_words = False  # the padding is read too, so there are no free positions

    def __init__(self, config: LotlipConfig) -> None:
        transformer: Any = SiglipTextModel._from_config(config.text_config, attn_implementation="sdpa")
        transformer.head = nn.Identity()  # `proj` replaces it, as the shared space may have another width
        super().__init__(transformer, config)
        self.context_length = config.context_length

    def _completed(self, texts: TextBatch) -> TextBatch:
        ids, lengths, cls_only, _ = texts
        padding, length = self.transformer.config.pad_token_id, ids.shape[1]
        self.check_length(length, self.context_length)
        is_padding = torch.arange(length, device=ids.device) >= lengths[:, None]
        ids = pad(ids.masked_fill(is_padding, padding), (0, self.context_length - length), value=padding)
        return TextBatch(ids, torch.full_like(lengths, self.context_length), cls_only)
