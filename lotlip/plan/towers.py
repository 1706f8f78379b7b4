"""Both towers of an ablation on the meta device, where tensors have shapes but no data, and their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.image_tower.config import ImageTowerConfig as ImageTowerSettings
from lotlip.image_tower.config import StartTowerConfig
from lotlip.image_tower.towers import SPECIFICATIONS, tower_spec
from lotlip.models.configuration import LotlipConfig
from lotlip.models.vision.image_tower import ImageTower, build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.config import TextTowerConfig as TextTowerSettings
from lotlip.pretrain.initialisation import WHOLE_MODELS, text_config
from lotlip.pretrain.model import LotlipForPreTraining


@dataclass(frozen=True)
class Towers:
    """Both towers on the meta device.

    Attributes:
        model: the module that DeepSpeed wraps; its image tower is None if frozen.
        image: the image tower, frozen or not.
    """

    model: LotlipForPreTraining
    image: ImageTower

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def build_towers(
    config: PretrainConfig, image: ImageTowerSettings, assumed: list[str] | None = None, start: str | None = None
) -> Towers:
    """Builds both towers on the meta device.

    Args:
        config: training settings of the ablation.
        image: section `image_tower` of params.yaml.
        assumed: receives assumptions for unknown sizes.
        start: `pretrain.start`, whose image tower is used if `image` says so.

    Raises:
        ValueError: the sizes of the pretrained text tower are not available locally, or the kind of image tower is
            unknown.
    """
    encoder: PretrainedConfig | None = None
    if isinstance(image, StartTowerConfig) and start:
        from lotlip.importing.start import open_start

        opened = open_start(start, local_files_only=True)
        spec = ImageTowerSpec.from_json(opened.config.image_config)
        if config.start:
            encoder = _extended(opened.config.text_config, opened.tokenizer.vocabulary_size, config.text)
    elif image.kind in SPECIFICATIONS:
        spec = tower_spec(image)
    else:
        raise ValueError(f"`lotlip plan` does not support image towers of kind {image.kind}")
    with torch.device("meta"):
        tower = build_image_tower(spec)
        model = LotlipForPreTraining(
            LotlipConfig(
                text_config=encoder or _encoder_config(config.text, assumed),
                image_config=spec.to_json(),
                embed_dim=tower.width,
                context_length=config.text.context_length,
                corner_tokens=config.text.corner_tokens,
                corner_mask=config.text.corner_mask,
                register_tokens=config.text.register_tokens,
                similarity=config.similarity,
                logit_bias=config.loss.objective == "siglip",
            ),
            image_tower=not config.image_tower.frozen,
        )
        model.add_objective(config.loss, tower.token_width)
    return Towers(model, tower)


def _encoder_config(text: TextTowerSettings, assumed: list[str] | None) -> PretrainedConfig:
    """Returns the encoder's configuration; that of a pretrained one is read from its folder or the hub's cache."""
    tokenizer = open_tokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)
    sizes = {"model_type": "bert", "pad_token_id": tokenizer.pad_id, **text.config}
    model: Any = AutoConfig.for_model(**sizes)
    if text.pretrained:
        try:
            seeds = sorted(Path(text.pretrained).glob("seed-*"))  # an ablation's folder has a model per seed
            name = str(seeds[0]) if seeds else text.pretrained
            model = text_config(name, text.config, text.revision, local_files_only=True)
        except OSError as error:
            if not text.pretrained.endswith("bert-base-uncased"):
                raise ValueError(
                    f"the sizes of text.pretrained {text.pretrained} are not available locally; train it first, "
                    f"download it (`hf download {text.pretrained}`), or give its folder"
                ) from error
            if assumed is not None:
                assumed.append(f"{text.pretrained} has BERT-base's sizes (it is not on this machine)")
    encoder = model.text_config if model.model_type in ("lotlip", *WHOLE_MODELS) else model
    return _extended(encoder, tokenizer.vocabulary_size, text)


def _extended(encoder: PretrainedConfig, words: int, text: TextTowerSettings) -> PretrainedConfig:
    """Returns the configuration of an encoder with corner and register tokens and interpolated positions."""
    encoder.vocab_size = words + text.corner_tokens + text.register_tokens
    if text.position_interpolation:
        encoder.max_position_embeddings = text.position_interpolation.interpolated
    return encoder


def parameters(config: PretrainConfig, towers: Towers) -> tuple[dict[str, int], dict[str, int]]:
    """Counts trained and frozen parameters by component; the trained ones add up to `towers.trained`."""
    text = towers.model.text
    width = text.transformer.config.hidden_size
    extra = (config.text.corner_tokens + config.text.register_tokens) * width
    encoder = sum(value.numel() for value in text.parameters()) - text.proj.weight.numel()
    image = sum(value.numel() for value in towers.image.parameters())
    trained = {
        "text encoder": encoder - extra,
        "corner and register tokens": extra,
        "projection": text.proj.weight.numel(),
        "temperature and bias": 1 + (config.loss.objective == "siglip"),
    }
    if objective := sum(value.numel() for value in towers.model.objective.parameters()):
        trained["modules of the objective"] = objective
    return (trained, {"image tower": image}) if config.image_tower.frozen else ({**trained, "image tower": image}, {})
