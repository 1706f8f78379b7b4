"""The stage that describes images: who does, what is dropped, what the gate allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from lotlip.core.section import Commit, Count, Name, NonNegative, Positive, Section, Share
from lotlip.core.variants import Variants
from lotlip.data.text import SentenceEnds


class SceneCaptionerConfig(Section):
    """Describes a scene from its graph; stands for a multimodal LLM, in the wording of one of the paper's three."""

    kind: Literal["scenes"]
    path: Path = Field(description="the module that words the captions; DVC watches it")
    style: Literal["instructblip", "llava", "sharegpt4v"] = Field(description="whose wording the captions imitate")
    omission: Share = Field(0.1, description="chance that an object is left out")
    error: Share = Field(0.03, description="chance that an attribute is told wrong")
    seed: int = Field(0, description="of omissions, errors and wording")


class TableCaptionerConfig(Section):
    """Long captions that were written before, in Parquet or CSV files."""

    kind: Literal["table"]
    path: Path = Field(description="a file, or a folder of them; a subfolder's name comes before its keys")
    key: str = Field("key", description="column of the images' keys, or of the paths or addresses that gave them")
    captioner: str | None = Field("captioner", description="column that says whose row it is; null: all are this one's")
    text: str | Annotated[list[str], Field(min_length=1)] = Field(
        "text", description="column of the caption, or several that are put together as one text"
    )
    repeated: Literal["error", "first"] = Field("error", description="what a second row for a key is")


class EndpointCaptionerConfig(Section):
    """A multimodal LLM behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`."""

    kind: Literal["endpoint"]
    path: Path = Field(description="the module that asks the server; DVC watches it")
    url: str = Field(description="of the API, with its version: http://127.0.0.1:8000/v1")
    model: Annotated[str, Field(min_length=1)] = Field(description="the server's name for it")
    revision: Annotated[str, Field(min_length=1)] = Field(
        description="of the model's weights, as the server was started with; part of every caption's revision"
    )
    prompt: Annotated[str, Field(min_length=1)] = Field(
        "Describe this image in detail.", description="the question that is sent with each image"
    )
    max_tokens: Count | None = Field(
        512, description="longest caption, in the model's tokens; null, as each of the next four: not sent"
    )
    max_completion_tokens: Count | None = Field(
        None, description="sent instead of max_tokens, to models that take no other; their reasoning counts too"
    )
    temperature: Annotated[float, Field(ge=0)] | None = Field(0.0, description="above 0, tokens are sampled")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        1.0, description="nucleus sampling: the share of the probability that tokens are sampled from"
    )
    seed: int | None = Field(0, description="of sampling, sent to the server")

    @property
    def decoding(self) -> dict[str, Any]:
        """The parameters of a request that decide its text, without those that are not sent."""
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
    def _usable_url(self) -> EndpointCaptionerConfig:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of a port that is no number
            usable = False
        # The message does not repeat it: it may hold a password.
        if not usable or parts.query or parts.fragment:
            raise ValueError("url is no address of an API; write one like http://127.0.0.1:8000/v1")
        if "@" in parts.netloc:
            raise ValueError("url holds a password; leave it out and set LOTLIP_ENDPOINT_KEY in the environment")
        return self


# The paper's three, as their own keys of an entry. It says only that they are asked for a detailed description: the
# words are one of the questions that LLaVA was taught detailed descriptions with (arXiv 2304.08485). How the text is
# decoded is not said either: InstructBLIP's is its model card's, the others' is greedy.
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
    # Its weights on the hub are in another code's layout, so the model is for the user to name. The whole prompt is
    # Vicuna's conversation, as its authors' code has it: a converted folder need not have a chat template.
    "sharegpt4v-13b": {
        "prompt": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the user's questions. USER: <image>\n{DESCRIBE} ASSISTANT:",
        "max_new_tokens": 256,
        "dtype": "bfloat16",
    },
}


