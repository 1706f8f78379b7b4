"""`index.json`, by which every stage that writes units says what is in its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import AliasChoices, Field

from lotlip.core.files import sha256_json
from lotlip.core.record import Record
from lotlip.data.records import Failure, ItemWarning, UnitReport
from lotlip.data.text import SentenceEnds

INDEX_FILE = "index.json"
SHOWN_FAILURES = 100


class Totals(Record):
    """Sums over units. Earlier versions called warnings remarks.

    Attributes:
        read: items that went in.
        written: items that came out.
        failed: the others.
        failure_kinds: kind → number of failures.
        failures: the first of them.
        warning_kinds: kind → number of warnings about items that came out.
        warnings: the first of them.
        hash: over the units' names and hashes.
    """

    read: int
    written: int
    failed: int
    failure_kinds: dict[str, int]
    failures: list[Failure]
    warning_kinds: dict[str, int] = Field(validation_alias=AliasChoices("warning_kinds", "remark_kinds"))
    warnings: list[ItemWarning] = Field(validation_alias=AliasChoices("warnings", "remarks"))
    hash: str

    @classmethod
    def of(cls, reports: Sequence[UnitReport], **more: Any) -> Self:
        """The sums over some reports, with a kind of index's own fields."""
        failures = [failure for report in reports for failure in report.failures]
        warnings = [warning for report in reports for warning in report.warnings]
        return cls(
            read=sum(report.read for report in reports),
            written=sum(report.written for report in reports),
            failed=len(failures),
            failure_kinds=dict(sorted(Counter(failure.kind for failure in failures).items())),
            failures=failures[:SHOWN_FAILURES],
            warning_kinds=dict(sorted(Counter(warning.kind for warning in warnings).items())),
            warnings=warnings[:SHOWN_FAILURES],
            hash=sha256_json([[report.name, report.sha256] for report in reports]),
            **more,
        )


class UnitEntry(Record):
    """A unit's line: its name, its items, and size and hash of its files; no hash where it failed as a whole."""

    name: str
    written: int
    bytes: int
    sha256: str


class UnitIndex(Totals):
    """Of ingest: its units, in order."""

    units: list[UnitEntry]

    @classmethod
    def of(cls, reports: Sequence[UnitReport], **more: Any) -> Self:
        """The index of some reports, with a kind of index's own fields."""
        units = [UnitEntry(name=r.name, written=r.written, bytes=r.bytes, sha256=r.sha256) for r in reports]
        return super().of(reports, units=units, **more)

    @property
    def whole(self) -> list[UnitEntry]:
        """The units that have files: not those that failed as a whole."""
        return [unit for unit in self.units if unit.sha256]


class CaptionIndex(UnitIndex):
    """Of a captioner.

    Attributes:
        revision: of what wrote the captions.
        prompt: what it was asked; empty where nothing was asked.
        quality: as of `lotlip.caption.quality.summarise`.
        sentence_ends: where captions were split into sub-captions; files of earlier versions lack it.
    """

    revision: str = ""
    prompt: str = ""
    quality: dict[str, Any] = Field({})
    sentence_ends: SentenceEnds = "released"


class ShardEntry(Record):
    """A shard's line: its name, its samples, size and hash of its tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


class SplitEntry(Record):
    """A split's samples and shards. A shard in which all samples failed is not listed."""

    samples: int
    shards: list[ShardEntry]


class ShardIndex(Totals):
    """Of the shards.

    Attributes:
        splits: split → its shards.
        statistics: "raw" or captioner → "images", "texts", "sub_captions_per_text", "tokens_per_text".
        features: whether samples have features of the frozen image tower.
        tokenizer: of the vocabulary; "" in files of earlier versions, whose vocabulary is of a part of the texts.
        vocabulary: ids of all word pieces in training texts.
        sentence_ends: where training and the models split texts; files of earlier versions lack it.
        rewriters: the captioners whose texts reword the short captions.
    """

    splits: dict[str, SplitEntry]
    statistics: dict[str, dict[str, int | float]]
    features: bool
    tokenizer: str = ""
    vocabulary: list[int]
    sentence_ends: SentenceEnds = "released"
    rewriters: list[str] = Field([])

    @property
    def describers(self) -> list[str]:
        """The captioners whose texts are long captions."""
        return [name for name in self.statistics if name not in ("raw", *self.rewriters)]

    @property
    def shards(self) -> list[ShardEntry]:
        """Those of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]


IndexT = TypeVar("IndexT", bound=Totals)


def read_index(folder: Path, kind: type[IndexT]) -> IndexT:
    """The index of a stage's folder.

    Raises:
        ValueError: there is none, so the stage did not finish; or it is of another kind.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the stage that writes {folder} has not finished; run `dvc repro`")
    return kind.load(path)


def write_index(folder: Path, reports: Sequence[UnitReport], kind: type[IndexT], **more: Any) -> IndexT:
    """Writes the index of some units and returns it; `more` are its own fields."""
    index = kind.of(reports, **more)
    index.write(folder / INDEX_FILE)
    return index
