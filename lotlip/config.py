"""params.yaml as frozen, typed objects. The only reader of YAML: a section is a stage, a variant is its differences.

Every value is checked when the file is loaded, and every complaint names the key, what was wrong and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lotlip.text import Window

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class ConfigError(ValueError):
    """params.yaml cannot be used as it is; the message lists every reason with its place and remedy.

    Args:
        message: what cannot be used.
        problems: a line for each reason.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__("\n  - ".join([message, *problems]))
        self.problems = list(problems)


class Section(BaseModel):
    """A part of params.yaml: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SectionT = TypeVar("SectionT", bound=Section)


class Paths(Section):
    """Where each stage writes, relative to the project's root; dvc.yaml reads the same names."""

    ingest: Path = Path("data/ingest")
    image_tower: Path = Path("data/image-tower")
    captions: Path = Path("data/captions")
    shards: Path = Path("data/shards")
    models: Path = Path("models")
    metrics: Path = Path("metrics")
    stages: Path = Path("metrics/stages")
    caption_store: Path = Field(
        Path("data/caption-store"), description="captions that were written once, kept whatever changes; not DVC's"
    )
    report: Path = Path("report")


# --- ingest -------------------------------------------------------------------------------------------------------


class ScenesSource(Section):
    """The demo's world: pictures drawn from a seed, with their scene graphs."""

    kind: Literal["scenes"]
    path: Path = Field(description="the module that draws the scenes; DVC watches it")
    seed: int = 0
    image_size: Annotated[int, Field(ge=32, le=512)] = 64
    train: Count = 8000
    val: Count = 500
    test: Count = 1000


class SplitByKey(Section):
    """A source that leaves the split to chance: it depends on a sample's key and the seed, and on nothing else."""

    val_share: Share = 0.05
    test_share: Share = 0.1
    split_seed: int = 0

    @model_validator(mode="after")
    def _some_left_to_train(self) -> SplitByKey:
        if self.val_share + self.test_share >= 1:
            raise ValueError("val_share + test_share must stay below 1, so that something is left to train on")
        return self


class FolderSource(SplitByKey):
    """A directory of images, each with a `.txt` of the same stem that holds its raw caption."""

    kind: Literal["folder"]
    path: Path


class WebDatasetSource(SplitByKey):
    """Tars of images with their captions, as img2dataset's `output_format=webdataset` leaves them."""

    kind: Literal["webdataset"]
    path: Path = Field(description="a folder of tars, a tar, or a text file with the address of tars in each line")
    images: Annotated[list[str], Field(min_length=1)] = Field(
        ["jpg", "jpeg", "png", "webp"], description="endings of the members that may be a sample's image, best first"
    )
    caption: str | None = Field("txt", description="ending of the member that holds the raw caption; null: none does")
    caption_field: str | None = Field(
        "caption", description="field of a sample's json that holds the raw caption where `caption` gives none"
    )
    key: str | None = Field(
        None,
        description="field of its json that a sample is called by, such as `url`; without it, its name in the tar",
    )

    @model_validator(mode="after")
    def _some_caption(self) -> WebDatasetSource:
        if self.caption is None and self.caption_field is None:
            raise ValueError("caption and caption_field are both null; one of them must say where raw captions are")
        return self


class ParquetSource(SplitByKey):
    """Parquet files, a row for each image; the image itself is in the row, or a file below `images`."""

    kind: Literal["parquet"]
    path: Path = Field(description="a file, or a folder of them")
    image: str = Field("image", description="column of encoded images ({bytes, path} too), or of paths below `images`")
    images: Path | None = Field(None, description="folder that the image column's paths start from")
    caption: str = Field("caption", description="column of the raw caption")
    key: str | None = Field(None, description="column that a sample is called by; without it, its image's path or row")


class CsvSource(SplitByKey):
    """CSV files (UTF-8, a header line), a row for each image; the images are files below `images`."""

    kind: Literal["csv"]
    path: Path = Field(description="a file, or a folder of them")
    image: str = Field("image", description="column of paths below `images`")
    images: Path = Field(description="folder that the image column's paths start from")
    caption: str = Field("caption", description="column of the raw caption")
    key: str | None = Field(None, description="column that a sample is called by; without it, its image's path")


