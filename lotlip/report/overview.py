"""An overview of the data: what was ingested, what failed and why, and example retrievals."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lotlip.data.separation import Separation
from lotlip.ingest.config import SceneSourceConfig
from lotlip.report.findings import NOT_RUN, FindingResult
from lotlip.report.inputs import ReportInputs
from lotlip.report.results import FAMILIES
from lotlip.report.tables import Column, ReportTable, number, words

FAILURES_PER_KIND = 3
NOT_SHOWN = ("", "not among the first failures; see index.json")  # place and reason
DUPLICATES = ("duplicate", "duplicate-image")  # kinds of failures: of keys, and of images


@dataclass(frozen=True)
class ShownImage:
    """An image on the page. `jpeg` is base64, empty if it could not be drawn; `correct` marks the text's image."""

    jpeg: str
    correct: bool


@dataclass(frozen=True)
class Example:
    """A text, the rank of its image, that image, and the top-ranked images."""

    text: str
    rank: str
    target: ShownImage
    retrieved: Sequence[ShownImage]


@dataclass(frozen=True)
class Examples:
    """Example retrievals for one kind of text, by one model."""

    title: str
    model: str
    best: Sequence[Example]
    worst: Sequence[Example]


def data_first(inputs: ReportInputs, tested: Sequence[FindingResult]) -> bool:
    """Whether the page starts with the data: it is the user's own, or no finding of the paper was tested."""
    is_user_data = not isinstance(inputs.params.ingest.source, SceneSourceConfig)
    return is_user_data or all(one.verdict == NOT_RUN for one in tested)


def overview_table(inputs: ReportInputs) -> ReportTable:
    """Returns the counts of the data: items read, ingested and failed, images per split, and caption lengths."""
    ingest = inputs.ingest
    rows = []
    if ingest:
        rows = [
            [words("items read"), number(ingest.read)],
            [words("images ingested with captions"), number(ingest.written)],
            [words("items that failed"), number(ingest.failed)],
            [
                words("of these, duplicate images or keys"),
                number(sum(ingest.failure_kinds.get(kind, 0) for kind in DUPLICATES)),
            ],
        ]
        by_split: dict[str, int] = {}
        for unit in ingest.units:
            split = unit.name.partition("/")[0]
            by_split[split] = by_split.get(split, 0) + unit.written
        rows += [[words(f"images in split {split}"), number(count)] for split, count in by_split.items()]
    if inputs.caption_words:
        what = f"words per short caption (from {inputs.caption_words['captions']:,.0f} captions)"
        for name, key in (("5th percentile", "p05"), ("median", "median"), ("95th percentile", "p95")):
            rows.append([words(f"{what}: {name}"), number(inputs.caption_words[key])])
    noted = next((stage.notes["separation"] for stage in inputs.stages if "separation" in stage.notes), None)
    note = ""
    if noted:
        separated = Separation(**noted)
        what = "similarity of the captions of nearest neighbours"
        for name, value in (
            (f"{what}, by the image tower", separated.tower),
            (f"{what}, by raw pixels", separated.pixels),
            ("similarity of the captions of random pairs", separated.chance),
        ):
            rows.append([words(name), number(value, "{:.3f}")])
        note = f"Warning: {separated.warning}." if separated.warning else ""
    columns = [Column("what", "What", numeric=False), Column("count", "Number")]
    return ReportTable("overview", "Overview", note, columns, rows)


def failure_examples(inputs: ReportInputs) -> ReportTable:
    """Returns the first ingest failures of each kind, with place and reason; no rows if nothing failed."""
    shown: dict[str, list[tuple[str, str]]] = {}
    for failure in inputs.ingest.failures if inputs.ingest else ():
        shown.setdefault(failure.kind, []).append((failure.where, failure.reason))
    kinds = inputs.ingest.failure_kinds if inputs.ingest else {}
    rows = [
        [
            words(kind),
            number(kinds.get(kind)),
            words(where),
            words(reason),
        ]
        for kind in sorted(kinds, key=lambda kind: -kinds[kind])
        for where, reason in shown.get(kind, [NOT_SHOWN])[:FAILURES_PER_KIND]
    ]
    columns = [
        Column("kind", "Kind", numeric=False),
        Column("count", "Failures of this kind"),
        Column("where", "Where", numeric=False),
        Column("reason", "Reason", numeric=False),
    ]
    note = f"Up to {FAILURES_PER_KIND} of each kind; docs/sources.md explains how to fix them."
    return ReportTable("failure-examples", "Failed items, by kind", note, columns, rows)


def example_sections(inputs: ReportInputs, benchmark: str) -> list[Examples]:
    """Returns the best and worst retrievals of one model: the last main system or else the first ablation with any."""
    with_examples = [a for a in inputs.scored if benchmark in a.benchmarks and a.benchmarks[benchmark].examples]
    if not with_examples:
        return []
    main = [a for a in inputs.systems.values() if a in with_examples]
    ablation = (main or with_examples[:1])[-1]
    result = ablation.benchmarks[benchmark]

    def image(index: int, target: int) -> ShownImage:
        return ShownImage(base64.b64encode(result.example_images.get(index, b"")).decode(), index == target)

    def example(one: dict[str, Any]) -> Example:
        retrieved = [image(index, one["image"]) for index in one["found"]]
        return Example(one["text"], f"{one['rank']:g}", image(one["image"], one["image"]), retrieved)

    return [
        Examples(
            FAMILIES.get(kind, kind),
            f"{ablation.name}, seed {min(result.seeds)}",
            *([example(one) for one in result.examples[kind].get(group, [])] for group in ("best", "worst")),
        )
        for kind in sorted(result.examples)
    ]
