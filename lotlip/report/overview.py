"""What is said first of a person's own data: what came in, what did not and why, and what a model finds in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lotlip.ingest.config import SceneSourceConfig
from lotlip.report.findings import NOT_RUN, Judged
from lotlip.report.inputs import ReportInputs
from lotlip.report.results import FAMILIES
from lotlip.report.tables import Column, Table, number, words

FAILURES_OF_A_KIND = 3
NOT_SHOWN = ("", "not among the first failures; see index.json")  # where, and why
COPIES = "duplicate"  # the kind of failure that copies of images and of keys have


@dataclass(frozen=True)
class ShownImage:
    """An image on the page; `jpeg` is base64, empty where it could not be drawn; `right`: it is the text's own."""

    jpeg: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A text, the rank that its own image has, that image, and the images that the model puts first."""

    text: str
    rank: str
    own: ShownImage
    found: Sequence[ShownImage]


@dataclass(frozen=True)
class Examples:
    """Example retrievals of one kind of text: `title` says which, and `model` whose they are."""

    title: str
    model: str
    best: Sequence[Example]
    worst: Sequence[Example]


def data_first(inputs: ReportInputs, judged: Sequence[Judged]) -> bool:
    """Whether the page starts with the data: it is a person's own, or none of the paper's findings was run."""
    own = not isinstance(inputs.params.ingest.source, SceneSourceConfig)
    return own or all(one.verdict == NOT_RUN for one in judged)


def overview_table(inputs: ReportInputs) -> Table:
    """Counts of the data: what was read, what came in, what failed, and how it is split."""
    found = inputs.ingest
    rows = []
    if found:
        rows = [
            [words("items read"), number(found.read)],
            [words("images with captions that came in"), number(found.written)],
            [words("items that failed"), number(found.failed)],
            [words("of these, copies of an earlier image or key"), number(found.failure_kinds.get(COPIES, 0))],
        ]
        by_split: dict[str, int] = {}
        for unit in found.units:
            split = unit.name.partition("/")[0]
            by_split[split] = by_split.get(split, 0) + unit.written
        rows += [[words(f"images in split {split}"), number(count)] for split, count in by_split.items()]
    if inputs.caption_words:
        what = f"words of a short caption (of {inputs.caption_words['captions']:,.0f} captions)"
        for name, key in (("5 % have at most", "p05"), ("median", "median"), ("95 % have at most", "p95")):
            rows.append([words(f"{what}: {name}"), number(inputs.caption_words[key])])
    columns = [Column("what", "What", numeric=False), Column("count", "Number")]
    return Table("overview", "What was found", "", columns, rows)


def failure_examples(inputs: ReportInputs) -> Table:
    """The first failures of each kind in ingest, with place and reason; no rows where nothing failed."""
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
        for where, reason in shown.get(kind, [NOT_SHOWN])[:FAILURES_OF_A_KIND]
    ]
    columns = [
        Column("kind", "Kind", numeric=False),
        Column("count", "Of this kind"),
        Column("where", "Where", numeric=False),
        Column("reason", "Reason", numeric=False),
    ]
    note = f"Up to {FAILURES_OF_A_KIND} of each kind; docs/sources.md says what to do about them."
    return Table("failure-examples", "Failed items, by kind", note, columns, rows)


def example_sections(inputs: ReportInputs, benchmark: str) -> list[Examples]:
    """The best and the worst retrievals of one model: the last of the main systems, or the first that has any."""
    have = [a for a in inputs.scored if benchmark in a.benchmarks and a.benchmarks[benchmark].examples]
    if not have:
        return []
    main = [a for a in inputs.systems.values() if a in have]
    ablation = (main or have[:1])[-1]
    result = ablation.benchmarks[benchmark]

    def image(place: int, own: int) -> ShownImage:
        return ShownImage(base64.b64encode(result.example_images.get(place, b"")).decode(), place == own)

    def example(one: dict[str, Any]) -> Example:
        found = [image(place, one["image"]) for place in one["found"]]
        return Example(one["text"], f"{one['rank']:g}", image(one["image"], one["image"]), found)

    return [
        Examples(
            FAMILIES.get(kind, kind),
            f"{ablation.name}, seed {min(result.seeds)}",
            *([example(one) for one in result.examples[kind].get(group, [])] for group in ("best", "worst")),
        )
        for kind in sorted(result.examples)
    ]
