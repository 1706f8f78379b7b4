"""Settings of the caption stage: captioners, quality rules and the gate's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from lotlip.core.section import Commit, Count, Name, NonNegative, Positive, Section, Seed, Share
from lotlip.core.variants import Variants
from lotlip.data.text import SentenceEnds


class SceneCaptionerConfig(Section):
    """Describes a scene from its graph; stands in for a multimodal LLM, in the wording of one of the paper's three."""

    kind: Literal["scenes"]
    path: Path = Field(description="the module that generates the captions; DVC watches it")
    style: Literal["instructblip", "llava", "sharegpt4v"] = Field(description="captioner whose wording is imitated")
    omission: Share = Field(0.1, description="probability that an object is omitted")
    error: Share = Field(0.03, description="probability that an attribute is wrong")
    seed: Seed = Field(0, description="seed of omissions, errors and wording")


class SceneRewriterConfig(Section):
    """Rewords a scene's short caption by a grammar and does not read the scene; stands in for a language model."""

    rewrites: ClassVar = True
    kind: Literal["rewrite-scenes"]
    path: Path = Field(description="the module that rewords the captions; DVC watches it")
    seed: Seed = Field(0, description="seed of the wording")


class TableCaptionerConfig(Section):
    """Existing long captions, or rewrites of the short captions, in Parquet, CSV, TSV, JSONL or JSON files."""

    kind: Literal["table"]
    path: Path = Field(description="a file, or a folder of files; a subfolder's name is put before its keys")
    images: Path | None = Field(None, description="folder below path that is not searched for tables")
    key: str = Field("key", description="column of the images' keys, or of the paths or URLs from which keys were made")
    captioner: str | None = Field(
        "captioner", description="column with the captioner of each row; null: all rows belong to this captioner"
    )
    text: str | Annotated[list[str], Field(min_length=1)] = Field(
        "text", description="column of the caption, or several columns that are joined into one text"
    )
    repeated: Literal["error", "first"] = Field(
        "error", description="if several rows have the same key: fail, or use the first"
    )
    rewrites: bool = Field(
        False, description="true: the texts reword the images' short captions, as LaCLIP's do, and are no long captions"
    )


