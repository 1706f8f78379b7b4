"""Text towers of CLIP: `[SOT] words [EOT] [Cor 1] … [Cor m]`."""

from __future__ import annotations

from torch import Tensor
from transformers import CLIPTextModel

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.appended import AppendedTower


class ClipTower(AppendedTower):
    """CLIP's causal encoder (arXiv 2103.00020). The summary token is the end token, [EOT].

    Corner tokens read all words, and no word reads them, as attention is causal. So for every m, with the mask on or
    off, the text's own feature is CLIP's. Only [EOT] and the corner tokens read register tokens.
    """

    causal = True

    def __init__(self, config: LotlipConfig) -> None:
        super().__init__(CLIPTextModel._from_config(config.text_config, attn_implementation="sdpa"), config)

    def attention_mask(self, input_ids: Tensor) -> Tensor:
        # CLIP pads with [EOT] too, so a text ends at the first one
        if (input_ids[:, 0] == self.transformer.config.eos_token_id).any():
            raise ValueError("a text begins with the end token; pad texts at the end, or give the attention mask")
        is_end = (input_ids == self.transformer.config.eos_token_id).long()
        return is_end.cumsum(dim=1) == is_end