Source = Annotated[
    ScenesSource | FolderSource | WebDatasetSource | ParquetSource | CsvSource, Field(discriminator="kind")
]


class Images(Section):
    """What an image must be to come in, and how it is stored."""

    min_side: Count = Field(1, description="pixels; smaller ones are failures")
    max_pixels: Annotated[int, Field(ge=1, le=2**28)] = Field(
        100_000_000, description="width × height; larger ones are failures, before they are decoded"
    )
    max_bytes: Count = Field(100_000_000, description="of the encoded image; larger ones are failures, never read")
    shorter_side: Count | None = Field(None, description="pixels that a larger one is brought to; smaller ones stay")
    encoding: Literal["keep", "jpeg", "png", "webp"] = Field(
        "keep", description="keep: the file as it is; others: the picture that a viewer shows, without metadata"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(90, description="of JPEG and WebP that are written here")


class Ingest(Section):
    """Brings images and raw captions in, as partitions."""

    source: Source
    images: Images = Images()
    partition_size: Count = 1000
    evaluation_images: list[Path] = Field(
        [], description="folders of images (of a benchmark, say) that are left out of the training split"
    )
    max_failure_share: Share = Field(0.01, description="of the items; more fails the gate, as for each limit below")
    max_broken_unit_share: Share = Field(0.05, description="of the source's files, as tars, that are broken or cut off")
    max_repeated_caption_share: Share = Field(0.9, description="of the raw captions that are word for word another's")
    max_constant_share: Share = Field(0.05, description="of the images looked at that are one colour all over")


# --- image tower --------------------------------------------------------------------------------------------------


class ScenesTower(Section):
    """A small ViT trained on the attributes of scenes of its own; stands for ImageNet-21k pretraining."""

    kind: Literal["scenes"]
    scenes: Count = 12000
    seed: int = 1
    width: Count = 128
    depth: Count = 2
    heads: Count = 8
    patch_size: Count = 16
    image_size: Annotated[int, Field(ge=32, le=512)] = 64
    epochs: Count = 5
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    min_accuracy: Share = Field(
        0.6, description="mean over attributes, on scenes it was not trained on; less fails the gate"
    )


class TimmTower(Section):
    """A pretrained image tower from timm, as the paper's `vit_base_patch16_224.augreg_in21k`."""

    kind: Literal["timm"]
    model: str
    checkpoint: Path | None = Field(None, description="local safetensors file; without one timm asks the model hub")
    image_size: Annotated[int, Field(ge=32, le=1024)] = 224


ImageTower = Annotated[ScenesTower | TimmTower, Field(discriminator="kind")]


# --- caption ------------------------------------------------------------------------------------------------------


class SceneCaptioner(Section):
    """Describes a scene from its graph; stands for a multimodal LLM, in the wording of one of the paper's three."""

    kind: Literal["scenes"]
    path: Path = Field(description="the module that words the captions; DVC watches it")
    style: Literal["instructblip", "llava", "sharegpt4v"]
    omission: Share = Field(0.1, description="chance that an object is left out")
    error: Share = Field(0.03, description="chance that an attribute is told wrong")
    seed: int = 0


class TableCaptioner(Section):
    """Long captions that were written before, in Parquet or CSV files."""

    kind: Literal["table"]
    path: Path = Field(description="a file, or a folder of them; a subfolder's name comes before its keys")
    key: str = Field("key", description="column of the images' keys, or of the paths or addresses that gave them")
    captioner: str | None = Field("captioner", description="column that says whose row it is; null: all are this one's")
    text: str | Annotated[list[str], Field(min_length=1)] = Field(
        "text", description="column of the caption, or several that are put together as one text"
    )
    repeated: Literal["error", "first"] = Field("error", description="what a second row for a key is")


class EndpointCaptioner(Section):
    """A multimodal LLM behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`."""

    kind: Literal["endpoint"]
    path: Path = Field(description="the module that asks the server; DVC watches it")
    url: str = Field(description="of the API, with its version: http://127.0.0.1:8000/v1")
    model: Annotated[str, Field(min_length=1)] = Field(description="the server's name for it")
    revision: Annotated[str, Field(min_length=1)] = Field(
        description="of the model's weights, as the server was started with; part of every caption's revision"
    )
    prompt: Annotated[str, Field(min_length=1)] = "Describe this image in detail."
    max_tokens: Count = Field(512, description="longest caption, in the model's tokens")
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    concurrency: Count = Field(
        16, description="requests in flight from a process, whatever number of units it works on"
    )
    timeout_seconds: Positive = Field(120, description="a request that brings nothing for so long is tried again")
    retries: NonNegative = Field(
        5, description="tries after the first, for a request; half a second, one, two, … apart"
    )

    @model_validator(mode="after")
    def _usable_url(self) -> EndpointCaptioner:
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
        "batch_size": 32,
    },
    "llava-1.5-13b": {
        "model": "llava-hf/llava-1.5-13b-hf",
        "revision": "5dda2880bda009266dda7c4baff660b95ca64540",
        "prompt": DESCRIBE,
        "max_new_tokens": 256,
        "dtype": "bfloat16",
        "batch_size": 32,
    },
    # Its weights on the hub are in another code's layout, so the model is for the user to name. The whole prompt is
    # Vicuna's conversation, as its authors' code has it: a converted folder need not have a chat template.
    "sharegpt4v-13b": {
        "prompt": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the user's questions. USER: <image>\n{DESCRIBE} ASSISTANT:",
        "max_new_tokens": 256,
        "dtype": "bfloat16",
        "batch_size": 32,
    },
}


