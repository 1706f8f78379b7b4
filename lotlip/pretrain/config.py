"""The stage that trains: texts, images, loss, optimizer, launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lotlip.core.section import Commit, Count, Name, NonNegative, Positive, Section, Share, flatten
from lotlip.data.text import Window


class PositionInterpolation(Section):
    """Long-CLIP's longer context: trained positions are stretched, the best trained ones kept as they are.

    arXiv 2403.15378, section 3.1; the defaults are its 77 → 248 positions.
    """

    positions: Annotated[int, Field(ge=2)] = Field(77, description="that were trained, of the pretrained text tower")
    keep: NonNegative = Field(20, description="first positions that stay as they are")
    factor: Count = Field(4, description="new positions for each of the others")

    @property
    def interpolated(self) -> int:
        """How many positions there are afterwards."""
        return self.keep + (self.positions - self.keep) * self.factor

    @model_validator(mode="after")
    def _some_left_to_stretch(self) -> PositionInterpolation:
        if self.keep >= self.positions:
            raise ValueError(f"keep {self.keep} leaves none of {self.positions} positions to stretch; set it lower")
        return self


# Model types of transformers that can be the text tower: their attention takes a mask for each pair of tokens.
TEXT_MODELS = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "nomic_bert", "lotlip",
)  # fmt: skip

# Options of transformers' from_pretrained. Beside fields of a configuration they would say what is loaded, from where,
# and whether the code that comes with it is run.
LOADING_OPTIONS = frozenset(
    [
        "adapter_kwargs",
        "attn_implementation",
        "auto_map",
        "cache_dir",
        "code_revision",
        "config",
        "config_class",
        "custom_pipeline",
        "device_map",
        "device_mesh",
        "distributed_config",
        "dtype",
        "experts_implementation",
        "force_download",
        "from_flax",
        "from_tf",
        "gguf_file",
        "ignore_mismatched_sizes",
        "key_mapping",
        "load_in_4bit",
        "load_in_8bit",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "mirror",
        "model_kwargs",
        "name_or_path",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "output_loading_info",
        "pretrained_model_name_or_path",
        "proxies",
        "quantization_config",
        "resume_download",
        "return_unused_kwargs",
        "revision",
        "state_dict",
        "subfolder",
        "token",
        "torch_dtype",
        "tp_plan",
        "tp_size",
        "trust_remote_code",
        "use_auth_token",
        "use_kernels",
        "use_safetensors",
        "variant",
        "weights_only",
    ]
)


def loading_options(config: Any, under: str = "") -> list[str]:
    """Keys of a nested configuration that are `LOADING_OPTIONS`, or private, as dotted names."""
    if isinstance(config, list):
        return [name for item in config for name in loading_options(item, under)]
    if not isinstance(config, dict):
        return []
    own = [f"{under}{key}" for key in config if str(key) in LOADING_OPTIONS or str(key).startswith("_")]
    return own + [name for key, value in config.items() for name in loading_options(value, f"{under}{key}.")]


class TextTowerConfig(Section):
    """The BERT-family text encoder and its corner tokens (paper, section 3.2)."""

    tokenizer: str = Field(
        "bert-base-uncased", description="of a BERT-family model: bert-base-uncased, a tokenizer.json or its folder"
    )
    pretrained: str | None = Field(
        None,
        description="folder or hub name of a BERT-family model, folder of a LoTLIP model, or of an ablation with a "
        "model for each seed; without one, `config`",
    )
    revision: Commit | None = Field(
        None, description="the hub's commit of `pretrained`; without one, whatever the hub has; none for a folder"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="of transformers' BertConfig; what is not named is BERT-base's"
    )
    context_length: Annotated[int, Field(ge=8, le=512)] = Field(
        128, description="the most tokens that are read of a text, in training and in evaluation"
    )
    corner_tokens: Annotated[int, Field(ge=0, le=16)] = Field(2, description="m")
    corner_mask: bool = Field(True, description="corner tokens and [CLS] see words only, not one another (section 3.2)")
    register_tokens: Annotated[int, Field(ge=0, le=16)] = Field(
        0, description="learned tokens that are masked as words are and get no loss (Table 7)"
    )
    position_interpolation: PositionInterpolation | None = Field(
        None, description="Long-CLIP: stretch the positions of `pretrained`"
    )

    @field_validator("config")
    @classmethod
    def _fields_only(cls, config: dict[str, Any]) -> dict[str, Any]:
        if options := loading_options(config):
            raise ValueError(
                f"{', '.join(options)}: options of from_pretrained, not fields of a text encoder's configuration; "
                "remove them"
            )
        return config

    @field_validator("pretrained")
    @classmethod
    def _a_text_model(cls, pretrained: str | None) -> str | None:
        """A folder that is there must be of a text model; a missing one may be trained first, or be a name."""
        file = Path(pretrained or "", "config.json")
        if pretrained and Path(pretrained).is_file():
            raise ValueError("is a file; name a folder with config.json and model.safetensors")
        if pretrained and file.is_file():
            try:
                kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{file} is damaged ({error}); restore it") from error
            if kind not in TEXT_MODELS:
                raise ValueError(
                    f"is a model of type {kind!r}, which cannot be the text tower; supported are "
                    f"{', '.join(TEXT_MODELS)}"
                )
        return pretrained

    @model_validator(mode="after")
    def _fits(self) -> TextTowerConfig:
        extra = self.corner_tokens + self.register_tokens
        if extra + 4 > self.context_length:
            raise ValueError(f"context_length {self.context_length} has no room for {extra} extra tokens and words")
        if self.revision and not self.pretrained:
            raise ValueError("revision is a commit of the hub's model; name the model in pretrained, or take it out")
        if self.revision and Path(self.pretrained or "").is_dir():
            raise ValueError(f"pretrained {self.pretrained} is a folder, which has no commits; take out revision")
        if self.position_interpolation and not self.pretrained:
            raise ValueError("position_interpolation needs trained positions; name the text tower in pretrained")
        if self.position_interpolation and self.position_interpolation.interpolated < self.context_length:
            raise ValueError(
                f"position_interpolation gives {self.position_interpolation.interpolated} positions, fewer than "
                f"context_length {self.context_length}; raise position_interpolation.factor or lower context_length"
            )
        return self


class AugmentationConfig(Section):
    """A random piece of each picture, resized to the tower's size, as CLIP's training has it."""

    scale: tuple[Share, Share] = Field((0.9, 1.0), description="share of the picture's area that the piece has")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="of its width to its height")

    @model_validator(mode="after")
    def _ranges(self) -> AugmentationConfig:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} {[low, high]} is no range; give the lower number, above 0, first")
        return self


class ImageTowerTraining(Section):
    """What training does with the image tower: LiT locks it (section 3.1), CLIP and its kin train it too."""

    frozen: bool = Field(True, description="false: the image tower is trained as well, from where its stage left it")
    features: Literal["stored", "computed"] = Field(
        "stored",
        description="a frozen tower's features: from the shards (where they hold them), or from pixels each step",
    )
    augmentation: AugmentationConfig | None = Field(
        None, description="of pictures that a step reads; without it, pictures are prepared as in evaluation"
    )

    @model_validator(mode="after")
    def _pictures_to_augment(self) -> ImageTowerTraining:
        if self.augmentation and self.frozen and self.features == "stored":
            raise ValueError("augmentation changes pictures, and stored features have none; set features to computed")
        return self


class LongTextsConfig(Section):
    """What is drawn from the long captions at each step."""

    per_image: Count = Field(1, description="K: long texts drawn for an image")
    sub_captions: NonNegative = Field(
        3, description="k: consecutive sub-captions in a long text; 0: short captions only"
    )
    captioners: list[Name] = Field(default_factory=list, description="whose captions to draw from; none named: all")
    window: Window = Field(
        "within-caption",
        description="whether the sub-captions of a long text may come from several captions of an image",
    )


class LoaderConfig(Section):
    """Which samples an epoch has."""

    epochs: Literal["exact", "resampled"] = Field(
        "exact", description="each sample once an epoch, or each drawn at random, with `weights`"
    )
    samples_per_epoch: Count | None = Field(None, description="of a resampled epoch; without it, as many as there are")
    weights: dict[str, Positive] = Field(
        default_factory=dict,
        description="resampled: beginning of a sample's key → how often it is drawn; others count 1",
    )

    @model_validator(mode="after")
    def _resampling(self) -> LoaderConfig:
        given = [name for name in ("samples_per_epoch", "weights") if getattr(self, name)]
        if given and self.epochs == "exact":
            raise ValueError(f"{' and '.join(given)} need epochs: resampled; an exact epoch has each sample once")
        return self


class LossConfig(Section):
    """How texts and images of a batch are contrasted, and what each kind of text counts."""

    objective: Literal["infonce", "siglip"] = Field(
        "infonce", description="symmetric InfoNCE as CLIP and the paper have it, or SigLIP's pairs (arXiv 2303.15343)"
    )
    short_loss_fraction: Share | None = Field(
        None,
        description="of the loss that the short caption's feature has, the others sharing the rest; without it each of "
        "the N features has 1/N, so that the short caption counts the less the more of them there are",
    )
    short_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="the released code's `clip_lossweight`")
    long_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="its `declip_lossweight`")
    image_components: NonNegative = Field(
        0,
        description="Long-CLIP: the short caption is held against so many principal components of the image features "
        "(32 there; arXiv 2403.15378, section 3.2); 0: against the whole feature",
    )


class OptimizerConfig(Section):
    """AdamW with warm-up and cosine decay; defaults are the released code's."""

    learning_rate: Positive = Field(5e-4, description="highest learning rate, after warm-up")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="AdamW's decay rates of the moments")
    eps: Positive = Field(1e-6, description="AdamW's constant against division by zero")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.2, description="AdamW's weight decay")
    warmup_steps: NonNegative = Field(50, description="steps in which the learning rate rises from 0")
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(0.0, description="largest norm; 0: off")


