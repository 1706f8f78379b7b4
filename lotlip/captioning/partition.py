"""One partition's captions: from the store or the captioner, then measured, filtered and written."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pydantic import TypeAdapter

from lotlip import config
from lotlip.captioning import Captioner, open_captioner
from lotlip.captioning.quality import assess, measured
from lotlip.captioning.reasoning import cut_reasoning
from lotlip.captioning.store import CaptionStore, Partition
from lotlip.partitions import finished, read_table, write_captions
from lotlip.records import Caption, Failure, UnitReport
from lotlip.text import split_sub_captions

_opening = threading.Lock()


@dataclass(frozen=True)
class Captioning:
    """All that captioning a partition takes, small enough to be sent to another process.

    Attributes:
        captioner: its name in params.yaml.
        stage: `caption` of params.yaml.
        source: folder of ingest.
        store: of captions that were written once.
        out: where the partition's captions go.
    """

    captioner: str
    stage: config.CaptionStage
    source: Path
    store: Path
    out: Path

    def author(self) -> Captioner:
        """The captioner, opened once in a process, however many threads ask."""
        settings = TypeAdapter(config.Captioner).dump_json(self.stage.captioners[self.captioner])
        with _opening:
            return _opened(self.captioner, settings, self.stage.tokenizer)

    def stored(self) -> CaptionStore:
        """The store of what the captioner wrote."""
        return CaptionStore(self.store, self.captioner, self.author().about)

    def __call__(self, partition: Partition) -> list[UnitReport]:
        """Writes the partition's captions, or tells of them where it was done."""
        done = finished(partition.name, self.out)
        return [done or self._write(partition)]

    def _write(self, partition: Partition) -> UnitReport:
        from lotlip.data.tokenizer import token_counts

        store = self.stored()
        report = store.captioned(partition, self.source, self.author())
        captions, empty = [], []
        for caption in map(_without_reasoning, store.read(partition)):
            (captions if isinstance(caption, Caption) else empty).append(caption)
        tokens = token_counts(self.stage.tokenizer, [caption.text for caption in captions])
        counted = (
            replace(caption, sub_captions=split_sub_captions(caption.text), tokens=number)
            for caption, number in zip(captions, tokens, strict=True)
        )
        images = read_table(self.source, partition.name, ["key", "raw_caption"])
        raw = dict(zip(images["key"], images["raw_caption"], strict=True))
        kept = assess(measured(counted, raw), self.stage.quality)
        return write_captions(partition.name, [*report.failures, *empty, *kept], partition.images, self.out)


def _without_reasoning(caption: Caption) -> Caption | Failure:
    """A stored caption without reasoning: what was stored before captioners cut it off may have some."""
    text = cut_reasoning(caption.text)
    if text == caption.text.strip():
        return caption
    if not split_sub_captions(text):
        reason = f"the stored text of {caption.captioner} is nothing but reasoning"
        return Failure(caption.key, caption.key, reason, "empty")
    return replace(caption, text=text)


@lru_cache(maxsize=1)
def _opened(name: str, settings: bytes, tokenizer: str) -> Captioner:
    return open_captioner(name, TypeAdapter(config.Captioner).validate_json(settings), tokenizer)
