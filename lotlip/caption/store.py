"""Captions that were written once: a partition is found by its content and by who wrote it, and never captioned twice.

A captioner's folder is `<captioner>/<hash of about>/`. `about.json` in it says in plain words what wrote its captions;
`train/part-00000-<hash>.parquet` and `.json` are those of the partition of that name and content. Another prompt, model
or revision is another folder, so going back to the former finds the former's captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lotlip.caption.captioners import Captioner
from lotlip.core.files import sha256_files, sha256_json, write_json
from lotlip.data.partitions import CAPTIONS, finished, read_captions, read_records, read_table, write_captions
from lotlip.data.records import Caption, Failure, UnitReport

# Tokens and sub-captions follow from the text, by a tokenizer that may change: they are counted when published.
STORED = pa.schema(
    [CAPTIONS.field(name) for name in ("key", "captioner", "text", "finish_reason", "revision", "prompt")]
)

_LONE = re.compile("[\ud800-\udfff]")

# Kinds of failures that say nothing of the image: such images are tried again when the partition is next asked for.
PASSING = ("server",)


@dataclass(frozen=True)
class Partition:
    """A partition of images, as ingest's index has it.

    Attributes:
        name: "train/part-00000".
        images: in it.
        sha256: of its files.
    """

    name: str
    images: int
    sha256: str

    @property
    def stored(self) -> str:
        """What its captions are called in the store."""
        return f"{self.name}-{self.sha256[:16]}"


class CaptionStore:
    """The captions of one captioner as it is now.

    Args:
        root: of all captioners' stores.
        captioner: its name in params.yaml.
        about: all that decides its captions besides the image.
    """

    def __init__(self, root: Path, captioner: str, about: dict[str, Any]) -> None:
        self.about = {"captioner": captioner, **about}
        self.folder = root / captioner / sha256_json(self.about)[:16]

    def describe(self) -> None:
        """Writes `about.json`; called once, before partitions are captioned side by side."""
        write_json(self.folder / "about.json", self.about)

    def captioned(self, partition: Partition, source: Path, author: Captioner) -> UnitReport:
        """Has a partition captioned, unless it was; afterwards `read` gives its captions.

        A partition is stored whole, with its failures, or not at all: where the captioner raises, nothing is.

        Args:
            partition: which.
            source: folder of ingest.
            author: writes what is not there yet.

        Returns:
            The stored partition's report.
        """
        report = self._found(partition)
        if report and not any(failure.kind in PASSING for failure in report.failures):
            return report
        known: dict[str, Caption | Failure] = {}
        if report:
            known |= {failure.key: failure for failure in report.failures if failure.kind not in PASSING}
            known |= {caption.key: caption for caption in self.read(partition)}
        asked = (record for record in read_records(source, partition.name) if record.key not in known)
        keys = read_table(source, partition.name, ["key"])["key"]
        items = _in_order(keys, known, author.caption(asked))
        return write_captions(partition.stored, map(_writable, items), partition.images, self.folder, STORED)

    def read(self, partition: Partition) -> Iterator[Caption]:
        """The captions of a stored partition, in order; without sub-captions and tokens."""
        for row in read_captions(self.folder, partition.stored).to_dict("records"):
            yield Caption(**{str(name): value for name, value in row.items()}, sub_captions=[], tokens=0)

    def _found(self, partition: Partition) -> UnitReport | None:
        """The partition's report, where its captions are as it says."""
        report = finished(partition.stored, self.folder)
        path = self.folder / f"{partition.stored}.parquet"
        return report if report and path.is_file() and sha256_files([path]) == report.sha256 else None


def _in_order(
    keys: Iterable[str], known: Mapping[str, Caption | Failure], written: Iterator[Caption | Failure]
) -> Iterator[Caption | Failure]:
    """What is known of each key, else what is written next; what is left over at the end is for `UnitReport` to see."""
    for key in keys:
        item = known.get(key) or next(written, None)
        if item:
            yield item
    yield from written


def _writable(item: Caption | Failure) -> Caption | Failure:
    """Half of a surrogate pair, as a server's JSON may have it, cannot be written; the sign for what is lost can."""
    if isinstance(item, Failure):
        return item
    return replace(item, text=_LONE.sub("\ufffd", item.text))
