"""The types that pass between stages: what a source yields, what a captioner adds, what a unit leaves."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

# A WebDataset key ends at the first dot of a member's name, so a key has no dot.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageRecord:
    """One image with the caption it came with.

    Attributes:
        key: name of the sample, unique in the data set; matches `KEY_PATTERN`.
        image: the encoded file, byte for byte as the source had it.
        extension: of the encoding, without the dot: "jpg", "png", "webp", …
        raw_caption: the short caption that came with the image; never empty.
        width: pixels.
        height: pixels.
        sha256: of `image`, in hex.
        scene: what is in the picture, where the source knows it (the generated scenes do).
    """

    key: str
    image: bytes
    extension: str
    raw_caption: str
    width: int
    height: int
    sha256: str
    scene: dict[str, Any] | None = None


@dataclass(frozen=True)
class Caption:
    """One long caption of one image.

    Attributes:
        key: the image's key.
        captioner: name of the captioner in params.yaml.
        text: the caption, whole.
        sub_captions: its sentences, by `lotlip.text.split_sub_captions`.
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
class Failure:
    """An item that did not come through a stage, and why.

    Attributes:
        key: the sample's key (or its file's name where it never got one).
        where: the file, member or row at fault, as a person would look it up.
        reason: one line for a person.
        kind: one word for counting: "unreadable", "empty", "encoding", "duplicate", "missing", …
    """

    key: str
    where: str
    reason: str
    kind: str


@dataclass(frozen=True)
class Unit:
    """A piece of a stage's work that is done whole, retried whole and never redone: a partition.

    Attributes:
        split: one of `SPLITS`.
        index: counts the units of a split from 0.
        items: what the source reads for it (scene numbers, file names, …).
    """

    split: str
    index: int
    items: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its path in the stage's folder, without an ending: "train/part-00000"."""
        return f"{self.split}/part-{self.index:05d}"


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit's items. `read == written + len(failures)` always holds.

    Attributes:
        name: of the unit.
        read: items that went in.
        written: items that came out.
        failures: the others.
        sha256: of the unit's files, in hex.
        bytes: of the unit's files.
    """

    name: str
    read: int
    written: int
    sha256: str
    bytes: int
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.read != self.written + len(self.failures):
            raise AssertionError(
                f"{self.name}: {self.read} items went in, {self.written} came out and "
                f"{len(self.failures)} failed: some were lost without a reason"
            )

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UnitReport:
        """The inverse of `to_json`."""
        return cls(**{**data, "failures": [Failure(**failure) for failure in data["failures"]]})