class _EndpointConfig(Section):
    """A model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`."""

    path: Path = Field(description="the module that calls the server; DVC watches it")
    url: str = Field(description="base URL of the API with its version, such as http://127.0.0.1:8000/v1")
    model: Annotated[str, Field(min_length=1)] = Field(description="the model's name on the server")
    revision: Annotated[str, Field(min_length=1)] = Field(
        description="revision of the weights that the server was started with; part of every caption's revision"
    )
    max_tokens: Count | None = Field(
        512, description="longest caption, in the model's tokens; null here and in the next four keys: not sent"
    )
    max_completion_tokens: Count | None = Field(
        None, description="sent instead of max_tokens, for models that require it; includes their reasoning"
    )
    temperature: Annotated[float, Field(ge=0)] | None = Field(0.0, description="above 0: tokens are sampled")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        1.0, description="nucleus sampling: share of the probability mass that tokens are sampled from"
    )
    seed: Seed | None = Field(0, description="seed of sampling, sent to the server")

    @property
    def decoding(self) -> dict[str, Any]:
        """The request parameters that decide the text, without those that are not sent."""
        names = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"}
        return self.model_dump(include=names, exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _one_limit(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("max_completion_tokens") is None:
            return data
        if data.get("max_tokens") is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same limit; remove max_tokens")
        return {**data, "max_tokens": None}

    @model_validator(mode="after")
    def _usable_url(self) -> Self:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is not a number
            usable = False
        # The messages do not repeat the URL: it may contain a password.
        if not usable or parts.query or parts.fragment:
            raise ValueError("url is not the address of an API; write one like http://127.0.0.1:8000/v1")
        if "@" in parts.netloc:
            raise ValueError("url contains a password; remove it and set LOTLIP_ENDPOINT_KEY in the environment")
        return self


class EndpointCaptionerConfig(_EndpointConfig):
    """A multimodal LLM behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`."""

    kind: Literal["endpoint"]
    prompt: Annotated[str, Field(min_length=1)] = Field(
        "Describe this image in detail.", description="prompt sent with each image"
    )


# A rewrite is the first line of the answer, so a model without a chat template may continue the prompt as well.
CAPTION = "{caption}"
REWRITE = (
    "Rewrite this caption of an image in other words. Keep what it says and add nothing. Reply with the new caption "
    f"only.\nCaption: {CAPTION}\nNew caption:"
)


def _with_the_caption(prompt: str) -> str:
    if CAPTION not in prompt:
        raise ValueError(f"has no place for the short caption; put {CAPTION} into it")
    return prompt


RewritePrompt = Annotated[str, AfterValidator(_with_the_caption)]


class EndpointRewriterConfig(_EndpointConfig):
    """A language model behind an OpenAI-compatible server, which rewords short captions and sees no image (LaCLIP)."""

    rewrites: ClassVar = True
    kind: Literal["rewrite-endpoint"]
    prompt: RewritePrompt = Field(REWRITE, description=f"prompt for each image, with {CAPTION} for its short caption")
    temperature: Annotated[float, Field(ge=0)] | None = Field(0.9, description="above 0: tokens are sampled")


# The paper's three captioners, as keys of an entry. The paper says only that they are asked for a detailed description:
# the wording is one of LLaVA's training questions for detailed descriptions (arXiv 2304.08485). The paper does not give
# decoding settings either: InstructBLIP's are its model card's, the others decode greedily.
DESCRIBE = "Describe the following image in detail."
PRESETS: dict[str, dict[str, Any]] = {
    "instructblip-vicuna-7b": {
        "model": "Salesforce/instructblip-vicuna-7b",
        "revision": "19103d0c5b5263c8a7891012e08573439fb6607f",
        "prompt": DESCRIBE,
        "max_new_tokens": 256,
        "num_beams": 5,
        "repetition_penalty": 1.5,
        "dtype": "bfloat16",
    },
    "llava-1.5-13b": {
        "model": "llava-hf/llava-1.5-13b-hf",
        "revision": "5dda2880bda009266dda7c4baff660b95ca64540",
        "prompt": DESCRIBE,
        "max_new_tokens": 256,
        "dtype": "bfloat16",
    },
    # Its weights on the hub have another code base's layout, so users must set the model. The prompt is the complete
    # Vicuna conversation of the authors' code, because a converted folder may have no chat template.
    "sharegpt4v-13b": {
        "prompt": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the user's questions. USER: <image>\n{DESCRIBE} ASSISTANT:",
        "max_new_tokens": 256,
        "dtype": "bfloat16",
    },
}


class _TransformersConfig(Section):
    """A model of the transformers library, from the model hub or a folder."""

    path: Path = Field(
        description="the model's folder, or lotlip/caption/captioners/transformers.py for a model on the hub; DVC "
        "watches it"
    )
    model: str = Field(description="name on the hub, OWNER/NAME; for a model in a folder, the same as path")
    revision: Commit | None = Field(None, description="commit on the hub; not for a folder, which is hashed instead")
    max_new_tokens: Count = Field(256, description="longest caption in tokens; a longer one is cut off")
    num_beams: Count = Field(1, description="beams of beam search; 1: no beam search")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="above 0: tokens are sampled")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="nucleus sampling: share of the probability mass that tokens are sampled from"
    )
    repetition_penalty: Positive = Field(1.0, description="1: no penalty")
    length_penalty: float = Field(1.0, description="beam search: above 0 favours longer texts, below 0 shorter ones")
    seed: Seed = Field(0, description="seed of sampling")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 on a GPU, float32 on the CPU"
    )

    @property
    def in_a_folder(self) -> bool:
        """Whether the model is in the folder `path` instead of on the hub."""
        return Path(self.model) == self.path

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.in_a_folder and self.revision is None:
            raise ValueError(
                f"model {self.model} is on the hub, where it may change; set revision to one of its commits (40 hex "
                "digits). For a model in a folder, set both model and path to the folder"
            )
        if self.in_a_folder and self.revision is not None:
            raise ValueError(f"the model in {self.path} is identified by the hash of its files; remove revision")
        if self.temperature and self.num_beams > 1:
            raise ValueError("temperature (sampling) and num_beams (beam search) exclude each other; set only one")
        return self


class TransformersCaptionerConfig(_TransformersConfig):
    """A multimodal language model of the transformers library, from the model hub or a folder.

    With `preset`, keys that are not set get the preset's values.
    """

    kind: Literal["transformers"]
    preset: Literal["instructblip-vicuna-7b", "llava-1.5-13b", "sharegpt4v-13b"] | None = Field(
        None, description="one of the paper's captioners; its settings replace the defaults of the other keys"
    )
    prompt: Annotated[str, Field(min_length=1)] = Field(
        DESCRIBE, description="the question; if it contains the model's image token, it is the complete prompt"
    )

    @model_validator(mode="before")
    @classmethod
    def _over_the_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return data
        preset = dict(PRESETS[name])
        if "model" in data:
            preset.pop("revision", None)  # belongs to another model
        if "model" not in {**preset, **data}:
            raise ValueError(
                f"preset {name} has no model, because no repository on the hub has its weights in transformers' "
                "layout; set model and path to a folder of converted weights (see docs/captioning.md)"
            )
        return {**preset, **data}


class TransformersRewriterConfig(_TransformersConfig):
    """A language model of the transformers library, which rewords short captions and sees no image (LaCLIP)."""

    rewrites: ClassVar = True
    kind: Literal["rewrite-transformers"]
    prompt: RewritePrompt = Field(REWRITE, description=f"prompt for each image, with {CAPTION} for its short caption")
    max_new_tokens: Count = Field(77, description="longest rewrite in tokens; a longer one is cut off")
    temperature: Annotated[float, Field(ge=0)] = Field(0.9, description="above 0: tokens are sampled")


