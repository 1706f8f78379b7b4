"""Settings of the ingest stage: the source of images and short captions, and the requirements they must meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lotlip.core.section import Count, Section, Seed, Share
from lotlip.core.variants import Variants
from lotlip.data.scenes import SceneObjects


class SceneSourceConfig(SceneObjects):
    """The demo's world: pictures drawn from a seed, with their scene graphs."""

    kind: Literal["scenes"]
    path: Path = Field(description="the module that draws the scenes; DVC watches it")
    seed: Seed = Field(0, description="seed from which the scenes are drawn")
    image_size: Annotated[int, Field(ge=32, le=512)] = Field(64, description="pixels per side")
    train: Count = Field(8000, description="scenes in the training split")
    val: Count = Field(500, description="scenes in the validation split")
    test: Count = Field(1000, description="scenes in the test split")


class SplitByKey(Section):
    """Settings of a source without splits of its own: a sample's split depends only on its key and the seed."""

    val_share: Share = Field(0.05, description="share of the samples in the validation split")
    test_share: Share = Field(0.1, description="share of the samples in the test split")
    split_seed: Seed = Field(0, description="seed of the split; another seed splits the samples differently")

    @model_validator(mode="after")
    def _some_left_to_train(self) -> SplitByKey:
        if self.val_share + self.test_share >= 1:
            raise ValueError("val_share + test_share must be below 1, to leave samples for training")
        return self


class FolderSourceConfig(SplitByKey):
    """A folder of images, each with a `.txt` file of the same stem that contains its short caption."""

    kind: Literal["folder"]
    path: Path = Field(description="folder of images, read with its subfolders")


class WebDatasetSourceConfig(SplitByKey):
    """Tars of images with captions, as img2dataset's `output_format=webdataset` writes them."""

    kind: Literal["webdataset"]
    path: Path = Field(description="a folder of tars, a tar, or a text file with the path or URL of tars on each line")
    images: Annotated[list[str], Field(min_length=1)] = Field(
        ["jpg", "jpeg", "png", "webp", "avif", "heic", "heif", "jxl", "gif", "bmp", "tif", "tiff"],
        description="endings of the members that may be a sample's image, in order of preference",
    )
    caption: str | None = Field("txt", description="ending of the member with the short caption; null: there is none")
    caption_field: str | None = Field(
        "caption", description="field of a sample's json with the short caption, if `caption` gives none"
    )
    key: str | None = Field(
        None,
        description="field of a sample's json that names it, such as `url`; null: its name in the tar",
    )

    @model_validator(mode="after")
    def _some_caption(self) -> WebDatasetSourceConfig:
        if self.caption is None and self.caption_field is None:
            raise ValueError("caption and caption_field are both null; set one of them")
        return self


class ParquetSourceConfig(SplitByKey):
    """Parquet files with a row per image; the image itself is in the row, or a file below `images`."""

    kind: Literal["parquet"]
    path: Path = Field(description="a file, or a folder of files")
    image: str = Field("image", description="column of encoded images (also {bytes, path}), or of paths below `images`")
    images: Path | None = Field(None, description="base folder of the paths in the image column")
    caption: str = Field("caption", description="column of the short caption")
    key: str | None = Field(None, description="column that names samples; null: the image's path, or the row")


class CsvSourceConfig(SplitByKey):
    """CSV and TSV files (UTF-8, with a header line) with a row per image; the images are files below `images`."""

    kind: Literal["csv"]
    path: Path = Field(description="a file, or a folder of files")
    image: str = Field("image", description="column of paths below `images`")
    images: Path = Field(description="base folder of the paths in the image column")
    caption: str = Field("caption", description="column of the short caption")
    key: str | None = Field(None, description="column that names samples; null: the image's path")


class JsonlSourceConfig(CsvSourceConfig):
    """JSONL files (UTF-8) with an object per line and image; the images are files below `images`."""

    kind: Literal["jsonl"]  # type: ignore[assignment]


class JsonSourceConfig(CsvSourceConfig):
    """JSON files (UTF-8) with an object per image, in a list or one per line; the images are files below `images`."""

    kind: Literal["json"]  # type: ignore[assignment]