class TransformersCaptioner(Section):
    """A multimodal language model of the transformers library, from the model hub or a folder.

    What the entry does not say is the preset's, where it names one.
    """

    kind: Literal["transformers"]
    path: Path = Field(
        description="the model's folder, or lotlip/captioning/mllm.py for a model of the hub; DVC watches it"
    )
    preset: Literal["instructblip-vicuna-7b", "llava-1.5-13b", "sharegpt4v-13b"] | None = None
    model: str = Field(description="its name on the hub, OWNER/NAME; for a model in a folder, the same as path")
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        None, description="the hub's commit; a folder's is the hash of its files"
    )
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
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="auto: spread over all GPUs that the process sees, the CPU where there is none"
    )
    batch_size: Count = Field(8, description="images at a time; halved where they do not fit into the GPU's memory")

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
    def _possible(self) -> TransformersCaptioner:
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


Captioner = Annotated[
    SceneCaptioner | TableCaptioner | TransformersCaptioner | EndpointCaptioner, Field(discriminator="kind")
]


class Quality(Section):
    """Rules that drop captions, each with its limit; null or false: off. What is measured is stored in any case.

    By default only what is certainly bad is dropped. They are asked in this order.
    """

    refusal: bool = Field(True, description="the captioner says that it cannot describe the image")
    control: NonNegative | None = Field(0, description="most control characters")
    mojibake: NonNegative | None = Field(0, description="most places that were decoded by the wrong encoding")
    repetition: Share | None = Field(0.5, description="largest share of runs of four words that were there before")
    short: NonNegative | None = Field(3, description="fewest words")
    long: Count | None = Field(None, description="most words")
    truncated: bool = Field(False, description="the caption was cut off, or its last sentence has no end")
    disagreement: Share | None = Field(None, description="smallest share of the raw caption's content words")


class Ray(Section):
    """Where Ray's workers are, for `task_runner: ray`."""

    address: str | None = Field(
        None, description="of a Ray cluster that runs; null: one on this machine, for the time of the flow"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="that a captioner is given")


class CaptionStage(Section):
    """Long captions for every image, by each captioner."""

    captioners: dict[Name, Captioner] = {}
    tokenizer: str = "bert-base-uncased"
    quality: Quality = Quality()
    max_failure_share: Share = Field(0.02, description="of the images, captions that `quality` drops not counted")
    max_filtered_share: Share = Field(0.1, description="of the captions that `quality` drops; more fails the gate")
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
        description="times as many words as with the next images' raw captions that captions share with their "
        "own; certainly less fails the gate: they were swapped",
    )
    task_runner: Literal["threads", "ray"] = Field("threads", description="where partitions are captioned")
    ray: Ray = Ray()