CaptionerConfig = Annotated[
    SceneCaptionerConfig
    | SceneRewriterConfig
    | TableCaptionerConfig
    | TransformersCaptionerConfig
    | TransformersRewriterConfig
    | EndpointCaptionerConfig
    | EndpointRewriterConfig,
    Variants("lotlip.captioners", required_fields=("path",)),
]


def is_rewriter(settings: Section) -> bool:
    """Whether a captioner rewords short captions; sections of other packages may lack the attribute."""
    return bool(getattr(settings, "rewrites", False))


class QualityConfig(Section):
    """Rules that drop captions, each with its limit; null or false disables a rule. Measures are stored in any case.

    The defaults drop only captions that are certainly bad. Rules are applied in this order.
    """

    refusal: bool = Field(True, description="drop a caption in which the captioner declines to describe the image")
    reasoning: bool = Field(True, description="drop a caption that shows the captioner's reasoning about its task")
    control: NonNegative | None = Field(0, description="largest number of control characters")
    mojibake: NonNegative | None = Field(0, description="largest number of places decoded with the wrong encoding")
    repetition: Share | None = Field(0.5, description="largest share of 4-grams that occurred earlier in the caption")
    short: NonNegative | None = Field(3, description="smallest number of words")
    long: Count | None = Field(None, description="largest number of words")
    truncated: bool = Field(False, description="drop a caption that was cut off, or whose last sentence has no end")
    disagreement: Share | None = Field(
        None, description="smallest share of the short caption's content words that the caption must contain"
    )

    @model_validator(mode="after")
    def _some_length(self) -> QualityConfig:
        if self.short and self.long and self.short > self.long:
            raise ValueError(f"short {self.short} is above long {self.long}, so every caption is dropped; lower it")
        return self


# Columns of partitions and names of stage inputs, which share a namespace with captioners.
RESERVED_CAPTIONERS = frozenset(
    {
        "raw",
        "key",
        "extension",
        "short_caption",
        "width",
        "height",
        "sha256",
        "scene",
        "offset",
        "size",
        "partition",
        "ingest",
        "image_tower",
    }
)


class CaptionConfig(Section):
    """Long captions for every image, from each captioner."""

    captioners: dict[Name, CaptionerConfig] = Field(
        default_factory=dict, description="name → captioner; each captioner describes every image"
    )
    tokenizer: str = Field(
        "bert-base-uncased",
        description="tokenizer that counts the captions' tokens: bert-base-uncased, a tokenizer.json or its folder",
    )
    sentence_ends: SentenceEnds = Field(
        "released",
        description="what ends a sub-caption besides a newline, in all stages and in the models: released: `.` only, "
        "as in the released code; unicode: every Unicode sentence terminator (`.`, `!`, `?`, `。`, `।`, …)",
    )
    quality: QualityConfig = QualityConfig()
    max_failure_share: Share = Field(
        0.02, description="largest share of images without a caption, not counting captions that `quality` drops"
    )
    max_filtered_share: Share = Field(0.1, description="largest share of captions that `quality` drops")
    max_reasoning_share: Share = Field(0.01, description="largest share of captions with reasoning, dropped or not")
    max_truncated_share: Share = Field(0.5, description="largest share of captions that are cut off")
    max_repeated_share: Share = Field(0.2, description="largest share of captions that equal another one")
    max_missing_partitions: Share = Field(0.0, description="largest share of partitions without any caption")
    max_length_ratio: Annotated[float, Field(ge=1)] = Field(
        1.5, description="largest ratio, either way, of a partition's mean caption length in words to the median one"
    )
    min_agreement_ratio: Annotated[float, Field(ge=1)] = Field(
        1.5,
        description="how many times as many words captions must share with their own short captions as with those of "
        "the next images; certainly less fails the gate, because captions were swapped",
    )

    @property
    def describing(self) -> list[str]:
        """Names of the captioners that describe the images, whose captions are long texts."""
        return [name for name, settings in self.captioners.items() if not is_rewriter(settings)]

    @property
    def rewriting(self) -> list[str]:
        """Names of the captioners that reword the short captions."""
        return [name for name, settings in self.captioners.items() if is_rewriter(settings)]

    def rules(self, captioner: str) -> QualityConfig:
        """The rules for a captioner's texts.

        A rewrite is as short as a caption of the web: LaCLIP drops those of fewer than 2 words. It may say the same in
        entirely other words.
        """
        rules = self.quality
        if captioner in self.describing:
            return rules
        return rules.model_copy(update={"short": rules.short and min(rules.short, 2), "disagreement": None})

    @model_validator(mode="after")
    def _free_names(self) -> CaptionConfig:
        for name in self.captioners:
            if name in RESERVED_CAPTIONERS:
                raise ValueError(f"captioners.{name}: the name is reserved; choose another name")
        return self
