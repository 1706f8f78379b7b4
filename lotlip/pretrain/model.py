"""The model in training, which returns the features that the loss compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.text.packing import TextBatch, groups_by_length
from lotlip.objectives.conditioned import ConditionedPooling
from lotlip.objectives.masks import MaskNetwork
from lotlip.pretrain.config import LossConfig
from lotlip.pretrain.word_rows import WordRows


class LotlipForPreTraining(LotlipModel):
    """`LotlipModel` that returns the features which the loss compares (paper, section 3.2).

    It has an image tower only if the tower is trained too. The features of a frozen tower are inputs.

    Attributes:
        word_rows: rows that the table of word embeddings was cut to; None if the table is complete.
        objective: modules that only the training objective needs, by name: `masks` (SmartCLIP), `conditioned` (FLAIR).
            They are not part of the saved model.
    """

    word_rows: WordRows | None = None
    _keys_to_ignore_on_load_unexpected = [r"^image\."]  # noqa: RUF012 (transformers' own type)

    def __init__(self, config: LotlipConfig, image_tower: bool = True) -> None:
        super().__init__(config, image_tower)
        self.objective = nn.ModuleDict()

    def add_objective(self, loss: LossConfig, token_width: int) -> None:
        """Adds the modules that an objective needs, with random weights.

        Args:
            loss: settings of the objective.
            token_width: C, size of the image tower's patches.

        Raises:
            ValueError: the attention heads of the pooling do not divide the features' width.
        """
        text, width = self.config.text_config, self.config.embed_dim
        if loss.masks:
            self.objective["masks"] = MaskNetwork(text.hidden_size, width, text.num_attention_heads)
        if loss.conditioned:
            self.objective["conditioned"] = ConditionedPooling(token_width, width, loss.conditioned.heads)

    def train(self, mode: bool = True) -> LotlipForPreTraining:
        """Sets training mode, except for the image tower, whose running statistics stay fixed: batches may be split.

        A frozen text tower stays in evaluation mode, without dropout.
        """
        super().train(mode)
        if self.image is not None:
            self.image.eval()
        if not any(parameter.requires_grad for parameter in self.text.parameters()):
            self.text.eval()
        return self

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        short_ids: Tensor,
        short_lengths: Tensor,
        long_ids: Tensor | None = None,
        long_lengths: Tensor | None = None,
        patches: Tensor | None = None,
        short_offsets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the inputs of `lotlip.objectives.contrastive.lotlip_loss`, and encodes all texts in one pass.

        Args:
            images: features of a frozen tower, [B, D] or of patches [B, P, D], not normalised; or pixels [B, 3, S, S].
            short_ids: short captions, [B, L].
            short_lengths: [B].
            long_ids: long texts, K consecutive ones per image, [B·K, L'].
            long_lengths: [B·K].
            patches: features of a frozen tower's patches, [B, P, C], for `objective["conditioned"]`.
            short_offsets: number of positions by which the words of short captions are moved, [B]; None: they are not.

        Returns:
            `image_features` [B, D] and `text_features` [B, N, D], N = 1 + K (m + 1): [CLS] of the short caption, then
            [CLS] and corner tokens of each long text. With late interaction `image_features` [B, P, D],
            `text_features` [B, N, L, D], N = 1 + K, and `text_mask` [B, N, L]. With `objective["masks"]` also
            `channel_masks` [B, N, D], with `objective["conditioned"]` `image_tokens` [B, P, D] and `pooling`.
            `logit_scale` [1] and, if the model has a bias, `logit_bias` [1].
        """
        long = None if long_ids is None or long_lengths is None else (long_ids, long_lengths)
        if self.config.similarity == "late-interaction":
            compared = self._tokens(images, (short_ids, short_lengths), long)
        else:
            compared = self._features(images, TextBatch(short_ids, short_lengths, True, short_offsets), long, patches)
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {**compared, "logit_scale": self.scale, **bias}

    def _features(
        self,
        images: Tensor,
        short: TextBatch,
        long: tuple[Tensor, Tensor] | None,
        patches: Tensor | None,
    ) -> dict[str, Any]:
        batches = [short] + ([] if long is None else [TextBatch(*long)])
        further: dict[str, Any] = {}

        def by_image(parts: list[Tensor]) -> Tensor:
            return torch.cat([part.reshape(len(short.ids), -1, part.shape[-1]) for part in parts], dim=1)

        if "masks" in self.objective:
            masked = [self._masked(texts) for texts in batches]
            features, masks = ([part[number] for part in masked] for number in (0, 1))
            further["channel_masks"] = by_image(masks)
        else:
            features = self.text.encode(*batches)
        if self.image is not None:
            hidden = self.image.hidden_states(images.to(self.dtype))
            images, patches = self.image.feature(hidden), self.image.patches(hidden)
        if "conditioned" in self.objective and patches is not None:
            tokens, pooling = self.objective["conditioned"](patches.to(self.dtype))
            further |= {"image_tokens": tokens, "pooling": pooling}
        return {
            "image_features": normalize(images, dim=-1),
            "text_features": normalize(by_image(features), dim=-1),
            **further,
        }

    def _masked(self, texts: TextBatch) -> tuple[Tensor, Tensor]:
        """Features of texts before normalisation and the texts' masks of channels, [B, 1 + m, D] each."""
        groups = groups_by_length(texts.lengths)
        features, masks = [], []
        for rows, longest in groups:
            lengths = texts.lengths[rows]
            hidden, outputs = self.text.hidden_states(texts.ids[rows, :longest], lengths)
            features.append(self.text.features(outputs[:, : 1 if texts.cls_only else None]))
            tokens = torch.arange(longest, device=hidden.device) < lengths[:, None]
            masks.append(self.objective["masks"](hidden, tokens))
        order = torch.cat([rows for rows, _ in groups]).argsort()
        by_text = torch.cat(features)[order]
        return by_text, torch.cat(masks)[order, None].expand_as(by_text)

    def _tokens(
        self, images: Tensor, short: tuple[Tensor, Tensor], long: tuple[Tensor, Tensor] | None
    ) -> dict[str, Any]:
        tokens, mask = self.encode_text_tokens(*short)
        texts, masks = tokens[:, None], mask[:, None]  # [B, 1, L, D], [B, 1, L]
        if long is not None:
            tokens, mask = self.encode_text_tokens(*long)
            long_tokens = tokens.reshape(len(texts), -1, *tokens.shape[1:])  # [B, K, L', D]
            length = max(texts.shape[2], long_tokens.shape[2])
            texts = torch.cat([padded(texts, length), padded(long_tokens, length)], dim=1)
            masks = torch.cat([padded(masks, length), padded(mask.reshape(long_tokens.shape[:3]), length)], dim=1)
        patches = normalize(images, dim=-1) if self.image is None else self.encode_image_patches(images.to(self.dtype))
        return {"image_features": patches, "text_features": texts, "text_mask": masks}


def padded(tensor: Tensor, length: int) -> Tensor:
    """Pads [B, K, L, …] with zeros to [B, K, length, …]."""
    result = tensor.new_zeros(*tensor.shape[:2], length, *tensor.shape[3:])
    result[:, :, : tensor.shape[2]] = tensor
    return result