class TransformersCaptionerConfig(Section):
    """A multimodal language model of the transformers library, from the model hub or a folder.

    What the entry does not say is the preset's, where it names one.
    """

    kind: Literal["transformers"]
    path: Path = Field(
        description="the model's folder, or for a model of the hub lotlip/caption/captioners/transformers.py; DVC "
        "watches it"
    )
    preset: Literal["instructblip-vicuna-7b", "llava-1.5-13b", "sharegpt4v-13b"] | None = Field(
        None, description="one of the paper's captioners, whose settings replace the defaults below"
    )
    model: str = Field(description="its name on the hub, OWNER/NAME; for a model in a folder, the same as path")
    revision: Commit | None = Field(None, description="the hub's commit; a folder's is the hash of its files")
    prompt: Annotated[str, Field(min_length=1)] = Field(
        DESCRIBE, description="the question; or, where it has the model's image token in it, all that the model is told"
    )
    max_new_tokens: Count = Field(256, description="a caption that has not ended by then is cut")
    num_beams: Count = Field(1, description="1: no beam search")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="above 0, tokens are drawn by chance")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="tokens are drawn from so much of the chance")
    repetition_penalty: Positive = Field(1.0, description="1: none")
    length_penalty: float = Field(1.0, description="of beams: above 0 longer texts win, below it shorter ones")
    seed: int = Field(0, description="of what is drawn by chance")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the weights; auto: bfloat16 on a GPU, float32 on the CPU"
    )

    @property
    def in_a_folder(self) -> bool:
        """Whether the model is in the folder `path`, not on the hub."""
        return Path(self.model) == self.path

    @model_validator(mode="before")
    @classmethod
    def _over_the_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return data
        preset = dict(PRESETS[name])
        if "model" in data:
            preset.pop("revision", None)  # is another model's
        if "model" not in {**preset, **data}:
            raise ValueError(
                f"preset {name} has no model, since no hub repository has its weights as transformers reads "
                "them; set model and path to a folder of converted weights (docs/captioning.md says how)"
            )
        return {**preset, **data}

    @model_validator(mode="after")
    def _possible(self) -> TransformersCaptionerConfig:
        if not self.in_a_folder and self.revision is None:
            raise ValueError(
                f"model {self.model} is on the hub, where it may change; set revision to a commit of it (40 hex "
                "digits). A model in a folder has the folder's name as model and as path"
            )
        if self.in_a_folder and self.revision is not None:
            raise ValueError(f"the model in {self.path} has the hash of its files as revision; leave revision out")
        if self.temperature and self.num_beams > 1:
            raise ValueError("temperature is for drawing by chance, num_beams for search; set one of them, not both")
        return self


CaptionerConfig = Annotated[
    SceneCaptionerConfig | TableCaptionerConfig | TransformersCaptionerConfig | EndpointCaptionerConfig,
    Variants("lotlip.captioners", needs=("path",)),
]


class QualityConfig(Section):
    """Rules that drop captions, each with its limit; null or false: off. What is measured is stored in any case.

    By default only what is certainly bad is dropped. They are asked in this order.
    """

    refusal: bool = Field(True, description="the captioner says that it cannot describe the image")
    reasoning: bool = Field(True, description="the text shows the captioner's reasoning about its task")
    control: NonNegative | None = Field(0, description="most control characters")
    mojibake: NonNegative | None = Field(0, description="most places that were decoded by the wrong encoding")
    repetition: Share | None = Field(0.5, description="largest share of runs of four words that were there before")
    short: NonNegative | None = Field(3, description="fewest words")
    long: Count | None = Field(None, description="most words")
    truncated: bool = Field(False, description="the caption was cut off, or its last sentence has no end")
    disagreement: Share | None = Field(None, description="smallest share of the short caption's content words")


# Columns of partitions and inputs of stages, which stand beside the captioners' names.
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
    """Long captions for every image, by each captioner."""

    captioners: dict[Name, CaptionerConfig] = Field(
        default_factory=dict, description="name → who writes long captions; each runs on every image"
    )
    tokenizer: str = Field(
        "bert-base-uncased",
        description="tokenizer that counts the captions' tokens: bert-base-uncased, a tokenizer.json or its folder",
    )
    sentence_ends: SentenceEnds = Field(
        "released",
        description="what ends a sub-caption besides a line end, in all stages and in the models: released: `.` only, "
        "as in the released code; unicode: all of Unicode's sentence terminators (`.`, `!`, `?`, `。`, `।`, …)",
    )
    quality: QualityConfig = QualityConfig()
    max_failure_share: Share = Field(0.02, description="of the images, captions that `quality` drops not counted")
    max_filtered_share: Share = Field(0.1, description="of the captions that `quality` drops; more fails the gate")
    max_reasoning_share: Share = Field(
        0.01, description="of the captions that show reasoning, dropped or not; more fails the gate"
    )
    max_truncated_share: Share = Field(0.5, description="of the captions that are cut off; more fails the gate")
    max_repeated_share: Share = Field(
        0.2, description="of the captions that are word for word another's; more fails the gate"
    )
    max_missing_partitions: Share = Field(
        0.0, description="of the partitions that have no caption; more fails the gate"
    )
    max_length_ratio: Annotated[float, Field(ge=1)] = Field(
        1.5, description="of a partition's mean number of words to that of the median partition, or the other way round"
    )
    min_agreement_ratio: Annotated[float, Field(ge=1)] = Field(
        1.5,
        description="times as many words as with the next images' short captions that captions share with their "
        "own; certainly less fails the gate: they were swapped",
    )

    @model_validator(mode="after")
    def _free_names(self) -> CaptionConfig:
        for name in self.captioners:
            if name in RESERVED_CAPTIONERS:
                raise ValueError(f"captioners.{name}: the name is reserved; choose another name")
        return self
