"""SmartCLIP's masks of channels (arXiv 2507.22264): a text is compared with the channels of an image that it describes.

The mask m of a text comes from a small network, whose input are the text's tokens without gradient. The channels with
m ≥ ½ are selected. In the backward pass the selection has the gradient of m (straight-through). The similarity of image
v and text t is the cosine of v's selected channels and t; the objective contrasts it in both directions, as any other.
The release minimises 10 · (L₁ + L₂) + 2 · mean|m|, which is 20 · (InfoNCE + 0.1 · mean|m|).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Bound of the squared norm of an image's selected channels, for texts that select none.
SMALLEST = 1e-6


class MaskNetwork(nn.Module):
    """One transformer block, attention pooling and a sigmoid per channel.

    At the start every mask is the same and selects all channels, so training starts from the plain cosine.

    Args:
        token_width: H, size of a text's tokens.
        width: D, number of channels.
        heads: attention heads of the block.
    """

    def __init__(self, token_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            token_width, heads, 4 * token_width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(token_width)
        self.attention = nn.Linear(token_width, 1)
        self.channels = nn.Linear(token_width, width)
        nn.init.zeros_(self.channels.weight)
        nn.init.ones_(self.channels.bias)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Returns the masks of texts, [B, D], between 0 and 1.

        Args:
            tokens: hidden states, [B, L, H]; no gradient flows to them.
            token_mask: bool, True at a text's tokens, [B, L].
        """
        hidden = self.norm(self.block(tokens.detach(), src_key_padding_mask=~token_mask))
        scores = self.attention(hidden)[..., 0].masked_fill(~token_mask, float("-inf"))
        pooled = torch.einsum("bl,blh->bh", scores.softmax(dim=1), hidden)
        return self.channels(pooled).sigmoid()


def selected(masks: Tensor) -> Tensor:
    """1 where a mask is at least ½, else 0, with the gradient of the mask."""
    return (masks >= 0.5).to(masks) + (masks - masks.detach())


def masked_cosine(images: Tensor, texts: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of texts and the channels of images that each text selects, without a tensor of all masked images.

    Args:
        images: [I, D]; their norm has no effect.
        texts: normalised, [T, D].
        masks: between 0 and 1, [T, D].

    Returns:
        image→text and text→image, [I, T] each: the same tensor twice; 0 for a text that selects no channel.
    """
    selection = selected(masks)
    norms = (images.square() @ selection.square().T).clamp(min=SMALLEST).sqrt()
    similarity = images @ (texts * selection).T / norms
    return similarity, similarity
