"""The dual encoder as a Hugging Face model: the image tower, the text tower and the temperature."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForZeroShotImageClassification, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from lotlip.models.card import model_card
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.packing import TextBatch
from lotlip.models.text.text_tower import build_text_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.objectives.similarity import cosine, late_interaction

if TYPE_CHECKING:
    from lotlip.models.vision.image_tower import ImageTower

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
# From SigLIP (arXiv 2303.15343, section 3.2): nearly all pairs are negative, and the initial bias reflects that.
INITIAL_SIGMOID_SCALE, INITIAL_LOGIT_BIAS = math.log(10), -10.0


@dataclass
class LotlipOutput(ModelOutput):
    """Output of `LotlipModel`, with the field names of CLIP models.

    Attributes:
        loss: contrastive loss in which image i matches text i, [1]; None unless `return_loss` is set.
        logits_per_image: scaled similarities, [I, T].
        logits_per_text: scaled similarities from text to image, [T, I].
        text_embeds: normalised [CLS] features, [T, D].
        image_embeds: normalised features, [I, D].
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class LotlipModel(PreTrainedModel):
    """LoTLIP's two towers (paper, section 3).

    Args:
        config: configuration of the model.
        image_tower: False builds the model without the image tower, to train on its stored features.
    """

    config: LotlipConfig
    config_class = LotlipConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers' own type)
    _supports_sdpa = True

    def __init__(self, config: LotlipConfig, image_tower: bool = True) -> None:
        super().__init__(config)
        self.text = build_text_tower(config)
        scale = INITIAL_SIGMOID_SCALE if config.logit_bias else INITIAL_LOGIT_SCALE
        self.logit_scale = nn.Parameter(torch.full((1,), scale))  # DeepSpeed does not support 0-d parameters
        self.logit_bias = nn.Parameter(torch.full((1,), INITIAL_LOGIT_BIAS)) if config.logit_bias else None
        self.image: ImageTower | None = None
        if image_tower:
            from lotlip.models.vision.image_tower import build_image_tower  # timm takes 2 s to import

            self.image = build_image_tower(ImageTowerSpec.from_json(config.image_config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: each tower initialises its own weights."""

    @property
    def image_tower(self) -> ImageTower:
        """The image tower.

        Raises:
            ValueError: the model was built without it.
        """
        if self.image is None:
            raise ValueError("this model was built without its image tower; load it with image_tower=True")
        return self.image

    # --- features -------------------------------------------------------------------------------------------------

    def encode_text(self, input_ids: Tensor, lengths: Tensor, cls_only: bool = False) -> Tensor:
        """Returns normalised features of texts and of their corner tokens, [B, 1 + m, D] (paper, section 3.2).

        Args:
            input_ids: [B, L], padded at the end.
            lengths: number of tokens of each text, [B].
            cls_only: return the features of texts only, [B, 1, D]; this is faster if [CLS] sees no corner token.
        """
        return normalize(self.text.encode(TextBatch(input_ids, lengths, cls_only))[0], dim=-1)

    def encode_text_tokens(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns normalised features of all tokens [B, L, D] and the padding mask [B, L] (FILIP, section 3.1)."""
        features = self.text.features(self.text.hidden_states(input_ids, lengths)[0])
        return normalize(features, dim=-1), _token_mask(input_ids, lengths)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Returns the image tower's normalised [CLS] features, [B, D], from pixels [B, 3, S, S]."""
        return normalize(self.image_tower(pixel_values), dim=-1)

    def encode_image_patches(self, pixel_values: Tensor) -> Tensor:
        """Returns normalised features of all patches, [B, P, D], from pixels [B, 3, S, S] (FILIP, section 3.1)."""
        tower = self.image_tower
        return normalize(tower.patches(tower.hidden_states(pixel_values)), dim=-1)

    @property
    def scale(self) -> Tensor:
        """Inverse temperature that multiplies similarities, [1]; the temperature has a minimum, except for SigLIP."""
        return self.log_scale.exp()

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of `scale`, [1]."""
        minimum = self.config.min_temperature
        if self.config.logit_bias or minimum is None:
            return self.logit_scale
        return self.logit_scale.clamp(max=-math.log(minimum))

    # --- the interface of transformers' CLIP models -----------------------------------------------------------------

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns the features of short or long texts (paper, section 4).

        Args:
            input_ids: [B, L], padded at the end, from `LotlipProcessor` or the saved tokenizer.
            attention_mask: 1 for tokens and 0 for padding, [B, L]; None: derived from the ids.
            kwargs: `return_dict`, as for every model of transformers.

        Returns:
            `pooler_output`: normalised, [B, D]; `last_hidden_state`: the encoder's, [B, L, H].

        Raises:
            ValueError: texts are not padded at the end.
        """
        hidden, outputs = self.text.hidden_states(input_ids, self._lengths(input_ids, attention_mask))
        return BaseModelOutputWithPooling(hidden, normalize(self.text.features(outputs[:, 0]), dim=-1))

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Returns the features of images.

        Args:
            pixel_values: [B, 3, S, S], from `LotlipProcessor`.
            kwargs: `return_dict`, as for every model of transformers.

        Returns:
            `pooler_output`: normalised, [B, D]; `last_hidden_state`: the image tower's, [B, T, D].
        """
        hidden = self.image_tower.hidden_states(pixel_values)
        return BaseModelOutputWithPooling(hidden, normalize(self.image_tower.feature(hidden), dim=-1))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> LotlipOutput:
        """Scores every image against every text.

        Args:
            input_ids: [T, L], as in `get_text_features`.
            pixel_values: [I, 3, S, S].
            attention_mask: [T, L].
            return_loss: also return the contrastive loss in which image i matches text i; requires I = T.
            kwargs: `return_dict`, as for every model of transformers.
        """
        lengths = self._lengths(input_ids, attention_mask)
        hidden = self.image_tower.hidden_states(pixel_values)
        images, mask = normalize(self.image_tower.feature(hidden), dim=-1), None
        if self.config.similarity == "late-interaction":
            tokens, texts = (
                normalize(self.text.features(part), dim=-1) for part in self.text.hidden_states(input_ids, lengths)
            )
            texts, mask = texts[:, 0], _token_mask(input_ids, lengths)
            compared = normalize(self.image_tower.patches(hidden), dim=-1), tokens
            similarities = late_interaction(*compared, mask)
        else:
            texts = self.encode_text(input_ids, lengths)[:, 0]
            compared = images, texts
            similarities = cosine(*compared)
        bias = 0 if self.logit_bias is None else self.logit_bias
        per_image, per_text = (self.scale * similarity + bias for similarity in similarities)
        loss = self._loss(*compared, mask) if return_loss else None
        return LotlipOutput(loss, per_image, per_text.T, texts, images)

    def _loss(self, images: Tensor, texts: Tensor, text_mask: Tensor | None) -> Tensor:
        """Returns the contrastive loss with one text per image."""
        return lotlip_loss(
            images,
            texts[:, None],
            self.scale,
            logit_bias=self.logit_bias,
            text_mask=None if text_mask is None else text_mask[:, None],
            objective="infonce" if self.logit_bias is None else "siglip",
        )["loss"]

    def _lengths(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns the number of tokens of each text, [B]."""
        if attention_mask is None:
            attention_mask = self.text.attention_mask(input_ids)
        lengths = attention_mask.sum(dim=1)
        if not torch.equal(attention_mask.bool(), _token_mask(input_ids, lengths)):
            raise ValueError("texts must be padded at the end; set the tokenizer's padding_side to 'right'")
        return lengths

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Saves configuration, weights and a model card; see `PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            card = Path(save_directory) / "README.md"
            card.write_text(model_card(self.config), encoding="utf-8")
            for weights in card.parent.glob(
                "*.safetensors"
            ):  # created readable by their owner only, unlike the other files
                weights.chmod(card.stat().st_mode)


def _token_mask(input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Returns which ids [B, L] are tokens of texts with `lengths` [B] tokens, not padding, [B, L]."""
    return torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]


AutoModel.register(LotlipConfig, LotlipModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(LotlipConfig, LotlipModel, exist_ok=True)
