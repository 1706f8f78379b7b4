"""The types that pass between stages: images, captions, failures, units of work and their reports."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

# In WebDataset a key ends at the first dot of a member's name, so a key has no dot.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")

SPLITS = ("train", "val", "test")

# Folder of Great Expectations' pages, beside the stage records and in the report.
DATA_DOCS = "data-docs"


class NonRetryableError(ValueError):
    """Something that every unit needs cannot be used. The stage ends at once, because only the user can fix it."""


@dataclass(frozen=True)
class ItemWarning:
    """A warning about an item.

    Attributes:
        key: the sample's key, or its file's name if it has no key yet.
        where: the file, member or row, in a form that a person can look up.
        reason: one line for a person.
        kind: one word for counting: "unreadable", "empty", "encoding", "duplicate", "missing", …
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # for `read_record`

    key: str
    where: str
    reason: str
    kind: str


class Failure(ItemWarning):
    """An item that a stage could not process, and why."""


@dataclass(frozen=True)
class ImageRecord:
    """One image with its short caption.

    Attributes:
        key: name of the sample, unique in the data set; matches `KEY_PATTERN`.
        image: the encoded file, byte for byte as in the source.
        extension: of the encoding, without the dot: "jpg", "png", "webp", …
        short_caption: the caption that the source has for the image; never empty.
        width: in pixels.
        height: in pixels.
        sha256: of `image`, in hex.
        scene: the picture's content, if the source knows it (generated scenes do).
        warnings: irregularities of an image that was kept, such as contents that do not match the file's name.
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
        text: the full caption.
        sub_captions: its sentences, by `lotlip.data.text.split_sub_captions`.
        tokens: word pieces of the text, without special tokens.
        finish_reason: "stop" when the captioner ended by itself, "length" when it was cut.
        revision: of the model or table that wrote it.
        prompt: that the captioner was given; empty if none.
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
    """A caption with the measures of `lotlip.caption.quality`.

    Attributes:
        words: number of words in the text.
        repetition: share of its 4-grams that occurred earlier in the text.
        truncated: whether it was cut off, or has no end.
        control: number of control characters.
        mojibake: number of places that were decoded wrongly.
        refusal: the phrase by which the captioner refuses; empty if it does not.
        reasoning: the first sign that the text is the captioner's reasoning, not its answer; empty if there is none.
        agreement: share of the short caption's content words that the text contains; None if that has none.
        own_agreement: the same, for only those words that the next image's short caption lacks, averaged over the next
            few images.
        next_agreement: share of the words of the next image's short caption, without those of its own, that the text
            contains; averaged over the same images. This and `own_agreement` are None if no words distinguish them.
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
    """A piece of a stage's work that is finished, retried and reused as a whole: a partition.

    Attributes:
        split: of all its items, one of `SPLITS`. None: an item's split follows from its key, the unit becomes one
            partition per split, and its number of items is unknown until it is read.
        index: number of the unit in its split (or among all units, if these have no split), from 0.
        items: what the source reads for it (scene numbers, file names, the name of a tar, …).
    """

    split: str | None
    index: int
    items: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name for messages: "train/part-00000", or "part-00000" if the unit has no split."""
        return f"part-{self.index:05d}" if self.split is None else self.partition(self.split)

    def partition(self, split: str) -> str:
        """Path of a split's partition in the stage's folder, without a suffix: "train/part-00000"."""
        return f"{split}/part-{self.index:05d}"


@dataclass(frozen=True)
class UnitReport:
    """The result of a unit. `read == written + len(failures)` always holds.

    Attributes:
        name: of the unit.
        read: number of input items.
        written: number of output items.
        failures: the other items.
        warnings: about the output items.
        sha256: of the unit's files, in hex.
        bytes: size of the unit's files.
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
                f"{self.name}: {self.read} items were read, {self.written} were written and {len(self.failures)} "
                "failed: some were lost without a reason"
            )
