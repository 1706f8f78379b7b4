"""The types that pass between stages: what a source yields, what a captioner adds, what a unit leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

# A WebDataset key ends at the first dot of a member's name, so a key has no dot.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")

SPLITS = ("train", "val", "test")

# Folder of Great Expectations' pages beside the records of the stages, and in the report.
DATA_DOCS = "data-docs"


class Unusable(ValueError):
    """Something that every unit needs cannot be used: the stage ends at once, and a person mends it."""


@dataclass(frozen=True)
class ItemWarning:
    """Something to be told of an item.

    Attributes:
        key: the sample's key (or its file's name where it never got one).
        where: the file, member or row that it is about, as a person would look it up.
        reason: one line for a person.
        kind: one word for counting: "unreadable", "empty", "encoding", "duplicate", "missing", …
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # for `read_record`

    key: str
    where: str
    reason: str
    kind: str


class Failure(ItemWarning):
    """An item that did not come through a stage, and why."""


@dataclass(frozen=True)
class ImageRecord:
    """One image with the caption it came with.

    Attributes:
        key: name of the sample, unique in the data set; matches `KEY_PATTERN`.
        image: the encoded file, byte for byte as the source had it.
        extension: of the encoding, without the dot: "jpg", "png", "webp", …
        short_caption: the short caption that came with the image; never empty.
        width: pixels.
        height: pixels.
        sha256: of `image`, in hex.
        scene: what is in the picture, where the source knows it (the generated scenes do).
        warnings: what is odd about it, though it came through: a file that is not what its name says.
    """

    key: str
    image: bytes
    extension: str
    short_caption: str
    width: int
    height: int
    sha256: str
    scene: dict[str, Any] | None = None
    warnings: tuple[ItemWarning, ...] = ()


@dataclass(frozen=True)
class Caption:
    """One long caption of one image.

    Attributes:
        key: the image's key.
        captioner: name of the captioner in params.yaml.
        text: the caption, whole.
        sub_captions: its sentences, by `lotlip.data.text.split_sub_captions`.
        tokens: word pieces of the text, special tokens not counted.
        finish_reason: "stop" when the captioner ended by itself, "length" when it was cut.
        revision: of the model (or of the table) that wrote it.
        prompt: what it was asked; empty where nothing was asked.
    """

    key: str
    captioner: str
    text: str
    sub_captions: list[str]
    tokens: int
    finish_reason: str
    revision: str
    prompt: str


@dataclass(frozen=True)
class MeasuredCaption(Caption):
    """A caption with what `lotlip.caption.quality` measures of it.

    Attributes:
        words: in the text.
        repetition: share of its runs of four words that were there before.
        truncated: it was cut off, or has no end.
        control: control characters in it.
        mojibake: places in it that were decoded wrongly.
        refusal: the phrase by which the captioner refuses; empty where it does not.
        reasoning: the first sign that it is the captioner's reasoning, not its answer; empty if there is none.
        agreement: share of the short caption's content words that it has; None where that has none.
        own_agreement: the same, of the words that the next image's short caption lacks: mean over the next few images.
        next_agreement: share that it has of the words of the next image's short caption that its own lacks: mean over
            those.
            Both are None where none of them has words to be told apart by.
    """

    words: int
    repetition: float
    truncated: bool
    control: int
    mojibake: int
    refusal: str
    reasoning: str
    agreement: float | None
    own_agreement: float | None
    next_agreement: float | None


@dataclass(frozen=True)
class Unit:
    """A piece of a stage's work that is done whole, retried whole and never redone: a partition.

    Attributes:
        split: one of `SPLITS`, of all its items. None: the source tells each item's split by its key, the unit becomes
            a partition for each split, and how many items it has is known when it was read.
        index: counts the units of a split (or of all, where they have none) from 0.
        items: what the source reads for it (scene numbers, file names, the name of a tar, …).
    """

    split: str | None
    index: int
    items: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For a person: "train/part-00000", or "part-00000" where it has no split."""
        return f"part-{self.index:05d}" if self.split is None else self.partition(self.split)

    def partition(self, split: str) -> str:
        """Path of a split's partition in the stage's folder, without an ending: "train/part-00000"."""
        return f"{split}/part-{self.index:05d}"


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit's items. `read == written + len(failures)` always holds.

    Attributes:
        name: of the unit.
        read: items that went in.
        written: items that came out.
        failures: the others.
        warnings: about those that came out.
        sha256: of the unit's files, in hex.
        bytes: of the unit's files.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # for `read_record`

    name: str
    read: int
    written: int
    sha256: str
    bytes: int
    failures: list[Failure] = field(default_factory=list)
    warnings: list[ItemWarning] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.read != self.written + len(self.failures):
            raise AssertionError(
                f"{self.name}: {self.read} items went in, {self.written} came out and "
                f"{len(self.failures)} failed: some were lost without a reason"
            )
