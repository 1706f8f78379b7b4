"""The model as training sees it: the features that the loss compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.models.lotlip import LotlipModel
from lotlip.models.packing import TextBatch
from lotlip.pretrain.word_rows import WordRows


class LotlipForPreTraining(LotlipModel):
    """`LotlipModel` with the features that the loss compares (paper, section 3.2).

    It has an image tower only where that is trained too; a frozen one stays outside, and its features come in.

    Attributes:
        word_rows: what the table of word embeddings was cut to, with its token ids; None where it is whole.
    """

    word_rows: WordRows | None = None
    _keys_to_ignore_on_load_unexpected = [r"^image\."]  # noqa: RUF012 (transformers' own type)

    def train(self, mode: bool = True) -> LotlipForPreTraining:
        """As of every module, but an image tower keeps its running statistics, so that a batch may be split."""
        super().train(mode)
        if self.image is not None:
            self.image.eval()
        return self

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        raw_ids: Tensor,
        raw_lengths: Tensor,
        long_ids: Tensor | None = None,
        long_lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `lotlip.objectives.contrastive.lotlip_loss` takes. Short and long texts are encoded in one pass.

        Args:
            images: a frozen tower's features, [B, D] or of patches [B, P, D], of any length; or pixels [B, 3, S, S].
            raw_ids: short captions, [B, L].
            raw_lengths: [B].
            long_ids: the images' long texts, K of each in a row, [B·K, L'].
            long_lengths: [B·K].

        Returns:
            `image_features` [B, D] and `text_features` [B, N, D], N = 1 + K (m + 1): [CLS] of the short caption, then
            [CLS] and corner tokens of each long text. With late interaction `image_features` [B, P, D],
            `text_features` [B, N, L, D], N = 1 + K, and `text_mask` [B, N, L]. `logit_scale` [1] and, where there is
            one, `logit_bias` [1].
        """
        long = None if long_ids is None or long_lengths is None else (long_ids, long_lengths)
        if self.config.similarity == "late-interaction":
            compared = self._tokens(images, (raw_ids, raw_lengths), long)
        else:
            compared = self._features(images, (raw_ids, raw_lengths), long)
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {**compared, "logit_scale": self.scale, **bias}

    def _features(
        self, images: Tensor, raw: tuple[Tensor, Tensor], long: tuple[Tensor, Tensor] | None
    ) -> dict[str, Any]:
        batches = [TextBatch(*raw, cls_only=True)] + ([] if long is None else [TextBatch(*long)])
        features = [found.reshape(len(raw[0]), -1, found.shape[-1]) for found in self.text.encode(*batches)]
        texts = normalize(torch.cat(features, dim=1), dim=-1)
        found = normalize(images, dim=-1) if self.image is None else self.encode_image(images.to(self.dtype))
        return {"image_features": found, "text_features": texts}

    def _tokens(self, images: Tensor, raw: tuple[Tensor, Tensor], long: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        tokens, mask = self.encode_text_tokens(*raw)
        texts, masks = tokens[:, None], mask[:, None]  # [B, 1, L, D], [B, 1, L]
        if long is not None:
            tokens, mask = self.encode_text_tokens(*long)
            of_long = tokens.reshape(len(texts), -1, *tokens.shape[1:])  # [B, K, L', D]
            length = max(texts.shape[2], of_long.shape[2])
            texts = torch.cat([padded(texts, length), padded(of_long, length)], dim=1)
            masks = torch.cat([padded(masks, length), padded(mask.reshape(of_long.shape[:3]), length)], dim=1)
        found = normalize(images, dim=-1) if self.image is None else self.encode_image_patches(images.to(self.dtype))
        return {"image_features": found, "text_features": texts, "text_mask": masks}


def padded(tensor: Tensor, length: int) -> Tensor:
    """[B, K, L, …] → [B, K, length, …], zeros at the end."""
    wider = tensor.new_zeros(*tensor.shape[:2], length, *tensor.shape[3:])
    wider[:, :, : tensor.shape[2]] = tensor
    return wider
