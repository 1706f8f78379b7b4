"""Settings of the ingest stage: where images and short captions come from, and what they must be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lotlip.core.section import Count, Section, Share
from lotlip.core.variants import Variants


class SceneSourceConfig(Section):
    """The demo's world: pictures drawn from a seed, with their scene graphs."""

    kind: Literal["scenes"]
    path: Path = Field(description="the module that draws the scenes; DVC watches it")
    seed: int = Field(0, description="of the drawing of the scenes")
    image_size: Annotated[int, Field(ge=32, le=512)] = Field(64, description="pixels of a side")
    train: Count = Field(8000, description="scenes in the training split")
    val: Count = Field(500, description="scenes in the validation split")
    test: Count = Field(1000, description="scenes in the test split")


class SplitByKey(Section):
    """A source that leaves the split to chance: it depends on a sample's key and the seed, and on nothing else."""

    val_share: Share = Field(0.05, description="share of the samples in the validation split")
    test_share: Share = Field(0.1, description="share of the samples in the test split")
    split_seed: int = Field(0, description="seed of the split; another one splits the samples differently")

    @model_validator(mode="after")
    def _some_left_to_train(self) -> SplitByKey:
        if self.val_share + self.test_share >= 1:
            raise ValueError("val_share + test_share must stay below 1, so that something is left to train on")
        return self


class FolderSourceConfig(SplitByKey):
    """A directory of images, each with a `.txt` of the same stem that holds its short caption."""

    kind: Literal["folder"]
    path: Path = Field(description="folder of the images; subfolders are read")


class WebDatasetSourceConfig(SplitByKey):
    """Tars of images with their captions, as img2dataset's `output_format=webdataset` leaves them."""

    kind: Literal["webdataset"]
    path: Path = Field(description="a folder of tars, a tar, or a text file with the address of tars in each line")
    images: Annotated[list[str], Field(min_length=1)] = Field(
        ["jpg", "jpeg", "png", "webp", "avif", "heic", "heif", "jxl", "gif", "bmp", "tif", "tiff"],
        description="endings of the members that may be a sample's image, best first",
    )
    caption: str | None = Field("txt", description="ending of the member that holds the short caption; null: none does")
    caption_field: str | None = Field(
        "caption", description="field of a sample's json that holds the short caption where `caption` gives none"
    )
    key: str | None = Field(
        None,
        description="field of its json that a sample is called by, such as `url`; without it, its name in the tar",
    )

    @model_validator(mode="after")
    def _some_caption(self) -> WebDatasetSourceConfig:
        if self.caption is None and self.caption_field is None:
            raise ValueError("caption and caption_field are both null; one of them must say where short captions are")
        return self


class ParquetSourceConfig(SplitByKey):
    """Parquet files, a row for each image; the image itself is in the row, or a file below `images`."""

    kind: Literal["parquet"]
    path: Path = Field(description="a file, or a folder of them")
    image: str = Field("image", description="column of encoded images ({bytes, path} too), or of paths below `images`")
    images: Path | None = Field(None, description="folder that the image column's paths start from")
    caption: str = Field("caption", description="column of the short caption")
    key: str | None = Field(None, description="column that a sample is called by; without it, its image's path or row")


class CsvSourceConfig(SplitByKey):
    """CSV files (UTF-8, a header line), a row for each image; the images are files below `images`."""

    kind: Literal["csv"]
    path: Path = Field(description="a file, or a folder of them")
    image: str = Field("image", description="column of paths below `images`")
    images: Path = Field(description="folder that the image column's paths start from")
    caption: str = Field("caption", description="column of the short caption")
    key: str | None = Field(None, description="column that a sample is called by; without it, its image's path")


SourceConfig = Annotated[
    SceneSourceConfig | FolderSourceConfig | WebDatasetSourceConfig | ParquetSourceConfig | CsvSourceConfig,
    Variants("lotlip.sources", needs=("path",)),
]


class ImagesConfig(Section):
    """What an image must be to come in, and how it is stored."""

    min_side: Count = Field(1, description="pixels; smaller ones are failures")
    max_pixels: Annotated[int, Field(ge=1, le=2**28)] = Field(
        100_000_000, description="width × height; larger ones are failures, before they are decoded"
    )
    max_aspect_ratio: Annotated[float, Field(ge=1)] = Field(
        30, description="of the longer to the shorter side; more extreme ones are failures"
    )
    max_bytes: Count = Field(100_000_000, description="of the encoded image; larger ones are failures, never read")
    shorter_side: Count | None = Field(None, description="pixels that a larger one is brought to; smaller ones stay")
    encoding: Literal["keep", "jpeg", "png", "webp"] = Field(
        "keep", description="keep: the file as it is; others: the picture that a viewer shows, without metadata"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(90, description="of JPEG and WebP that are written here")


class IngestConfig(Section):
    """Brings images and short captions in, as partitions."""

    source: SourceConfig = Field(description="where images and short captions come from")
    images: ImagesConfig = ImagesConfig()
    partition_size: Count = Field(
        1000, description="images in a partition, the unit of work; not used for tars, where each tar is a unit"
    )
    evaluation_images: list[Path] = Field(
        [], description="folders of images (of a benchmark, say) that are left out of the training split"
    )
    max_evaluation_hash_distance: Annotated[int, Field(ge=0, le=11)] | None = Field(
        6,
        description="of the 64 bits of perceptual hashes: a training image that differs in at most so many from one in "
        "evaluation_images is left out as a resized or re-encoded copy; null: only exact copies are",
    )
    max_failure_share: Share = Field(0.01, description="of the items; more fails the gate, as for each limit below")
    max_left_out_share: Share = Field(
        0.9,
        description="of the items that are left out as copies of another image or of one in evaluation_images; "
        "they do not count for max_failure_share",
    )
    max_broken_unit_share: Share = Field(0.05, description="of the source's files, as tars, that are broken or cut off")
    max_repeated_caption_share: Share = Field(0.9, description="of the short captions that are word for word another's")
    max_constant_share: Share = Field(0.05, description="of the images looked at that are one colour all over")

    def inputs(self) -> Iterator[tuple[str, Path]]:
        """The files and folders that the stage reads, each with its key of params.yaml; addresses are left out."""
        if "://" not in str(self.source.path):
            yield "ingest.source.path", Path(self.source.path)
        images = getattr(self.source, "images", None)
        if isinstance(images, Path):
            yield "ingest.source.images", images
        for number, path in enumerate(self.evaluation_images):
            yield f"ingest.evaluation_images.{number}", path
