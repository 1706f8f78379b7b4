"""Settings of the pretrain stage: texts, images, loss and optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lotlip.core.section import Commit, Count, Name, NonNegative, Positive, Precision, Section, Seed, Share, flatten
from lotlip.data.text import Sampler, ShortSampler, Window

Fraction = Annotated[float, Field(gt=0, lt=1)]


def _no_whole_share(value: Any) -> Any:
    if isinstance(value, float) and value >= 1:
        raise ValueError("should be a count (a whole number) or a share below 1")
    return value


# pydantic would take the share 1.0 for the count 1
WholeShare = BeforeValidator(_no_whole_share)
Components = Annotated[NonNegative | Fraction, WholeShare]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class PositionInterpolation(Section):
    """Long-CLIP's longer context: interpolates trained positions, and keeps the first ones, which are trained best.

    arXiv 2403.15378, section 3.1; the defaults are its 77 → 248 positions.
    """

    positions: Annotated[int, Field(ge=2)] = Field(
        77, description="number of trained positions of the pretrained text tower"
    )
    keep: NonNegative = Field(20, description="number of first positions that are not interpolated")
    factor: Count = Field(4, description="number of new positions for each of the others")

    @property
    def interpolated(self) -> int:
        """Number of positions after interpolation."""
        return self.keep + (self.positions - self.keep) * self.factor

    @model_validator(mode="after")
    def _positions_left(self) -> PositionInterpolation:
        if self.keep >= self.positions:
            raise ValueError(f"keep {self.keep} leaves none of {self.positions} positions to interpolate; set it lower")
        return self


# Model types of transformers that can be the text tower: their attention supports a mask for each pair of tokens.
TEXT_MODELS = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "nomic_bert", "modernbert",
    "clip", "clip_text_model", "siglip", "siglip_text_model", "lotlip",
)  # fmt: skip

# Options of transformers' from_pretrained. Among the fields of a configuration they would control what is loaded, from
# where, and whether its code is run.
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
    """Returns the keys of a nested configuration that are private or in `LOADING_OPTIONS`, as dotted names."""
    if isinstance(config, list):
        return [name for item in config for name in loading_options(item, under)]
    if not isinstance(config, dict):
        return []
    options = [f"{under}{key}" for key in config if str(key) in LOADING_OPTIONS or str(key).startswith("_")]
    return options + [name for key, value in config.items() for name in loading_options(value, f"{under}{key}.")]


RAW = "raw"  # in long_texts.captioners: the short caption's own sentences


class TextTowerConfig(Section):
    """The text encoder and its corner tokens (paper, section 3.2)."""

    tokenizer: str = Field(
        "bert-base-uncased",
        description="tokenizer of the text tower: bert-base-uncased, clip, a tokenizer.json or its folder; `start` has "
        "its own",
    )
    pretrained: str | None = Field(
        None,
        description="folder or hub name of a BERT-family, ModernBERT, CLIP or SigLIP model, whose text encoder is "
        "used; folder of a LoTLIP model, or folder of an ablation with a model for each seed; null: a new model, from "
        "`config`",
    )
    revision: Commit | None = Field(
        None, description="commit of `pretrained` on the hub; null: the newest; not allowed for a folder"
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of transformers' BertConfig, or of the configuration of another `model_type`; others have "
        "the defaults of transformers",
    )
    context_length: Annotated[int, Field(ge=8, le=512)] = Field(
        128,
        description="maximum number of tokens of a text, in training and in evaluation; corner and register tokens "
        "count, except with CLIP and SigLIP, where they take no position",
    )
    corner_tokens: Annotated[int, Field(ge=0, le=16)] = Field(2, description="m, the number of corner tokens")
    corner_mask: bool = Field(
        True, description="corner tokens and [CLS] attend to words, not to one another (section 3.2)"
    )
    register_tokens: Annotated[int, Field(ge=0, le=16)] = Field(
        0, description="number of learned tokens that are masked like words and have no loss (Table 7)"
    )
    position_interpolation: PositionInterpolation | None = Field(
        None, description="Long-CLIP: interpolate the positions of `start` or `pretrained`"
    )
    frozen: bool = Field(False, description="true: do not train the text tower")
    frozen_positions: NonNegative = Field(
        0, description="number of first positions whose embeddings are not trained (Long-CLIP: 20)"
    )
    learning_rate: Positive | None = Field(None, description="peak learning rate; null: that of `optimizer`")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay; null: that of `optimizer`"
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
        """Checks that an existing folder has a text model. A missing one may be trained later, or be on the hub."""
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
            raise ValueError(
                "revision is a commit of the hub's model; name the model in pretrained, or remove revision"
            )
        if self.revision and Path(self.pretrained or "").is_dir():
            raise ValueError(f"pretrained {self.pretrained} is a folder, which has no commits; remove revision")
        if self.frozen and extra:
            raise ValueError(
                f"frozen is true, but {extra} corner and register tokens need training; set corner_tokens and "
                "register_tokens to 0, or frozen to false"
            )
        if self.frozen_positions >= self.context_length:
            raise ValueError(
                f"frozen_positions {self.frozen_positions} leaves none of {self.context_length} positions to train; "
                "set it lower"
            )
        if self.position_interpolation and self.position_interpolation.interpolated < self.context_length:
            raise ValueError(
                f"position_interpolation gives {self.position_interpolation.interpolated} positions, fewer than "
                f"context_length {self.context_length}; raise position_interpolation.factor or lower context_length"
            )
        return self


class AugmentationConfig(Section):
    """A random crop of each image, resized to the tower's input size, as in CLIP's training."""

    scale: tuple[Share, Share] = Field((0.9, 1.0), description="area of the crop as a share of the image")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="aspect ratio of the crop, width to height")

    @model_validator(mode="after")
    def _ranges(self) -> AugmentationConfig:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} {[low, high]} is not a valid range; expected 0 < low <= high")
        return self


class ImageTowerTraining(Section):
    """How training uses the image tower: LiT freezes it (section 3.1), CLIP trains it too."""

    frozen: bool = Field(True, description="false: train the image tower too, starting from the weights of its stage")
    from_scratch: bool = Field(
        False, description="true: start from random weights of the same architecture instead, drawn by the seed (ALIGN)"
    )
    features: Literal["stored", "computed"] = Field(
        "stored",
        description="features of a frozen tower: read from the shards, if these store them, or computed in each step",
    )
    augmentation: AugmentationConfig | None = Field(
        None, description="augmentation of the images of a step; null: images are prepared as in evaluation"
    )
    learning_rate: Positive | None = Field(None, description="peak learning rate; null: that of `optimizer`")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay; null: that of `optimizer`"
    )

    @model_validator(mode="after")
    def _images_to_augment(self) -> ImageTowerTraining:
        if self.augmentation and self.frozen and self.features == "stored":
            raise ValueError("augmentation needs images, but the features are stored; set features to computed")
        given = [name for name in ("learning_rate", "weight_decay") if getattr(self, name) is not None]
        if self.frozen and self.from_scratch:
            raise ValueError("from_scratch starts from random weights, which need training; set frozen to false")
        if self.frozen and given:
            raise ValueError(f"{' and '.join(given)} of a frozen image tower have no effect; remove them")
        return self


class LongTextsConfig(Section):
    """How each step samples texts from the long captions."""

    per_image: Count = Field(1, description="K: number of long texts sampled per image")
    sampler: Sampler = Field(
        "window",
        description="which sub-captions of a long caption a text has. window: `sub_captions` consecutive ones; all; "
        "first: the first r, r random; without-first: a random number of those after the first, in random order; "
        "merged: 1 to `sub_captions`, half the time consecutive ones, else any; summary: the first; details: all after "
        "the first; subset: a random number of any, in random order",
    )
    sub_captions: NonNegative = Field(
        3,
        description="k: number of consecutive sub-captions in a long text, with the sampler window; the largest number "
        "of sub-captions, with merged; 0: short captions only, with every sampler",
    )
    captioners: list[Name] = Field(
        default_factory=list,
        description="captioners whose captions are sampled; raw: the sentences of the short caption; empty: all that "
        "describe the images",
    )
    window: Window = Field(
        "within-caption",
        description="whether the sub-captions of a long text may come from several captions of the image, with the "
        "sampler window",
    )


class ShortTextsConfig(Section):
    """The short text of an image in a step: the short caption, or another text in its place."""

    sampler: ShortSampler = Field(
        "raw",
        description="raw: the short caption; raw-or-rewrite: it or one of its rewrites, with equal probability "
        "(LaCLIP). The others take sub-captions of the long caption that the first long text comes from. summary: the "
        "first (Long-CLIP's release); without-first: a random number of those after it, in random order (DeBias-CLIP); "
        "details: all after it; subset: a random number of any, in random order; all; first: the first r, r random",
    )
    rewriters: list[Name] = Field(
        default_factory=list, description="raw-or-rewrite: captioners whose rewrites are drawn; empty: all that rewrite"
    )
    random_offset: bool = Field(
        False,
        description="move the positions of the short text's words by a random number, as far as the context length "
        "allows; the summary and corner tokens keep theirs (DeBias-CLIP)",
    )

    @model_validator(mode="after")
    def _rewriters_drawn(self) -> ShortTextsConfig:
        if self.rewriters and self.sampler != "raw-or-rewrite":
            raise ValueError(f"rewriters have no effect with sampler {self.sampler}; remove them")
        return self


class LoaderConfig(Section):
    """Which samples an epoch contains."""

    epochs: Literal["exact", "resampled"] = Field(
        "exact", description="exact: each sample once per epoch; resampled: random draws, with `weights`"
    )
    samples_per_epoch: Count | None = Field(None, description="size of a resampled epoch; null: that of the data set")
    weights: dict[str, Positive] = Field(
        default_factory=dict,
        description="resampled: prefix of sample keys → relative frequency; other samples have 1",
    )

    @model_validator(mode="after")
    def _resampling(self) -> LoaderConfig:
        given = [name for name in ("samples_per_epoch", "weights") if getattr(self, name)]
        if given and self.epochs == "exact":
            raise ValueError(
                f"{' and '.join(given)} need epochs: resampled, because an exact epoch has each sample once"
            )
        return self


class MaskConfig(Section):
    """SmartCLIP: a text is compared with the channels of an image that a network selects (arXiv 2507.22264).

    The network is needed in training only, and is not part of the saved model.
    """

    penalty: Annotated[float, Field(ge=0)] = Field(
        0.1, description="weight of the mean mask beside infonce (2 beside 10 (L₁ + L₂), 20 times infonce, there)"
    )
    learning_rate: Positive = Field(1e-3, description="peak learning rate of the mask network")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay of the mask network")


class ConditionedConfig(Section):
    """FLAIR: image features that a text pools from the patches are compared too (arXiv 2412.03561)."""

    weight: Share = Field(0.5, description="weight of this term; the loss of the image's own feature has the rest")
    heads: Count = Field(8, description="attention heads of the pooling")


class LossConfig(Section):
    """The contrastive loss, and the weight of each kind of text in it."""

    objective: Literal["infonce", "siglip"] = Field(
        "infonce",
        description="symmetric InfoNCE, as in CLIP and the paper, or SigLIP's pairwise loss (arXiv 2303.15343)",
    )
    short_loss_fraction: Share | None = Field(
        None,
        description="fraction of the loss that the short caption's feature has; the others share the rest. null: each "
        "of the N features has 1/N, so the short caption counts less with more features",
    )
    short_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="the released code's `clip_lossweight`")
    long_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="its `declip_lossweight`")
    image_components: Components = Field(
        0,
        description="Long-CLIP: number of principal components of the image features that the short caption is "
        "compared with (32 there; arXiv 2403.15378, section 3.2), or share of their variance; 0: the full feature",
    )
    text_components: Components = Field(
        0,
        description="HiMo-CLIP: number of principal components of long texts' features that the image is compared with "
        "as well, or share of their variance (0.9 there; arXiv 2511.06653); 0: the full features only",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="label smoothing of infonce (0.1 in Long-CLIP, HiMo-CLIP and ALIGN)"
    )
    hard_negative_margin: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="adds this times the cosine of a negative text and the image's own text to the negative's "
        "similarity, without gradient (0.5 in arXiv 2608.18521)",
    )
    masks: MaskConfig | None = Field(
        None, description="SmartCLIP: compare a text with the image's channels that it selects; null: with all"
    )
    conditioned: ConditionedConfig | None = Field(
        None,
        description="FLAIR: compare image features that each text pools from the patches too; needs objective: siglip; "
        "null: the image's own feature only",
    )
    initial_bias: float | None = Field(
        None,
        description="bias of siglip at the start; null: the starting model's, else −log(batch_size − 1) (FLAIR: −10)",
    )

    def arguments(self) -> dict[str, Any]:
        """Returns the settings as arguments of `lotlip.objectives.contrastive.lotlip_loss`."""
        settings = self.model_dump(exclude={"masks", "conditioned", "initial_bias"})
        if self.masks:
            settings["mask_penalty"] = self.masks.penalty
        if self.conditioned:
            settings |= {"conditioned_weight": self.conditioned.weight, "pooling_heads": self.conditioned.heads}
        return settings

    @model_validator(mode="after")
    def _combination(self) -> LossConfig:
        if self.label_smoothing and self.objective != "infonce":
            raise ValueError("label_smoothing needs objective: infonce; set it to 0")
        if self.conditioned and self.objective != "siglip":
            raise ValueError("conditioned needs objective: siglip; set it, or set conditioned to null")
        if self.initial_bias is not None and self.objective != "siglip":
            raise ValueError(f"objective {self.objective} has no bias; set initial_bias to null")
        if self.masks and (self.image_components or self.text_components):
            raise ValueError(
                "masks select channels of the full features; set image_components and text_components to 0, or masks "
                "to null"
            )
        return self


class TemperatureConfig(Section):
    """The learned temperature by which similarities are divided."""

    initial: Positive | None = Field(
        None,
        description="temperature at the start (1 in ALIGN); null: that of the starting model, or 0.07 for infonce and "
        "0.1 for siglip",
    )
    min: Positive | None = Field(
        0.01, description="smallest temperature with infonce, as in CLIP; null: none; siglip has none"
    )

    @model_validator(mode="after")
    def _above_the_smallest(self) -> TemperatureConfig:
        if self.initial and self.min and self.initial < self.min:
            raise ValueError(f"initial {self.initial} is below min {self.min}; lower min")
        return self


class OptimizerConfig(Section):
    """Optimizer with warm-up and decay; defaults are the released code's: AdamW and a cosine."""

    name: Literal["adamw", "lamb"] = Field(
        "adamw", description="lamb: layer-wise steps as in ALIGN (arXiv 1904.00962); needs precision fp32 without ZeRO"
    )
    decay: Literal["cosine", "linear"] = Field(
        "cosine", description="curve by which the learning rate falls to 0 after warm-up"
    )
    learning_rate: Positive = Field(5e-4, description="peak learning rate, after warm-up")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.98), description="decay rates of the moments")
    eps: Positive = Field(1e-6, description="constant against division by zero")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.2, description="weight decay")
    warmup_steps: NonNegative = Field(50, description="number of steps in which the learning rate rises from 0")
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(0.0, description="maximum norm of the gradient; 0: off")