# --- shard --------------------------------------------------------------------------------------------------------


class Shard(Section):
    """Images, raw and long captions and the frozen tower's features, as WebDataset tars."""

    samples_per_shard: Count = Field(1000, description="at most")
    max_bytes: Count = Field(1_000_000_000, description="of a shard, about")
    seed: int = 0
    store_features: bool = Field(True, description="run the frozen tower once, here, instead of at every step")
    feature_batch_size: Count = 250
    max_failure_share: Share = 0.01
    max_uncaptioned_share: Share = Field(0.05, description="of the samples that no captioner described")


# --- pretrain -----------------------------------------------------------------------------------------------------


class Stretch(Section):
    """Long-CLIP's longer context: trained positions are stretched, the best trained ones kept as they are.

    arXiv 2403.15378, section 3.1; the defaults are its 77 → 248 positions.
    """

    positions: Annotated[int, Field(ge=2)] = Field(77, description="that were trained, of the pretrained text tower")
    keep: NonNegative = Field(20, description="first positions that stay as they are")
    factor: Count = Field(4, description="new positions for each of the others")

    @property
    def stretched(self) -> int:
        """How many positions there are afterwards."""
        return self.keep + (self.positions - self.keep) * self.factor

    @model_validator(mode="after")
    def _some_left_to_stretch(self) -> Stretch:
        if self.keep >= self.positions:
            raise ValueError(f"keep {self.keep} leaves none of {self.positions} positions to stretch; set it lower")
        return self


class TextTower(Section):
    """The BERT-family text encoder and its corner tokens (paper, section 3.2)."""

    tokenizer: str = "bert-base-uncased"
    pretrained: str | None = Field(
        None,
        description="folder or hub name of a BERT-family model, or folder of a LoTLIP model; without one, `config`",
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="of transformers' BertConfig; what is not named is BERT-base's"
    )
    context_length: Annotated[int, Field(ge=8, le=512)] = 128
    corner_tokens: Annotated[int, Field(ge=0, le=16)] = Field(2, description="m")
    corner_mask: bool = Field(True, description="corner tokens and [CLS] see words only, not one another (section 3.2)")
    register_tokens: Annotated[int, Field(ge=0, le=16)] = Field(
        0, description="learned tokens that are masked as words are and get no loss (Table 7)"
    )
    stretch: Stretch | None = Field(None, description="Long-CLIP: stretch the positions of `pretrained`")

    @model_validator(mode="after")
    def _fits(self) -> TextTower:
        extra = self.corner_tokens + self.register_tokens
        if extra + 4 > self.context_length:
            raise ValueError(f"context_length {self.context_length} has no room for {extra} extra tokens and words")
        if self.stretch and not self.pretrained:
            raise ValueError("stretch needs trained positions; name the text tower in pretrained")
        if self.stretch and self.stretch.stretched < self.context_length:
            raise ValueError(
                f"stretch gives {self.stretch.stretched} positions, fewer than context_length {self.context_length}; "
                "raise stretch.factor or lower context_length"
            )
        return self


class Augmentation(Section):
    """A random piece of each picture, resized to the tower's size, as CLIP's training has it."""

    scale: tuple[Share, Share] = Field((0.9, 1.0), description="share of the picture's area that the piece has")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="of its width to its height")

    @model_validator(mode="after")
    def _ranges(self) -> Augmentation:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} {[low, high]} is no range; give the lower number, above 0, first")
        return self


class ImageSide(Section):
    """What training does with the image tower: LiT locks it (section 3.1), CLIP and its kin train it too."""

    frozen: bool = Field(True, description="false: the image tower is trained as well, from where its stage left it")
    features: Literal["stored", "computed"] = Field(
        "stored",
        description="a frozen tower's features: from the shards (where they hold them), or from pixels each step",
    )
    augmentation: Augmentation | None = Field(
        None, description="of pictures that a step reads; without it, the centre as in evaluation"
    )

    @model_validator(mode="after")
    def _pictures_to_augment(self) -> ImageSide:
        if self.augmentation and self.frozen and self.features == "stored":
            raise ValueError("augmentation changes pictures, and stored features have none; set features to computed")
        return self


