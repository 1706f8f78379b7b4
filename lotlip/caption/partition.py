"""Captions one partition: gets captions from the store or the captioner, then measures, filters and writes them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pydantic import TypeAdapter

from lotlip.caption.captioners import Captioner, open_captioner
from lotlip.caption.config import CaptionConfig, CaptionerConfig
from lotlip.caption.quality import assess, measured
from lotlip.caption.reasoning import cut_reasoning
from lotlip.caption.store import TRANSIENT, CaptionStore, Partition
from lotlip.core.compute import CAPTIONER_DEFAULTS, CaptionerCompute
from lotlip.core.files import sha256_json
from lotlip.data.partitions import MARKER, finished, read_table, reuse_or_write, write_captions
from lotlip.data.paths import tree_state
from lotlip.data.records import Caption, Failure, NonRetryableError, UnitReport
from lotlip.data.text import has_words, split_sub_captions
from lotlip.data.work import Ranges, UnitFiles, Write, write_here

_opening = threading.Lock()


@dataclass(frozen=True)
class Captioning:
    """Everything that is needed to caption a partition; small enough to be sent to another process.

    Attributes:
        captioner: its name in params.yaml.
        stage: section `caption` of params.yaml.
        source: folder of ingest.
        store: folder of all stored captions.
        out: folder for the partition's captions.
        compute: compute settings of the captioner.
        expected: folder of the store that the stage's own machine uses; None: not known. Another machine may have
            another model under the same path.
    """

    captioner: str
    stage: CaptionConfig
    source: Path
    store: Path
    out: Path
    compute: CaptionerCompute = CAPTIONER_DEFAULTS
    expected: Path | None = None

    def author(self) -> Captioner:
        """The captioner, opened once per process for all threads, and reopened when its file has changed."""
        settings = self.stage.captioners[self.captioner]
        described = TypeAdapter(CaptionerConfig).dump_json(settings)
        with _opening:
            return _opened(self.captioner, described, self.stage.tokenizer, tree_state(settings.path), self.compute)

    def stored(self) -> CaptionStore:
        """The store of the captioner's captions."""
        return CaptionStore(self.store, self.captioner, self.author().about)

    def __call__(self, partition: Partition, write: Write = write_here) -> list[UnitReport]:
        """Writes the partition's captions, unless they exist and were made from the same images and captioner."""
        inputs = sha256_json([partition.name, partition.images, partition.sha256, self.author().about])
        return reuse_or_write(
            partition.name,
            inputs,
            self.out,
            lambda: self._finished(partition),
            lambda: write(replace(self, expected=self.stored().folder), partition),
        )

    def _finished(self, partition: Partition) -> list[UnitReport] | None:
        report = finished(partition.name, self.out)
        if report is None or any(failure.kind in TRANSIENT for failure in report.failures):
            return None  # server failures may succeed now
        return [report]

    def write(self, partition: Partition) -> list[UnitReport]:
        """Writes the partition's captions, those that are missing in the store also there."""
        from lotlip.data.tokenizer import token_counts

        store = self.stored()
        if self.expected not in (None, store.folder):
            raise NonRetryableError(
                f"captioner {self.captioner} is another model on this machine than on the stage's; put the same files "
                "on all nodes"
            )
        report = store.ensure_captioned(partition, self.source, self.author())
        usable = [_usable(caption) for caption in store.read(partition)]
        captions = [item for item in usable if isinstance(item, Caption)]
        empty = [item for item in usable if isinstance(item, Failure)]
        tokens = token_counts(self.stage.tokenizer, [caption.text for caption in captions])
        counted = (
            replace(caption, sub_captions=split_sub_captions(caption.text, self.stage.sentence_ends), tokens=number)
            for caption, number in zip(captions, tokens, strict=True)
        )
        images = read_table(self.source, partition.name, ["key", "short_caption"])
        raw = dict(zip(images["key"], images["short_caption"], strict=True))
        rewrites = self.captioner in self.stage.rewriting
        kept = assess(measured(counted, raw, rewrites), self.stage.rules(self.captioner))
        return [write_captions(partition.name, [*report.failures, *empty, *kept], partition.images, self.out)]

    def files(self, partition: Partition) -> UnitFiles:
        """The partition, its captions in the store and in the stage's output, and the captioner."""
        from lotlip.data.tokenizer import tokenizer_paths

        store, out = self.stored(), self.out / partition.name
        images, captions = self.source / f"{partition.name}.parquet", store.folder / f"{partition.stored}.parquet"
        report = captions.with_suffix(MARKER)
        reads: dict[Path, Ranges | None] = dict.fromkeys([images, captions, report])
        if store.complete(partition) is None:
            reads[images.with_suffix(".tar")] = None
        named = [value for _, value in self.stage.captioners[self.captioner] if isinstance(value, Path)]
        writes = [captions, report, Path(f"{out}.parquet"), Path(f"{out}{MARKER}")]
        return UnitFiles(reads, writes, [*named, *tokenizer_paths(self.stage.tokenizer)])


def _usable(caption: Caption) -> Caption | Failure:
    """A stored caption without reasoning; a failure if no words are left. Earlier versions stored either."""
    text = cut_reasoning(caption.text)
    if not has_words(text):
        reason = f"the stored text of {caption.captioner} has no words besides reasoning"
        return Failure(caption.key, caption.key, reason, "empty")
    return caption if text == caption.text.strip() else replace(caption, text=text)


@lru_cache(maxsize=1)
def _opened(name: str, settings: bytes, tokenizer: str, state: str, compute: CaptionerCompute) -> Captioner:
    return open_captioner(name, TypeAdapter(CaptionerConfig).validate_json(settings), tokenizer, compute)
