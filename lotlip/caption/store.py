"""Stores captions by partition content and captioner, so that no partition is captioned twice.

A captioner's folder is `<captioner>/<hash of about>/`. Its `about.json` describes what wrote the captions;
`train/part-00000-<hash>.parquet` and `.json` belong to the partition with that name and content. Another prompt, model
or revision gets another folder, so returning to the earlier one finds its captions again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lotlip.caption.captioners import Captioner
from lotlip.core.caches import cache_folder, lock
from lotlip.core.files import read_json, sha256_files, sha256_json, write_json
from lotlip.data.partitions import CAPTIONS, finished, read_captions, read_records, read_table, write_captions
from lotlip.data.records import Caption, Failure, UnitReport

# Tokens and sub-captions depend on the tokenizer, which may change: they are computed when captions are published.
STORED = pa.schema(
    [CAPTIONS.field(name) for name in ("key", "captioner", "text", "finish_reason", "revision", "prompt")]
)

_SURROGATE = re.compile("[\ud800-\udfff]")

# Kinds of failures that are not due to the image: such images are retried when the partition is captioned again.
TRANSIENT = ("server",)


@dataclass(frozen=True)
class Partition:
    """A partition of images, as listed in ingest's index.

    Attributes:
        name: "train/part-00000".
        images: number of images.
        sha256: of its files.
    """

    name: str
    images: int
    sha256: str

    @property
    def stored(self) -> str:
        """The name of its captions in the store."""
        return f"{self.name}-{self.sha256[:16]}"


class CaptionStore:
    """The stored captions of one captioner with its current settings.

    Args:
        root: of all captioners' stores.
        captioner: its name in params.yaml.
        about: everything that decides its captions besides the image.
    """

    def __init__(self, root: Path, captioner: str, about: dict[str, Any]) -> None:
        self.about = {"captioner": captioner, **about}
        self.folder = root / captioner / sha256_json(self.about)[:16]

    def describe(self) -> None:
        """Writes `about.json`, before partitions are captioned in parallel. Checkouts that share a store may do so."""
        file = self.folder / "about.json"
        name = sha256_json(str(self.folder.resolve()))[:16]
        with lock(cache_folder() / f"captions-{name}.lock", wait=True):
            if not file.is_file() or read_json(file) != self.about:
                write_json(file, self.about)

    def ensure_captioned(self, partition: Partition, source: Path, author: Captioner) -> UnitReport:
        """Captions a partition unless that was done; afterwards `read` returns its captions.

        A partition is stored as a whole, with its failures; if the captioner raises, nothing is stored.

        Args:
            partition: to caption.
            source: folder of ingest.
            author: writes the missing captions.

        Returns:
            The stored partition's report.
        """
        if done := self.complete(partition):
            return done
        report = self._stored_report(partition)
        known: dict[str, Caption | Failure] = {}
        if report:
            known |= {failure.key: failure for failure in report.failures if failure.kind not in TRANSIENT}
            known |= {caption.key: caption for caption in self.read(partition)}
        missing = (record for record in read_records(source, partition.name) if record.key not in known)
        keys = read_table(source, partition.name, ["key"])["key"]
        items = _in_order(keys, known, author.caption(missing))
        return write_captions(partition.stored, map(_writable, items), partition.images, self.folder, STORED)

    def complete(self, partition: Partition) -> UnitReport | None:
        """The report of a stored partition, unless captions are missing that the captioner may write now."""
        report = self._stored_report(partition)
        return None if report is None or any(failure.kind in TRANSIENT for failure in report.failures) else report

    def read(self, partition: Partition) -> Iterator[Caption]:
        """The captions of a stored partition, in order, without sub-captions and tokens."""
        for row in read_captions(self.folder, partition.stored).to_dict("records"):
            yield Caption(**{str(name): value for name, value in row.items()}, sub_captions=[], tokens=0)

    def _stored_report(self, partition: Partition) -> UnitReport | None:
        """The partition's report, if its captions match it."""
        report = finished(partition.stored, self.folder)
        path = self.folder / f"{partition.stored}.parquet"
        return report if report and path.is_file() and sha256_files([path]) == report.sha256 else None


def _in_order(
    keys: Iterable[str], known: Mapping[str, Caption | Failure], written: Iterator[Caption | Failure]
) -> Iterator[Caption | Failure]:
    """The known item of each key, else the next written one; surplus items at the end make `UnitReport` raise."""
    for key in keys:
        item = known.get(key) or next(written, None)
        if item:
            yield item
    yield from written


def _writable(item: Caption | Failure) -> Caption | Failure:
    """Replaces unpaired surrogates, which a server's JSON may contain and which cannot be written, by U+FFFD."""
    if isinstance(item, Failure):
        return item
    return replace(item, text=_SURROGATE.sub("\ufffd", item.text))