class LongTexts(Section):
    """What is drawn from the long captions at each step."""

    per_image: Count = Field(1, description="K: long texts drawn for an image")
    sub_captions: NonNegative = Field(3, description="k: consecutive sub-captions in a long text; 0: raw captions only")
    captioners: list[Name] = Field(default_factory=list, description="whose captions to draw from; none named: all")
    window: Window = "within-caption"


class Loader(Section):
    """How samples come from the shards to the steps."""

    workers: NonNegative = Field(
        1, description="processes that read, decode and tokenize ahead, for each training process; 0: it does so itself"
    )
    prefetch: Count = Field(4, description="steps that each worker holds ready")
    epochs: Literal["exact", "resampled"] = Field(
        "exact", description="each sample once an epoch, or each drawn at random, with `weights`"
    )
    samples_per_epoch: Count | None = Field(None, description="of a resampled epoch; without it, as many as there are")
    weights: dict[str, Positive] = Field(
        default_factory=dict,
        description="resampled: beginning of a sample's key → how often it is drawn; others count 1",
    )

    @model_validator(mode="after")
    def _resampling(self) -> Loader:
        given = [name for name in ("samples_per_epoch", "weights") if getattr(self, name)]
        if given and self.epochs == "exact":
            raise ValueError(f"{' and '.join(given)} need epochs: resampled; an exact epoch has each sample once")
        return self


class Loss(Section):
    """How texts and images of a batch are contrasted, and what each kind of text counts."""

    contrast: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="symmetric InfoNCE as CLIP and the paper have it, or SigLIP's pairs (arXiv 2303.15343)"
    )
    raw_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="the released code's `clip_lossweight`")
    long_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="its `declip_lossweight`")
    raw_components: NonNegative = Field(
        0,
        description="Long-CLIP: the raw caption is held against so many principal components of the image features "
        "(32 there; arXiv 2403.15378, section 3.2); 0: against the whole feature",
    )


class Optimizer(Section):
    """AdamW with warm-up and cosine decay; defaults are the released code's."""

    learning_rate: Positive = 5e-4
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    warmup_steps: NonNegative = 50
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(0.0, description="largest norm; 0: off")


class LocalLaunch(Section):
    """All processes on this machine, under torch's launcher where there are several."""

    kind: Literal["local"] = "local"


class HostfileLaunch(Section):
    """DeepSpeed's launcher, which reaches each machine of a hostfile by pdsh over ssh; the first is this one."""

    kind: Literal["hostfile"]
    path: Path = Field(description="lines of `HOST slots=GPUS`; the slots together are `processes`")
    port: Port = Field(29500, description="free on the first machine, where the processes meet")


class SlurmLaunch(Section):
    """torch's launcher on each node of the Slurm allocation that the stage runs in."""

    kind: Literal["slurm"]
    nodes: Count
    port: Port = Field(29500, description="free on the first node, where the processes meet")


class RendezvousLaunch(Section):
    """torch's launcher here and, by `python -m flows.join`, on the other machines: Kubernetes' pods, or any."""

    kind: Literal["rendezvous"]
    nodes: Count
    endpoint: Annotated[str, Field(pattern=r"^[^:\s]+:\d+$")] = Field(
        description="HOST:PORT of the machine that runs the stage, as the others know it"
    )


Launch = Annotated[LocalLaunch | HostfileLaunch | SlurmLaunch | RendezvousLaunch, Field(discriminator="kind")]


# Settings of `Pretrain` that say how the work is done, not what is learned.
HOW: Any = {
    "accumulation": True,
    "processes": True,
    "launch": True,
    "zero_stage": True,
    "log_every": True,
    "checkpoint_every": True,
    "stop_at_chance_after": True,
    "peer_timeout_seconds": True,
    "max_final_loss_share": True,
    "loader": {"workers", "prefetch"},
}