class PretrainConfig(Section):
    """Contrastive training of the text tower, with long texts and corner tokens (paper, section 3)."""

    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0], description="one model is trained per seed")
    steps: Count = Field(500, description="number of optimizer steps")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        64, description="samples per step, over all processes and micro-batches"
    )
    samples: Annotated[Count | Fraction, WholeShare] | None = Field(
        None,
        description="number, or share, of the training images that are used; a smaller set is contained in every "
        "larger one; null: all",
    )
    precision: Precision = Field("fp32", description="number format of the computation")
    start: str | None = Field(
        None,
        description="complete dual encoder to continue from, with image_tower: {kind: start}: folder or hub name of a "
        "CLIP or SigLIP model, a pinned hub name NAME@COMMIT, open_clip:NAME:TAG_OR_FILE, a checkpoint of CLIP, "
        "Long-CLIP or LoTLIP, or folder of a model of this project; null: the towers are chosen separately",
    )
    text: TextTowerConfig = TextTowerConfig()
    short_texts: ShortTextsConfig = ShortTextsConfig()
    long_texts: LongTextsConfig = LongTextsConfig()
    loader: LoaderConfig = LoaderConfig()
    image_tower: ImageTowerTraining = ImageTowerTraining()
    similarity: Literal["cosine", "late-interaction"] = Field(
        "cosine", description="cosine of one feature per input, or token by token as in FILIP (arXiv 2111.07783)"
    )
    loss: LossConfig = LossConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def from_pixels(self) -> bool:
        """Whether a step needs pixels: stored features come from a frozen tower, one per image."""
        patches = self.similarity == "late-interaction" or self.loss.conditioned is not None
        return patches or not self.image_tower.frozen or self.image_tower.features == "computed"

    def recipe(self) -> dict[str, Any]:
        """Returns all settings that affect the model of a seed."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key != "seeds"}

    def ignored(self) -> dict[str, str]:
        """Returns the dotted keys of settings that others make useless, each with the reason."""
        sampler = self.long_texts.sampler
        rules = [
            ("long_texts.window", sampler != "window", f"long_texts.sampler {sampler} reads one caption"),
            (
                "long_texts.sub_captions",
                sampler not in ("window", "merged"),
                f"long_texts.sampler {sampler} has its own number of sub-captions",
            ),
            ("image_tower.features", not self.image_tower.frozen, "features of a trained image tower are computed"),
            ("temperature.min", self.loss.objective == "siglip", "siglip has no smallest temperature"),
            ("text.frozen_positions", self.text.frozen, "text.frozen freezes all of the text tower"),
        ]
        return {key: reason for key, applies, reason in rules if applies}

    def effective(self) -> dict[str, Any]:
        """Returns dotted key → value of every setting that has an effect; equivalent configurations are equal.

        Besides `ignored` settings, the mask has no effect without corner tokens, nor have the settings of long texts
        without long texts.
        """
        settings = flatten(self.model_dump(mode="json"))
        for key in self.ignored():
            del settings[key]
        if not self.text.corner_tokens:
            settings.pop("text.corner_mask")
        if not self.long_texts.sub_captions:
            kept = {key: value for key, value in settings.items() if not key.startswith("long_texts.")}
            if self.short_texts.sampler not in ("raw", "raw-or-rewrite"):  # their captions give the short text
                kept["long_texts.captioners"] = settings["long_texts.captioners"]
            settings = {**kept, "long_texts.sub_captions": 0}
            for key in ("long_loss_weight", "short_loss_fraction", "text_components"):
                del settings[f"loss.{key}"]
        return settings

    @model_validator(mode="after")
    def _possible(self) -> PretrainConfig:
        if self.similarity == "late-interaction":
            if self.short_texts.random_offset:
                raise ValueError(
                    "similarity late-interaction does not support short_texts.random_offset; set it to false"
                )
            if self.text.corner_tokens:
                raise ValueError(
                    "similarity late-interaction does not support corner tokens; set text.corner_tokens to 0"
                )
            numbers = ("image_components", "text_components", "hard_negative_margin")
            for name, nothing in {**dict.fromkeys(numbers, "0"), "masks": "null", "conditioned": "null"}.items():
                if getattr(self.loss, name):
                    raise ValueError(
                        f"loss.{name} needs one feature per image and text, which late-interaction does not have; "
                        f"set it to {nothing}"
                    )
        if self.optimizer.name == "lamb" and self.precision != "fp32":
            raise ValueError(
                "optimizer.name lamb needs the norm of each weight, which bf16 training splits; set precision to fp32"
            )
        if self.loss.masks and self.short_texts.random_offset:
            raise ValueError("loss.masks does not support short_texts.random_offset; set it to false")
        text = self.text
        if self.start and text.pretrained:
            raise ValueError(
                f"start {self.start} and text.pretrained {text.pretrained} both name the text tower; remove one"
            )
        if self.start and text.config:
            raise ValueError(f"text.config has no effect on the text tower of start {self.start}; remove it")
        if text.position_interpolation and not (self.start or text.pretrained):
            raise ValueError(
                "text.position_interpolation needs trained positions; name the model in start or text.pretrained"
            )
        if text.frozen and not (self.start or text.pretrained):
            raise ValueError("text.frozen needs trained weights; name the model in start or text.pretrained")
        if text.frozen and self.image_tower.frozen:
            raise ValueError(
                "both towers are frozen, so nothing is trained; set text.frozen or image_tower.frozen to false"
            )
        loss, has_long_texts = self.loss, bool(self.long_texts.sub_captions)
        fraction = loss.short_loss_fraction if has_long_texts else None
        short_counts = loss.short_loss_weight > 0 and fraction != 0
        long_counts = has_long_texts and loss.long_loss_weight > 0 and fraction != 1
        if not (short_counts or long_counts):
            raise ValueError(
                "no text has a weight in the loss, so nothing is learned; raise loss.short_loss_weight or, with long "
                "texts, loss.long_loss_weight"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} contains duplicates; remove them")
        return self
