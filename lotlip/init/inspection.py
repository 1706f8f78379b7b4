"""Looks at a sample of own data: what can be used, how long texts are, and what fits them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from lotlip.caption.captioners.table import TableCaptioner
from lotlip.caption.config import TableCaptionerConfig
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.text import SentenceEnds, split_sub_captions
from lotlip.ingest.config import SourceConfig
from lotlip.ingest.sources import open_source
from lotlip.init.source import DataSource, unit_shares

_UNIT, _UNITS = 100, 10  # items per unit, and units that are looked at
_TARS = 2  # tars that are looked at; each is read to its end
_SHOWN = 3
_RECORDS = 100  # images that models are tried on
_MANY_MORE = 1.5
ENDS: tuple[SentenceEnds, ...] = ("released", "unicode")


@dataclass(frozen=True)
class Texts:
    """Lengths of a kind of text: sub-captions and tokens of each."""

    sub_captions: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """What a sample of the data holds.

    Attributes:
        items: estimated number of items in the data set.
        complete: whether all items were looked at, so that `items` is exact.
        images: number of usable images in the sample.
        failures: kind → number of items in the sample that cannot be used.
        examples: the first failures, for a person.
        repeated_images, repeated_captions: images and captions in the sample that equal an earlier one.
        texts: "short" or captioner → lengths.
        sides: shorter and longer side of each image in pixels, [n, 2].
        sentence_ends: rule that finds the sub-captions of these texts.
        records: some of the images with their short captions.
        tried: captioner → lengths of the captions that a model wrote for a few images.
    """

    items: int
    complete: bool
    images: int
    failures: Counter[str]
    examples: list[str]
    repeated_images: int
    repeated_captions: int
    texts: dict[str, Texts]
    sides: np.ndarray = field(repr=False)
    sentence_ends: SentenceEnds = "released"
    records: list[ImageRecord] = field(default_factory=list, repr=False)
    tried: dict[str, Texts] = field(default_factory=dict)

    @property
    def failure_share(self) -> float:
        """Share of the sample's items that cannot be used."""
        return sum(self.failures.values()) / max(self.images + sum(self.failures.values()), 1)

    @property
    def missing_share(self) -> float:
        """Share of the usable images without a long caption, by the captioner with the fewest captions."""
        return 1 - min(len(texts.tokens) for texts in self.texts.values()) / self.images

    @property
    def usable(self) -> int:
        """Estimated number of usable images in the data set."""
        return round(self.items * (1 - self.failure_share))


def inspect(data: DataSource, count_tokens: Callable[[Sequence[str]], list[int]]) -> Inspection:
    """Reads a sample of the data through the pipeline's own source and captioners.

    Args:
        data: how it is stored.
        count_tokens: number of tokens of each text, before truncation.

    Raises:
        ValueError: the source has nothing that can be used, or no long caption belongs to any of its images.
    """
    records, failures, items, complete = read_sample(TypeAdapter(SourceConfig).validate_python(data.source))
    examples = [f"{failure.where}: {failure.reason}" for failure in failures[:_SHOWN]]
    if not records:
        raise ValueError(f"none of {len(failures)} items can be used, such as {'; '.join(examples) or 'none'}")
    texts = {"short": [record.short_caption for record in records]}
    for name, section in data.captioners.items():
        texts[name] = _long_captions(name, section, records)
    ends = _sentence_ends([text for kind in texts.values() for text in kind])
    lengths = {name: text_lengths(kind, ends, count_tokens) for name, kind in texts.items()}
    return Inspection(
        items,
        complete,
        len(records),
        Counter(failure.kind for failure in failures),
        examples,
        len(records) - len({hashlib.sha256(record.image).digest() for record in records}),
        len(records) - len(set(texts["short"])),
        lengths,
        np.array([sorted((record.width, record.height)) for record in records]),
        ends,
        records[:: max(len(records) // _RECORDS, 1)][:_RECORDS],
    )


def text_lengths(
    texts: Sequence[str], sentence_ends: SentenceEnds, count_tokens: Callable[[Sequence[str]], list[int]]
) -> Texts:
    """The lengths of some texts."""
    sub_captions = [len(split_sub_captions(text, sentence_ends)) for text in texts]
    return Texts(np.array(sub_captions), np.array(count_tokens(texts)))


def read_sample(settings: Any) -> tuple[list[ImageRecord], list[Failure], int, bool]:
    """Reads a sample of a source, evenly spaced.

    Args:
        settings: section `ingest.source` of params.yaml.

    Returns:
        Images and failures of the sample, the (estimated) number of items of the source, and whether all were read.
    """
    source = open_source(settings)
    units = source.units(_UNIT)
    looked = [units[number] for number in unit_shares(len(units), _TARS if settings.kind == "webdataset" else _UNITS)]
    read = [item for unit in looked for item in source.read(unit)]
    complete = len(looked) == len(units)
    return (
        [item for item in read if isinstance(item, ImageRecord)],
        [item for item in read if isinstance(item, Failure)],
        len(read) if complete else round(len(read) / len(looked) * len(units)),
        complete,
    )


def _sentence_ends(texts: Sequence[str]) -> SentenceEnds:
    """The released rule, unless all Unicode sentence ends give many more sub-captions, as in Chinese."""
    released, unicode = (sum(len(split_sub_captions(text, ends)) for text in texts) for ends in ENDS)
    return "unicode" if unicode > _MANY_MORE * released else "released"


def _long_captions(name: str, section: dict[str, Any], records: Sequence[ImageRecord]) -> list[str]:
    captioner = TableCaptioner(name, TableCaptionerConfig.model_validate(section), lambda text: len(text.split()))
    found = [one.text for one in captioner.caption(records) if isinstance(one, Caption)]
    if not found:
        raise ValueError(
            f"none of {len(records)} images has a text in column {section['text']} of {section['path']}; name another "
            "column with --long-column"
        )
    return found


def describe(found: Inspection, context_length: int) -> list[str]:
    """Formats an inspection as lines of text.

    Args:
        found: the inspection.
        context_length: suggested maximum of tokens in a text.
    """
    about = "" if found.complete else "about "
    seen = found.images + sum(found.failures.values())
    lines = [_row("images", f"{about}{found.usable:,} ({seen:,} looked at)")]
    shorter, longer = np.median(found.sides, axis=0)
    lines.append(_row("median size", f"{longer:.0f} × {shorter:.0f} pixels"))
    lines += [_row(f"cannot be used: {kind}", f"{number:,} of {seen:,}") for kind, number in found.failures.items()]
    lines += [f"    {example}" for example in found.examples]
    if found.failures["duplicate"]:
        lines.append(
            "    of several samples with one key, the first is used; put all captions of an image into one sample"
        )
    for name, repeated in (("images", found.repeated_images), ("short captions", found.repeated_captions)):
        if repeated:
            lines.append(_row(f"{name} that equal another", f"{repeated:,} of {found.images:,}"))
    for name, texts in [*found.texts.items(), *found.tried.items()]:
        label = "short captions" if name == "short" else f"long captions, {name}"
        number = f"{len(texts.tokens):,} " + ("tried" if name in found.tried else f"of {found.images:,}")
        cut = (texts.tokens > context_length).mean()
        lines.append(
            _row(
                label,
                f"{number}, {texts.sub_captions.mean():.1f} sub-captions, "
                f"{texts.tokens.mean():.0f} tokens (95 % ≤ {np.quantile(texts.tokens, 0.95):.0f}), "
                f"{cut:.0%} longer than {context_length}",
            )
        )
    return lines


def _row(name: str, value: str) -> str:
    return f"  {name:<34}{value}"