class Pretrain(Section):
    """Contrastive training of the text tower, with long texts and corner tokens (paper, section 3)."""

    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    steps: Count = 500
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="over all processes and accumulation steps")
    accumulation: Count = Field(
        1, description="micro-batches per step and process, so that memory holds the activations of one; same loss"
    )
    processes: Count = Field(1, description="processes that train together, each on its GPU or share of the cores")
    launch: Launch = Field(LocalLaunch(), description="how they are started, on how many machines; decides no result")
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    log_every: Count = 10
    checkpoint_every: Count = 200
    text: TextTower = TextTower()
    long_texts: LongTexts = LongTexts()
    loader: Loader = Loader()
    image_tower: ImageSide = ImageSide()
    similarity: Literal["cosine", "late-interaction"] = Field(
        "cosine", description="of one feature each, or token by token as in FILIP (arXiv 2111.07783)"
    )
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    stop_at_chance_after: NonNegative = Field(
        200, description="steps in which retrieval inside the batch must get better than chance; 0: never stop for it"
    )
    peer_timeout_seconds: Positive = Field(
        600, description="a process that waits longer for the others ends the run: one of them hangs"
    )
    max_final_loss_share: Positive = Field(
        0.95, description="of the loss of guessing that the last steps may still have; more fails the gate"
    )

    @property
    def from_pixels(self) -> bool:
        """Whether a step needs pictures: stored features are of a frozen tower, and one for each image."""
        late = self.similarity == "late-interaction"
        return late or not self.image_tower.frozen or self.image_tower.features == "computed"

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is learned, up to rounding; the others say how the work is done.

        A run that was stopped goes on under other values of the others: with fewer processes, say.
        """
        return self.model_dump(mode="json", exclude=HOW)

    @model_validator(mode="after")
    def _possible(self) -> Pretrain:
        parts = self.accumulation * self.processes
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by processes × accumulation = {parts}; "
                f"use {max(self.batch_size // parts, 1) * parts} or {(self.batch_size // parts + 1) * parts}"
            )
        if self.similarity == "late-interaction":
            if self.text.corner_tokens:
                raise ValueError(
                    "similarity late-interaction compares words, not corner tokens; set text.corner_tokens to 0"
                )
            if self.loss.raw_components:
                raise ValueError(
                    "loss.raw_components are of one feature for each image, which late-interaction has not; set it to 0"
                )
        nodes = getattr(self.launch, "nodes", 1)
        if self.processes % nodes:
            raise ValueError(
                f"processes {self.processes} is the number on all machines and not divisible by launch.nodes {nodes}; "
                f"use {(self.processes // nodes + 1) * nodes}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} names one twice")
        return self


# --- evaluate, report ---------------------------------------------------------------------------------------------


class ScenesBenchmark(Section):
    """Held-out scenes: long and short texts in wording that training never had, and prompts for the shape."""

    kind: Literal["scenes"]
    split: Literal["val", "test"] = "test"
    size: Count = Field(description="scenes in the split; another number is an error")
    max_unseen_tokens: Share = Field(0.01, description="share of the texts' word pieces that no training text has")


class HeldOutBenchmark(Section):
    """Held-out images of the data set itself: its raw captions, and its long captions where there are any."""

    kind: Literal["held-out"]
    split: Literal["val", "test"] = "test"


Benchmark = Annotated[ScenesBenchmark | HeldOutBenchmark, Field(discriminator="kind")]


class Evaluate(Section):
    """Zero-shot retrieval and classification of each trained model."""

    batch_size: Count = 250
    benchmarks: dict[Name, Benchmark]
    min_score_over_chance: Annotated[float, Field(ge=0)] = Field(
        1.0, description="times chance that short-text R@1 must reach; less fails the gate"
    )


class Report(Section):
    """The page that a person reads at the end."""

    title: str = "LoTLIP"
    note: str = Field("", description="said in plain words at the top of the page")
    contact_sheet: NonNegative = Field(12, description="pictures shown with their captions")


class Tracking(Section):
    """MLflow; MLFLOW_TRACKING_URI in the environment goes before `uri`."""

    uri: str = "sqlite:///mlflow.db"
    experiment: str = "lotlip"


class Orchestration(Section):
    """Prefect's side of every stage."""

    workers: Count = Field(2, description="units that run at the same time")
    retries: NonNegative = Field(2, description="tries after the first, for a unit")
    retry_delay_seconds: Annotated[float, Field(ge=0)] = 1.0