class PretrainConfig(Section):
    """Contrastive training of the text tower, with long texts and corner tokens (paper, section 3)."""

    seeds: Annotated[list[int], Field(min_length=1)] = Field([0], description="a model is trained for each")
    steps: Count = Field(500, description="optimizer steps")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="over all processes and micro-batches")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="number format of the computation")
    text: TextTowerConfig = TextTowerConfig()
    long_texts: LongTextsConfig = LongTextsConfig()
    loader: LoaderConfig = LoaderConfig()
    image_tower: ImageTowerTraining = ImageTowerTraining()
    similarity: Literal["cosine", "late-interaction"] = Field(
        "cosine", description="of one feature each, or token by token as in FILIP (arXiv 2111.07783)"
    )
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def from_pixels(self) -> bool:
        """Whether a step needs pictures: stored features are of a frozen tower, and one for each image."""
        late = self.similarity == "late-interaction"
        return late or not self.image_tower.frozen or self.image_tower.features == "computed"

    def recipe(self) -> dict[str, Any]:
        """All settings that decide the model of a seed."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key != "seeds"}

    def effective(self) -> dict[str, Any]:
        """Dotted key → value of every setting that has an effect beside the others: equal for runs that mean the same.

        The mask has none without corner tokens, and settings of long texts have none without long texts.
        """
        settings = flatten(self.model_dump(mode="json"))
        if not self.text.corner_tokens:
            settings.pop("text.corner_mask")
        if not self.long_texts.sub_captions:
            kept = {key: value for key, value in settings.items() if not key.startswith("long_texts.")}
            settings = {**kept, "long_texts.sub_captions": 0}
            del settings["loss.long_loss_weight"], settings["loss.short_loss_fraction"]
        return settings

    @model_validator(mode="after")
    def _possible(self) -> PretrainConfig:
        if self.similarity == "late-interaction":
            if self.text.corner_tokens:
                raise ValueError(
                    "similarity late-interaction compares words, not corner tokens; set text.corner_tokens to 0"
                )
            if self.loss.image_components:
                raise ValueError(
                    "loss.image_components needs one feature for each image, which late-interaction does not have; "
                    "set it to 0"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} names one twice")
        return self
