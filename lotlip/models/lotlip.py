"""The dual encoder in Hugging Face layout: a frozen image tower, the text tower and their temperature."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lotlip.config import TextTower as TextTowerConfig
from lotlip.data.tokenizer import TextTokenizer
from lotlip.files import read_json
from lotlip.models.text_tower import TextTower, add_corner_rows

if TYPE_CHECKING:
    from lotlip.models.image_tower import ImageTower

transformers_logging.disable_progress_bar()  # a bar for each file of a few MB says nothing

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class LotlipConfig(PretrainedConfig):
    """What is needed to build the model and to prepare its input.

    Args:
        text_config: the BERT-family encoder's config; its `vocab_size` counts the corner tokens.
        image_config: the image tower's `ImageTowerSpec`, as JSON.
        embed_dim: D, the width of the shared space: the image tower's.
        context_length: most tokens in a text.
        corner_tokens: m.
        corner_mask: whether [CLS] and the corner tokens are kept apart.
    """

    model_type = "lotlip"

    def __init__(
        self,
        text_config: dict[str, Any] | None = None,
        image_config: dict[str, Any] | None = None,
        embed_dim: int = 768,
        context_length: int = 128,
        corner_tokens: int = 2,
        corner_mask: bool = True,
        **kwargs: Any,
    ) -> None:
        self.text_config = text_config or {"model_type": "bert", "vocab_size": 30522 + corner_tokens}
        self.image_config = image_config or {}
        self.embed_dim = embed_dim
        self.context_length = context_length
        self.corner_tokens = corner_tokens
        self.corner_mask = corner_mask
        super().__init__(**kwargs)


class LotlipModel(PreTrainedModel):
    """LoTLIP's two towers.

    Args:
        config: of the model.
        image_tower: False leaves the image tower out, for training on its stored features.
    """

    config: LotlipConfig
    config_class = LotlipConfig
    base_model_prefix = ""

    def __init__(self, config: LotlipConfig, image_tower: bool = True) -> None:
        super().__init__(config)
        text_config = dict(config.text_config)
        encoder = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
        self.text = TextTower(encoder, config.corner_tokens, config.corner_mask, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOGIT_SCALE))  # DeepSpeed takes no 0-d parameters
        self.image: ImageTower | None = None
        if image_tower:
            from lotlip.models.image_tower import ImageTowerSpec, build_image_tower  # timm takes 2 s to import

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

    def encode_text(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Normalised features of [CLS] and of each corner token, [B, 1 + m, D] (paper, section 3.2)."""
        return normalize(self.text(input_ids, lengths), dim=-1)

    def get_text_features(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """What evaluation uses: [CLS]'s normalised feature, [B, D]."""
        return self.encode_text(input_ids, lengths)[:, 0]

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The image tower's normalised [CLS] feature, [B, D], from pixels [B, 3, H, W]."""
        return normalize(self.image_tower(pixel_values), dim=-1)

    def forward(
        self, raw_ids: Tensor, raw_lengths: Tensor, long_ids: Tensor | None = None, long_lengths: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The text features that training uses (paper, section 3.2).

        Short and long texts are encoded apart, since each is padded to its own longest.

        Args:
            raw_ids: raw captions, [B, L].
            raw_lengths: [B].
            long_ids: the images' long texts, K of each in a row, [B·K, L'].
            long_lengths: [B·K].

        Returns:
            `text_features` [B, N, D], N = 1 + K (m + 1): [CLS] of the raw caption, then [CLS] and corner tokens of each
            long text; `logit_scale` [1], the temperature's inverse, clamped at 100.
        """
        raw = self.encode_text(raw_ids, raw_lengths)[:, :1]
        features = raw
        if long_ids is not None and long_lengths is not None:
            long = self.encode_text(long_ids, long_lengths)  # [B·K, 1 + m, D]
            features = torch.cat([raw, long.reshape(raw.shape[0], -1, raw.shape[-1])], dim=1)
        return {"text_features": features, "logit_scale": self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()}


def build_trainable(text: TextTowerConfig, image_tower: Path) -> LotlipModel:
    """A new model to train, without its image tower: text tower from params.yaml, random or pretrained.

    Args:
        text: section of params.yaml.
        image_tower: folder of the frozen tower, whose width is that of the shared space.

    Raises:
        ValueError: tokenizer and encoder do not fit, or the context length exceeds the encoder's positions.
    """
    tokenizer = TextTokenizer(text.tokenizer, text.context_length, text.corner_tokens)
    if text.pretrained:
        encoder = AutoModel.from_pretrained(text.pretrained, dtype=torch.float32, **text.config)
        if encoder.config.vocab_size != tokenizer.vocabulary_size:
            raise ValueError(
                f"text.pretrained {text.pretrained} has {encoder.config.vocab_size} word pieces, but text.tokenizer "
                f"{text.tokenizer} has {tokenizer.vocabulary_size}; name that model's own tokenizer"
            )
        add_corner_rows(encoder, text.corner_tokens)
        text_config = encoder.config.to_dict()
    else:
        encoder = None
        size = {"vocab_size": tokenizer.vocabulary_size + text.corner_tokens}
        text_config = AutoConfig.for_model("bert", **text.config, **size).to_dict()
    positions = text_config["max_position_embeddings"]
    if text.context_length > positions:
        raise ValueError(f"text.context_length {text.context_length} exceeds the encoder's {positions} positions")
    config = LotlipConfig(
        text_config=text_config,
        image_config=read_json(image_tower / "config.json"),
        embed_dim=_width(image_tower),
        context_length=text.context_length,
        corner_tokens=text.corner_tokens,
        corner_mask=text.corner_mask,
    )
    model = LotlipModel(config, image_tower=False)
    if encoder is not None:
        model.text.transformer.load_state_dict(encoder.state_dict())
    return model


def _width(image_tower: Path) -> int:
    """D, from the weights on disk: building the tower would import timm, which takes 2 s."""
    with safe_open(image_tower / "model.safetensors", framework="pt") as weights:
        return weights.get_slice("trunk.cls_token").get_shape()[-1]


def save_model(
    model: LotlipModel, weights: dict[str, Tensor], tokenizer: TextTokenizer, image_tower: Path, folder: Path
) -> None:
    """Writes the whole model in Hugging Face layout: the trained text tower and the frozen image tower beside it.

    Args:
        model: whose config to write.
        weights: as trained; the image tower's are not among them.
        tokenizer: written along, so that the folder needs nothing else.
        image_tower: folder of the frozen tower, as `save_image_tower` left it.
        folder: where to write.
    """
    frozen = load_file(image_tower / "model.safetensors")
    image = {f"image.{name}": weight for name, weight in frozen.items()}
    # the trained module may be rounded to bf16, and its config would tell readers to round the weights, too
    LotlipModel(model.config, image_tower=False).save_pretrained(folder, state_dict={**weights, **image})
    tokenizer.save(folder)


def load_model(folder: Path) -> tuple[LotlipModel, TextTokenizer]:
    """A saved model, ready to evaluate, and its tokenizer.

    Raises:
        ValueError: the folder has no model, or weights are missing in it or left over.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model: config.json is not there")
    loaded: Any = LotlipModel.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"{folder} does not hold this model's weights: {wrong}")
    config = model.config
    return model.eval(), TextTokenizer(str(folder), config.context_length, config.corner_tokens)
