"""The dual encoder as a Hugging Face model: an image tower, the text tower and their temperature."""

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
from lotlip.models.packing import Texts
from lotlip.models.text_tower import TextTower
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.objectives.similarity import cosine, late_interaction

if TYPE_CHECKING:
    from lotlip.models.vision.image_tower import ImageTower

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)
# SigLIP's (arXiv 2303.15343, section 3.2): nearly all pairs are negative, and the bias says so from the start.
INITIAL_SIGMOID_SCALE, INITIAL_LOGIT_BIAS = math.log(10), -10.0


@dataclass
class LotlipOutput(ModelOutput):
    """What `LotlipModel` returns, by the names that CLIP models use.

    Attributes:
        loss: of contrasting image i with text i, [1]; None unless it was asked for.
        logits_per_image: scaled similarities, [I, T].
        logits_per_text: the same seen from the texts, [T, I].
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
        config: of the model.
        image_tower: False leaves the image tower out, for training on its stored features.
    """

    config: LotlipConfig
    config_class = LotlipConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers' own type)
    _supports_sdpa = True

    def __init__(self, config: LotlipConfig, image_tower: bool = True) -> None:
        super().__init__(config)
        self.text = TextTower(config.text_config, config.corner_tokens, config.corner_mask, config.embed_dim)
        scale = INITIAL_SIGMOID_SCALE if config.logit_bias else INITIAL_LOGIT_SCALE
        self.logit_scale = nn.Parameter(torch.full((1,), scale))  # DeepSpeed takes no 0-d parameters
        self.logit_bias = nn.Parameter(torch.full((1,), INITIAL_LOGIT_BIAS)) if config.logit_bias else None
        self.image: ImageTower | None = None
        if image_tower:
            from lotlip.models.vision.image_tower import ImageTowerSpec, build_image_tower  # timm takes 2 s to import

            self.image = build_image_tower(ImageTowerSpec.from_json(config.image_config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each tower has initialised its own weights."""

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
        """Normalised features of [CLS] and of each corner token, [B, 1 + m, D] (paper, section 3.2).

        Args:
            input_ids: [B, L], padded at the end.
            lengths: tokens of each text, [B].
            cls_only: only [CLS]'s are wanted, [B, 1, D], which takes less where it sees no corner token.
        """
        return normalize(self.text.encode(Texts(input_ids, lengths, cls_only))[0], dim=-1)

    def encode_text_tokens(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features of every token [B, L, D], and which are no padding [B, L] (FILIP, section 3.1)."""
        features = self.text.features(self.text.hidden_states(input_ids, lengths))
        return normalize(features, dim=-1), torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """The image tower's normalised [CLS] feature, [B, D], from pixels [B, 3, S, S]."""
        return normalize(self.image_tower(pixel_values), dim=-1)

    def encode_image_patches(self, pixel_values: Tensor) -> Tensor:
        """Normalised features of every patch, [B, P, D], from pixels [B, 3, S, S] (FILIP, section 3.1)."""
        tower = self.image_tower
        return normalize(tower.patches(tower.hidden_states(pixel_values)), dim=-1)

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by, [1]: the temperature's inverse, at most 100 as in CLIP (not SigLIP)."""
        return (self.logit_scale if self.config.logit_bias else self.logit_scale.clamp(max=MAX_LOGIT_SCALE)).exp()

    # --- what users of CLIP models call -----------------------------------------------------------------------------

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Texts' features for short and long text alike: those of [CLS] (paper, section 4).

        Args:
            input_ids: [B, L], padded at the end, as `LotlipProcessor` or the saved tokenizer makes them.
            attention_mask: 1 for tokens and 0 for padding, [B, L]; without one, the padding token's id tells.
            kwargs: `return_dict`, as of every model.

        Returns:
            `pooler_output`: normalised, [B, D]; `last_hidden_state`: the encoder's, [B, L, H].

        Raises:
            ValueError: texts are padded anywhere but at the end.
        """
        hidden = self.text.hidden_states(input_ids, self._lengths(input_ids, attention_mask))
        return BaseModelOutputWithPooling(hidden, normalize(self.text.features(hidden[:, 0]), dim=-1))

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pictures' features.

        Args:
            pixel_values: [B, 3, S, S], as `LotlipProcessor` makes them.
            kwargs: `return_dict`, as of every model.

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
        """How well each picture fits each text.

        Args:
            input_ids: [T, L], as in `get_text_features`.
            pixel_values: [I, 3, S, S].
            attention_mask: [T, L].
            return_loss: also the loss of image i belonging to text i; then I = T.
            kwargs: `return_dict`, as of every model.
        """
        lengths = self._lengths(input_ids, attention_mask)
        hidden = self.image_tower.hidden_states(pixel_values)
        images, mask = normalize(self.image_tower.feature(hidden), dim=-1), None
        if self.config.similarity == "late-interaction":
            tokens, mask = self.encode_text_tokens(input_ids, lengths)
            texts = tokens[:, 0]
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
        """The contrastive loss of one text for each image."""
        return lotlip_loss(
            images,
            texts[:, None],
            self.scale,
            logit_bias=self.logit_bias,
            text_mask=None if text_mask is None else text_mask[:, None],
            objective="infonce" if self.logit_bias is None else "siglip",
        )["loss"]

    def _lengths(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Tokens of each text, [B]."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.text_config.pad_token_id
        lengths = attention_mask.sum(dim=1)
        at_the_end = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        if not torch.equal(attention_mask.bool(), at_the_end):
            raise ValueError("texts must be padded at the end; set the tokenizer's padding_side to 'right'")
        return lengths

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Saves configuration, weights and a model card; see `PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            card = Path(save_directory) / "README.md"
            card.write_text(model_card(self.config), encoding="utf-8")
            for weights in card.parent.glob("*.safetensors"):  # written for their owner alone, unlike all the rest
                weights.chmod(card.stat().st_mode)


AutoModel.register(LotlipConfig, LotlipModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(LotlipConfig, LotlipModel, exist_ok=True)
