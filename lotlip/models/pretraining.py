"""The model as training sees it, and what it starts from: random weights, a BERT-family model, another LoTLIP model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lotlip.config import Pretrain, Stretch
from lotlip.config import TextTower as TextTowerSettings
from lotlip.data.tokenizer import TextTokenizer
from lotlip.files import read_json
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.text_tower import first_position, position_table

POSITIONS = "text.transformer.embeddings.position_embeddings.weight"


class LotlipForPreTraining(LotlipModel):
    """`LotlipModel` with the features that the loss compares (paper, section 3.2).

    It has an image tower only where that is trained too; a frozen one stays outside, and its features come in.
    """

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
        """What `lotlip.losses.lotlip_loss` takes. Short and long texts are encoded apart, each padded to its longest.

        Args:
            images: a frozen tower's features, [B, D] or of patches [B, P, D], of any length; or pixels [B, 3, S, S].
            raw_ids: raw captions, [B, L].
            raw_lengths: [B].
            long_ids: the images' long texts, K of each in a row, [B·K, L'].
            long_lengths: [B·K].

        Returns:
            `image_features` [B, D] and `text_features` [B, N, D], N = 1 + K (m + 1): [CLS] of the raw caption, then
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
        texts = self.encode_text(*raw)[:, :1]  # [B, 1, D]
        if long is not None:
            of_long = self.encode_text(*long)  # [B·K, 1 + m, D]
            texts = torch.cat([texts, of_long.reshape(len(texts), -1, texts.shape[-1])], dim=1)
        found = normalize(images, dim=-1) if self.image is None else self.encode_image(images.to(self.dtype))
        return {"image_features": found, "text_features": texts}

    def _tokens(self, images: Tensor, raw: tuple[Tensor, Tensor], long: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        tokens, mask = self.encode_text_tokens(*raw)
        texts, masks = tokens[:, None], mask[:, None]  # [B, 1, L, D], [B, 1, L]
        if long is not None:
            tokens, mask = self.encode_text_tokens(*long)
            of_long = tokens.reshape(len(texts), -1, *tokens.shape[1:])  # [B, K, L', D]
            length = max(texts.shape[2], of_long.shape[2])
            texts = torch.cat([_padded(texts, length), _padded(of_long, length)], dim=1)
            masks = torch.cat([_padded(masks, length), _padded(mask.reshape(of_long.shape[:3]), length)], dim=1)
        found = normalize(images, dim=-1) if self.image is None else self.encode_image_patches(images.to(self.dtype))
        return {"image_features": found, "text_features": texts, "text_mask": masks}


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[B, K, L, …] → [B, K, length, …], zeros at the end."""
    wider = tensor.new_zeros(*tensor.shape[:2], length, *tensor.shape[3:])
    wider[:, :, : tensor.shape[2]] = tensor
    return wider


# --- where training starts ----------------------------------------------------------------------------------------


def build_for_pretraining(config: Pretrain, image_tower: Path) -> LotlipForPreTraining:
    """A new model to train: its text tower from random or pretrained weights, corner and register tokens added.

    Args:
        config: section of params.yaml.
        image_tower: folder of the image tower, whose width is that of the shared space. Its weights come in only where
            they are trained.

    Raises:
        ValueError: tokenizer and encoder do not fit, the context length exceeds the encoder's positions, or a
            pretrained LoTLIP model is of another width.
    """
    text = config.text
    tokenizer = TextTokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)
    encoder, earlier = _start(text, tokenizer)
    _fit_vocabulary(encoder, text, tokenizer, earlier)
    weights = {f"text.transformer.{name}": value for name, value in encoder.state_dict().items()}
    if text.stretch:
        table = position_table(encoder)
        if table is None:
            raise ValueError(
                f"text.pretrained {text.pretrained} has no learned positions to stretch; take out text.stretch"
            )
        stretched = stretch_positions(table.weight.detach(), text.stretch, first_position(table))
        weights[POSITIONS] = stretched
        encoder.config.max_position_embeddings = len(stretched)
    model = LotlipForPreTraining(
        LotlipConfig(
            text_config=encoder.config.to_dict(),
            image_config=read_json(image_tower / "config.json"),
            embed_dim=_width(image_tower),
            context_length=text.context_length,
            corner_tokens=text.corner_tokens,
            corner_mask=text.corner_mask,
            register_tokens=text.register_tokens,
            similarity=config.similarity,
            logit_bias=config.loss.contrast == "sigmoid",
        ),
        image_tower=not config.image_tower.frozen,
    )
    if text.context_length > model.text.positions:
        raise ValueError(
            f"text.context_length {text.context_length} exceeds the encoder's {model.text.positions} positions"
        )
    if earlier is not None:
        weights |= _other_weights(earlier, model, text)
    if not config.image_tower.frozen:
        tower = load_file(image_tower / "model.safetensors")
        weights |= {f"image.{name}": value for name, value in tower.items()}
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def _start(text: TextTowerSettings, tokenizer: TextTokenizer) -> tuple[PreTrainedModel, LotlipForPreTraining | None]:
    """The encoder to start from and, where it comes from one, the LoTLIP model."""
    if not text.pretrained:
        kind = {"model_type": "bert", "pad_token_id": tokenizer.pad_id, **text.config}
        config = AutoConfig.for_model(**{**kind, "vocab_size": tokenizer.vocabulary_size})
        return AutoModel.from_config(config), None
    try:
        config = AutoConfig.from_pretrained(text.pretrained, **text.config)
    except OSError as error:
        raise ValueError(
            f"text.pretrained {text.pretrained} is neither a folder with a model nor one that the hub has: {error}; "
            "train it first, or mend the name"
        ) from error
    if isinstance(config, LotlipConfig):
        earlier = LotlipForPreTraining.from_pretrained(text.pretrained, image_tower=False, dtype=torch.float32)
        return earlier.text.transformer, earlier
    return AutoModel.from_pretrained(text.pretrained, config=config, dtype=torch.float32), None


def _fit_vocabulary(
    encoder: PreTrainedModel,
    text: TextTowerSettings,
    tokenizer: TextTokenizer,
    earlier: LotlipForPreTraining | None,
) -> None:
    """A row for every word piece, then one for each corner and register token, each drawn from N(0, initializer_range).

    Rows of an earlier model's corner and register tokens stay where it had as many.
    """
    words, extra = tokenizer.vocabulary_size, text.corner_tokens + text.register_tokens
    had = encoder.config.vocab_size
    numbers = (text.corner_tokens, text.register_tokens)
    if earlier is not None:
        if (earlier.config.corner_tokens, earlier.config.register_tokens) == numbers and had == words + extra:
            return
        had -= earlier.config.corner_tokens + earlier.config.register_tokens
    if had < words or encoder.config.pad_token_id != tokenizer.pad_id:
        raise ValueError(
            f"text.pretrained {text.pretrained} has {had} word pieces and pads with {encoder.config.pad_token_id}, but "
            f"text.tokenizer {text.tokenizer} has {words} and pads with {tokenizer.pad_id}; name that model's own "
            "tokenizer"
        )
    encoder.resize_token_embeddings(words, mean_resizing=False)  # some tables are padded to a rounder number
    table = encoder.resize_token_embeddings(words + extra, mean_resizing=False)
    nn.init.normal_(table.weight.data[words:], std=encoder.config.initializer_range)


def stretch_positions(table: Tensor, stretch: Stretch, first: int = 0) -> Tensor:
    """Long-CLIP's longer context from trained positions (arXiv 2403.15378, section 3.1).

    The first `keep` stay; each of the others becomes `factor` positions on the straight line to the next, and the last
    one goes on in the direction that led to it, as in its release.

    Args:
        table: position embeddings, [P, H].
        stretch: how many were trained, stay, and become of each.
        first: rows before the first position's, which stay.

    Returns:
        [first + stretch.stretched, H]

    Raises:
        ValueError: the table has fewer positions than were trained.
    """
    trained = table[first : first + stretch.positions]
    if len(trained) < stretch.positions:
        raise ValueError(
            f"text.stretch.positions is {stretch.positions}, but text.pretrained has {len(table) - first} positions"
        )
    others = trained[stretch.keep :]
    steps = torch.diff(trained, dim=0)  # towards the next position, [positions − 1, H]
    onward = torch.cat([steps[stretch.keep :], steps[-1:]])
    share = torch.arange(stretch.factor, dtype=table.dtype)[:, None] / stretch.factor
    between = others[:, None] + share * onward[:, None]  # [positions − keep, factor, H]
    return torch.cat([table[: first + stretch.keep], between.flatten(0, 1)])


def _other_weights(
    earlier: LotlipForPreTraining, model: LotlipForPreTraining, text: TextTowerSettings
) -> dict[str, Tensor]:
    """Projection, pooler and temperature of an earlier model; the temperature only where the contrast is the same."""
    if earlier.config.embed_dim != model.config.embed_dim:
        raise ValueError(
            f"text.pretrained {text.pretrained} matches images by features of width {earlier.config.embed_dim}, but "
            f"the image tower's are {model.config.embed_dim} wide; train it with the same image tower"
        )
    same = earlier.config.logit_bias == model.config.logit_bias
    return {
        name: value
        for name, value in earlier.state_dict().items()
        if not name.startswith("text.transformer.") and (same or not name.startswith("logit_"))
    }


def _width(image_tower: Path) -> int:
    """D, from the weights on disk: building the tower would import timm, which takes 2 s."""
    with safe_open(image_tower / "model.safetensors", framework="pt") as weights:
        return weights.get_slice("trunk.cls_token").get_shape()[-1]