class Params(Section):
    """The whole of params.yaml."""

    paths: Paths = Paths()
    ingest: Ingest
    image_tower: ImageTower
    caption: CaptionStage = CaptionStage()
    shard: Shard = Shard()
    pretrain: Pretrain = Pretrain()
    evaluate: Evaluate
    report: Report = Report()
    tracking: Tracking = Tracking()
    orchestration: Orchestration = Orchestration()
    ablations: dict[Name, dict[str, Any]] = Field(description="name → its differences from `pretrain`")

    @model_validator(mode="after")
    def _ablations_resolve(self) -> Params:
        if not self.ablations:
            raise ValueError("ablations is empty: name at least one, such as `lotlip: {}`")
        problems: list[str] = []
        for name in self.ablations:
            try:
                problems += self._caption_problems(name, self.ablation(name).long_texts)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError("ablations cannot be used:", problems)
        return self

    def _caption_problems(self, name: str, long_texts: LongTexts) -> list[str]:
        """What an ablation asks of the caption stage that it does not have."""
        known = self.caption.captioners
        if long_texts.sub_captions and not known:
            return [
                f"ablations.{name} draws long texts, but caption.captioners is empty: "
                "add a captioner, or set long_texts.sub_captions to 0"
            ]
        unknown = sorted(set(long_texts.captioners) - set(known))
        if unknown:
            there = ", ".join(known) or "none"
            return [f"ablations.{name} draws from {', '.join(unknown)}, but caption.captioners has {there}"]
        return []

    def ablation(self, name: str) -> Pretrain:
        """`pretrain` with the differences of one ablation.

        Raises:
            ConfigError: no such ablation, or one of its keys or values is wrong.
        """
        if name not in self.ablations:
            raise ConfigError(f"no ablation {name!r} in params.yaml; there are: {', '.join(self.ablations)}")
        base = self.pretrain.model_dump(mode="json", exclude_unset=True)
        place = f"ablations.{name}"
        return _validated(Pretrain, merge(base, self.ablations[name]), place, under=place)


def merge(base: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `differences` laid over it, mapping by mapping; any other value replaces the one below."""
    merged = dict(base)
    for key, value in differences.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted names.

    >>> flatten({"text": {"corner_tokens": 2}, "steps": 5})
    {'text.corner_tokens': 2, 'steps': 5}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_params(path: Path | str = "params.yaml") -> Params:
    """Reads params.yaml.

    Raises:
        ConfigError: the file is missing, is not YAML, or has keys or values that cannot be used.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is not there; run from the project's root, or copy a file of profiles/ to it"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, one per stage")
    return _validated(Params, data, str(path))


def _validated(model: type[SectionT], data: Mapping[str, Any], place: str, under: str = "") -> SectionT:
    """`data` as a section that stands at the key `under` of params.yaml."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(model, dict(problem), under)]
        raise ConfigError(f"{place} cannot be used:", problems) from None


def _explain(model: type[Section], problem: dict[str, Any], under: str) -> list[str]:
    """One of pydantic's complaints as lines for a person."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.problems
    keys, known = _place(model, problem["loc"])
    where = ".".join([under, *keys] if under else keys)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return [f"{where}: unknown key{hint} (known here: {', '.join(known)})"]
    if problem["type"] == "missing":
        return [f"{where}: missing; it has no default"]
    if problem["type"] == "union_tag_not_found":
        return [f"{where}.kind: missing; it has no default"]
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    return [f"{where}: {message}{shown}" if where else message]


def _place(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """Pydantic's location as the keys that lead there in params.yaml, and the keys that are known beside the last."""
    kind: Any = model
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        chosen = [option for option in get_args(kind) if _has_tag(option, part)]
        if chosen:  # a discriminated union adds the chosen kind's tag to the location
            kind = chosen[0]
            continue
        keys.append(str(part))
        known = []
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            known = sorted(kind.model_fields)
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        else:  # a mapping's own keys (a captioner's name) lead to its values, a list's numbers to its items
            kind = next(reversed(get_args(kind)), None)
    return keys, known


def _has_tag(option: Any, tag: Any) -> bool:
    if not (isinstance(option, type) and issubclass(option, BaseModel) and "kind" in option.model_fields):
        return False
    return tag in get_args(option.model_fields["kind"].annotation)