SourceConfig = Annotated[
    SceneSourceConfig
    | FolderSourceConfig
    | WebDatasetSourceConfig
    | ParquetSourceConfig
    | CsvSourceConfig
    | JsonlSourceConfig
    | JsonSourceConfig,
    Variants("lotlip.sources", required_fields=("path",)),
]


class ImagesConfig(Section):
    """Requirements for images, and how they are stored."""

    min_side: Count = Field(1, description="smallest side in pixels; smaller images are failures")
    max_pixels: Annotated[int, Field(ge=1, le=2**28)] = Field(
        100_000_000, description="largest width × height; larger images are failures and are not decoded"
    )
    max_aspect_ratio: Annotated[float, Field(ge=1)] = Field(
        30, description="largest ratio of the longer to the shorter side; more extreme images are failures"
    )
    max_bytes: Count = Field(
        100_000_000, description="largest size of an encoded image; larger ones are failures and are not read"
    )
    shorter_side: Count | None = Field(None, description="pixels to which larger images are resized; null: no resizing")
    encoding: Literal["keep", "jpeg", "png", "webp"] = Field(
        "keep", description="keep: the original file; others: re-encoded as a viewer shows it, without metadata"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(90, description="quality of re-encoded JPEG and WebP images")


class TextsConfig(Section):
    """Rules that leave samples of the training split out by their texts, as ALIGN does (arXiv 2102.05918).

    All are off by default. Counts are those of the training split.
    """

    min_words: Count | None = Field(None, description="smallest number of words in a text (3 in ALIGN)")
    max_words: Count | None = Field(None, description="largest number of words in a text (20 in ALIGN)")
    max_images_per_text: Count | None = Field(
        None, description="largest number of images that share a text; more are left out, all of them (10 in ALIGN)"
    )
    max_texts_per_image: Count | None = Field(
        None,
        description="largest number of samples of an image; more are left out, all of them (1000 in ALIGN)",
    )
    min_token_count: Count | None = Field(
        None,
        description="how often each word of a text, and each pair of neighbouring words, must occur in all texts; "
        "ALIGN has the 100 million most frequent ones instead",
    )

    @property
    def rules(self) -> dict[str, int]:
        """The rules that are on, with their limits."""
        return self.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _some_length(self) -> TextsConfig:
        if self.min_words and self.max_words and self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}; lower it")
        return self


class IngestConfig(Section):
    """Reads images and short captions, and writes them as partitions."""

    source: SourceConfig = Field(description="source of images and short captions")
    images: ImagesConfig = ImagesConfig()
    texts: TextsConfig = TextsConfig()
    partition_size: Count = Field(
        1000, description="images per partition, the unit of work; ignored for tars, where each tar is a unit"
    )
    evaluation_images: list[Path] = Field(
        [], description="folders of images, such as a benchmark's, that are excluded from the training split"
    )
    max_evaluation_hash_distance: Annotated[int, Field(ge=0, le=11)] | None = Field(
        6,
        description="a training image is excluded as a resized or re-encoded copy if its perceptual hash differs in "
        "at most this many of 64 bits from that of one in evaluation_images; null: only exact copies are excluded",
    )
    max_failure_share: Share = Field(0.01, description="largest share of items that fail")
    max_left_out_share: Share = Field(
        0.9,
        description="largest share of items left out as copies of another image or of one in evaluation_images, or by "
        "the rules of `texts`; these do not count for max_failure_share",
    )
    max_broken_unit_share: Share = Field(
        0.05, description="largest share of source files (such as tars) that are broken"
    )
    max_repeated_caption_share: Share = Field(0.9, description="largest share of short captions that equal another")
    max_constant_share: Share = Field(0.05, description="largest share of sampled images that have a single colour")

    def inputs(self) -> Iterator[tuple[str, Path]]:
        """The files and folders that the stage reads, each with its key of params.yaml; URLs are skipped."""
        if "://" not in str(self.source.path):
            yield "ingest.source.path", Path(self.source.path)
        images = getattr(self.source, "images", None)
        if isinstance(images, Path):
            yield "ingest.source.images", images
        for number, path in enumerate(self.evaluation_images):
            yield f"ingest.evaluation_images.{number}", path
